"""`logratio migrate`: a file of TRL's as one of ours, told of and written whole, or not at all."""

import os

import pytest

from logratio.trainers import migrate
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train

GIVEN = (
    "max_seq_length: 64\nlearning_rate: 5e-5\nwarmup_ratio: 0.1\npacking: true\nmodel_init_kwargs: {dtype: float16}\n"
)
WRITTEN = """# from theirs.yaml: logratio train sft --config this
# translated: max_seq_length: 64 -> max_length: 64
max_length: 64
learning_rate: 5e-5
# translated: warmup_ratio: 0.1 -> warmup_steps: 0.1
warmup_steps: 0.1
# translated: model_init_kwargs.dtype: float16 -> dtype: float16
dtype: float16
# without effect: packing: true (rows are packed by micro_batch_tokens in any case, each seeing itself alone; \
batch_size counts rows, not packed blocks as TRL's does)
# not in the file: bf16 (TRL's default is true, here no autocast)
# not in the file: save_steps (TRL's default is 500, here the trained model alone is saved)
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yaml").write_text(GIVEN)
    return tmp_path / "theirs.yaml"


def test_it_prints_ours_and_tells_of_each_option_beside(theirs, capsys):
    assert migrate.main(["theirs.yaml", "--method", "sft"]) == 0
    out, err = capsys.readouterr()
    assert out == WRITTEN
    assert err.startswith("theirs.yaml, judged by TRL 1.16's names\n  translated: max_seq_length: 64 -> max_length: 64")


def test_a_file_that_is_there_stays(theirs, capsys):
    with pytest.raises(UserError, match=r"^--output theirs.yaml is there already; choose another name$"):
        migrate.main(["theirs.yaml", "--method", "sft", "--output", "theirs.yaml"])
    assert theirs.read_text() == GIVEN
    with pytest.raises(UserError, match=r"^--output no/ours.yaml cannot be written: No such file or directory$"):
        migrate.main(["theirs.yaml", "--method", "sft", "--output", "no/ours.yaml"])


def test_where_something_is_refused_nothing_is_written(theirs, capsys):
    theirs.write_text(GIVEN + "optim: sgd\n")
    with pytest.raises(UserError, match=r"^theirs.yaml: optim: sgd: the optimizer is AdamW: "):
        migrate.main(["theirs.yaml", "--method", "sft", "--output", "ours.yaml"])
    assert not (theirs.parent / "ours.yaml").exists()
    assert "  refused: optim: sgd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("num_generations: 8\nloss_type: dapo", "grpo"),
        ("desirable_weight: 1", "kto"),
        ("loss_type: [sigmoid, sft]\nf_divergence_type: reverse_kl", "dpo"),
        ("cpo_alpha: 1", "cpo"),
        ("assistant_only_loss: true\nloss_type: dft", "sft"),
    ],
)
def test_a_method_is_told_from_its_options(theirs, capsys, text, method):
    theirs.write_text(text)
    assert migrate.main(["theirs.yaml"]) == 0
    assert f"logratio train {method} --config this" in capsys.readouterr().out


def test_a_method_that_cannot_be_told_is_asked_for(theirs):
    fits = "sft, dpo, kto, orpo, cpo, tpo, grpo, rloo"
    message = f"^theirs.yaml does not say its method, and fits {fits}: add --method sft, say$"
    with pytest.raises(UserError, match=message):
        migrate.main(["theirs.yaml"])
    with pytest.raises(UserError, match="^unknown method 'ppo', expected one of: sft, dpo, "):
        migrate.main(["theirs.yaml", "--method", "ppo"])
    with pytest.raises(UserError, match=r"^none.yaml: there is no such file$"):
        migrate.main(["none.yaml"])


def test_rloo_is_grpo_with_its_loss(theirs, capsys, tmp_path):
    theirs.write_text("num_generations: 4\nbeta: 0.05\nenv: {A_VARIABLE: 1}\n")
    assert migrate.main(["theirs.yaml", "--method", "rloo", "--output", "ours.yaml"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_VARIABLE", "0")
        config = parse_train(["grpo", "--config", "ours.yaml"])
        assert parse_train(["rloo", "--config", "theirs.yaml"]) == config
        assert os.environ["A_VARIABLE"] == "1"
    assert config.method == "grpo" and config.loss.loss_type == "rloo" and config.loss.beta == 0
    rollout = config.rollout
    assert (rollout.advantage_type, rollout.num_generations, rollout.reward_kl_coef) == (("rloo",), 4, 0.05)
    assert parse_train(["rloo", "--reward_kl_coef", "0.05", "--num_generations", "4"]) == config
