"""Options of TRL, and misspelt ones, as words of the command line."""

import pytest

from logratio.trainers import cli


def refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *words.split()])
    assert stopped.value.code == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == f"logratio: logratio train {words.split()[0]} does not have:"
    return [line.strip() for line in lines]


def test_options_of_trl_are_judged_each_in_a_line(capsys):
    """Where one of ours stands for it, in the words to write; the option that is ours is not spoken of."""
    words = "dpo --use_peft --logging-steps=5 --bf16 --beta 0.2 --no-shuffle --full_determinism"
    assert refused(words, capsys) == [
        "--use_peft: TRL's, here --lora_r 16 --lora_alpha 32 --lora_dropout 0.05 (with TRL's defaults for what the "
        "file leaves out)",
        "--logging_steps: TRL's, without effect here (every step is a line of metrics.jsonl, and is shown): leave it "
        "out",
        "--bf16: TRL's, here --mixed_precision bf16",
        "--full_determinism: TRL's, refused: to the bit the same on a CPU alone; leave it out on a GPU",
        "a file with TRL's options is taken by --config FILE",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("dpo --bta 1", "--bta: no option here, nor of TRL; did you mean --beta?"),
        ("dpo --learning-rat 1", "--learning_rat: no option here, nor of TRL; did you mean --learning_rate?"),
        ("dpo --xyzzy", "--xyzzy: no option here, nor of TRL"),
        ("sft --beta 1", "--beta: an option of dpo, cpo, tpo, grpo, kto, listwise, orpo"),
        ("dpo --num_generations 4", "--num_generations: an option of grpo"),
    ],
)
def test_what_is_nobodys_has_the_nearest_of_ours(words, line, capsys):
    assert refused(words, capsys) == [line]


def test_values_are_read_as_in_a_file(capsys):
    assert refused("dpo --optim adamw_torch --max_seq_length 64 --load_best_model_at_end_ false", capsys) == [
        "--max_seq_length: TRL's, here --max_length 64",
        "--load_best_model_at_end_: no option here, nor of TRL; did you mean --load_best_model_at_end?",
        "a file with TRL's options is taken by --config FILE",
    ]
