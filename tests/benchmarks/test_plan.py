import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from logratio.benchmarks.plan import ADVICE, main, verdict
from logratio.trainers.cli import COMMANDS
from logratio.trainers.cli import main as logratio
from logratio.trainers.errors import UserError


def words(line: str) -> list[str]:
    return ["--model_name_or_path", "Qwen/Qwen2.5-0.5B", *line.split()]


def answer(capsys, line: str) -> dict:
    assert main([*words(line), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_says_what_the_table_says(capsys):
    told = answer(capsys, "--lora_r 16 --load_in_4bit --batch_size 32")
    assert sum(told["parts_mib"].values()) == pytest.approx(told["predicted_peak_mem_mib"])
    assert max(told["moments_mib"].values()) == told["predicted_peak_mem_mib"] < told["needed_mib"]
    assert sum(told["step_parts_ms"].values()) == pytest.approx(told["predicted_step_ms"])
    assert told["fits"] and told["trained_parameters"] == 8798208
    main(words("--lora_r 16 --load_in_4bit --batch_size 32"))
    shown = capsys.readouterr().out
    for value in (told["predicted_peak_mem_mib"], told["parts_mib"]["weights"]):
        assert f"{value:,.1f}" in shown
    assert f"{told['predicted_step_ms']:,.2f}" in shown
    assert "not counted by torch" in shown and "roofline" in shown and "It fits H100" in shown


def test_the_largest_micro_batch_is_at_the_boundary(capsys):
    line = "--lora_r 16 --gpu L4 --batch_size 256 --micro_batch_tokens"
    largest = answer(capsys, f"{line} 100000")["largest_micro_batch_tokens"]
    assert not answer(capsys, f"{line} 100000")["fits"]
    assert answer(capsys, f"{line} {largest}")["fits"] and not answer(capsys, f"{line} {largest + 1}")["fits"]
    main(words(f"{line} 100000"))
    assert f"the largest --micro_batch_tokens that does is {largest}" in capsys.readouterr().out.replace("\n", " ")


def test_a_model_that_does_not_fit_at_all_gets_advice(capsys):
    main(["--model_name_or_path", "Llama-3.1-8B", "--gpu", "T4"])
    said = " ".join(capsys.readouterr().out.split())
    assert "does not fit T4" in said and ADVICE in said


def test_a_step_that_fits_as_a_whole(capsys):
    told = answer(capsys, "--batch_size 2")
    assert told["whole_step_fits"] and told["largest_micro_batch_tokens"] == told["step_tokens"] == 13 * 128
    assert "so does a whole step in one micro-batch, --micro_batch_tokens 1664." in verdict(told)


@pytest.mark.parametrize(
    "line, said",
    [
        ("--method ppo", "expected one of: .*dpo"),
        ("--gpu TPU", "expected one of: H100"),
        ("--load_in_4bit", "add --lora_r 16"),
        ("--optim sgd", "adamw_8bit"),
        ("--micro_batch_tokens 0", "must be positive"),
        ("--prompt_tokens -3", "must be positive"),
    ],
)
def test_bad_input_is_one_sentence(line, said):
    with pytest.raises(UserError, match=said):
        main(words(line))


@pytest.mark.skipif(not entry_points(group=COMMANDS), reason="the package is not installed, so it has no commands")
def test_the_command_exits_with_a_sentence(capsys):
    assert logratio(["plan", "--model_name_or_path", "no/such-model"]) != 0
    said = capsys.readouterr().err
    assert said.startswith("logratio: ") and said.count("\n") == 1 and "config.json" in said
    with pytest.raises(SystemExit) as stopped:
        logratio(["plan"])
    assert stopped.value.code == 2


def test_it_needs_no_transformers():
    code = (
        "import sys; from logratio.benchmarks.plan import main, verdict; main(sys.argv[1:]); "
        "heavy = {'transformers', 'peft', 'accelerate'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *words("--method kto --lora_r 8 --json")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["method"] == "kto"
