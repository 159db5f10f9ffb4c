import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import yaml

from logratio.benchmarks.plan import ADVICE, Options, main, peak_of_run, planned, verdict
from logratio.trainers import cli
from logratio.trainers.cli import COMMANDS, PLANNERS
from logratio.trainers.cli import main as logratio
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_model


def words(line: str) -> list[str]:
    """With the method in front, where another than dpo is meant."""
    method, *rest = line.split() if line[:1].isalpha() else ["dpo", *line.split()]
    return [method, "--model_name_or_path", "Qwen/Qwen2.5-0.5B", "--dtype", "bfloat16", *rest]


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


def test_a_budget_that_fits_does_whatever_the_lengths_are(capsys):
    """Two long examples leave half of a micro-batch empty, many short ones nothing."""
    line = "--lora_r 16 --gpu L4 --batch_size 32 --max_length 8192 --micro_batch_tokens"
    long, short = "--prompt_tokens 2000 --completion_tokens 3000", "--prompt_tokens 20 --completion_tokens 30"
    largest = answer(capsys, f"{line} 8192 {long}")["largest_micro_batch_tokens"]
    many = line.replace("32", "2000")
    assert answer(capsys, f"{many} {largest // 16 * 16} {short}")["predicted_peak_mem_mib"] == pytest.approx(
        answer(capsys, f"{line} {largest} {long}")["predicted_peak_mem_mib"], rel=0.01
    )
    assert answer(capsys, f"{many} {largest * 49 // 50} {short}")["fits"]


def test_a_model_that_does_not_fit_at_all_gets_advice(capsys):
    main(["dpo", "--model_name_or_path", "Llama-3.1-8B", "--gpu", "T4"])
    said = " ".join(capsys.readouterr().out.split())
    assert "does not fit T4" in said and ADVICE in said


def test_a_step_that_fits_as_a_whole(capsys):
    told = answer(capsys, "--batch_size 2")
    assert told["whole_step_fits"] and told["largest_micro_batch_tokens"] == told["step_tokens"] == 1600
    assert "so does a whole step in one micro-batch, --micro_batch_tokens 1600." in verdict(told)


@pytest.mark.parametrize(
    "line, said",
    [
        ("ppo", "expected one of: .*dpo"),
        ("--method dpo", "plan takes the method as train does, in front: logratio plan dpo"),
        ("--gpu TPU", "expected one of: H100"),
        ("--load_in_4bit", "add --lora_r 16"),
        ("--micro_batch_tokens 0", "--micro_batch_tokens .*0"),
        ("--prompt_tokens -3", "--prompt_tokens .*-3"),
    ],
)
def test_bad_input_is_one_sentence(line, said):
    with pytest.raises(UserError, match=said):
        main(words(line))


def test_a_loss_of_ones_own_is_told_apart_from_a_method(tmp_path, monkeypatch):
    module = "from dataclasses import dataclass\nfrom logratio.losses import DPOLoss\n"
    (tmp_path / "planned_loss.py").write_text(
        f"{module}@dataclass(frozen=True, kw_only=True)\nclass Own(DPOLoss): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="^the plan knows no loss of one's own: plan the method that it is like, "):
        main(["--loss", "planned_loss:Own", "--model_name_or_path", "Qwen/Qwen2.5-0.5B"])


@pytest.mark.skipif(not entry_points(group=COMMANDS), reason="the package is not installed, so it has no commands")
def test_the_command_exits_with_a_sentence(capsys):
    assert logratio(["plan", "dpo", "--model_name_or_path", "no/such-model"]) != 0
    said = capsys.readouterr().err
    assert said.startswith("logratio: ") and said.count("\n") == 1 and "config.json" in said
    assert logratio(["plan"]) == 1
    assert capsys.readouterr().err.startswith("logratio: plan needs a method, one of: ")


def test_it_needs_no_transformers():
    code = (
        "import sys; from logratio.benchmarks.plan import main, verdict; main(sys.argv[1:]); "
        "heavy = {'transformers', 'peft', 'accelerate'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *words("kto --lora_r 8 --json")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["method"] == "kto"


def told(capsys, *line: str) -> dict:
    assert main([*line, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1, "of a file nothing is said between"
    return json.loads(out)


QLORA = {"model_name_or_path": "Qwen2.5-0.5B", "lora_r": 16, "load_in_4bit": True, "dtype": "bfloat16"}


def test_a_file_of_ours_says_the_same_as_its_options(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({**QLORA, "batch_size": 4, "max_length": 512, "gradient_checkpointing": True}))
    found = told(capsys, "orpo", "--config", str(file), "--gpu", "L4", "--prompt_tokens", "400")
    shape = {**QLORA, "batch_size": 4, "gradient_checkpointing": True, "prompt_tokens": 400, "completion_tokens": 112}
    assert found == {**planned(Options(method="orpo", gpu="L4", **shape)), "not_modelled": []}
    assert told(capsys, "orpo", "--config", str(file), "--batch_size", "1")["step_tokens"] < found["step_tokens"]


def test_float32_attends_without_a_dense_mask_in_mixed_precision_alone(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    activations = {}
    for said in ("no", "bf16"):
        file.write_text(yaml.safe_dump({"model_name_or_path": "Qwen2.5-0.5B", "mixed_precision": said}))
        found = told(capsys, "dpo", "--config", str(file), "--prompt_tokens", "400")
        activations[said] = found["parts_mib"]["activations"] / found["step_tokens"]
    assert activations["bf16"] < 0.9 * activations["no"], activations


def test_a_file_of_trls_is_planned_as_it_would_train(tmp_path, capsys):
    file = tmp_path / "trl.yaml"
    theirs = {"model_name_or_path": "Qwen2.5-0.5B", "torch_dtype": "bfloat16", "use_peft": True, "load_in_4bit": True}
    theirs |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_seq_length": 1024}
    file.write_text(yaml.safe_dump({**theirs, "bf16": True, "activation_checkpointing": True}))
    found = told(capsys, "sft", "--config", str(file))
    shape = {**QLORA, "batch_size": 6, "gradient_checkpointing": True}
    by_hand = planned(Options(method="sft", **shape, fused_lora=False))  # TRL's lora_dropout is 0.05
    assert found == {**by_hand, "not_modelled": ["the plan does not model autocast"]}
    assert main(["sft", "--config", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "judged by TRL 1.16's names" in said and "Not all of it: the plan does not model autocast." in said
    file.write_text(yaml.safe_dump({**theirs, "use_vllm": True}))
    with pytest.raises(UserError, match="use_vllm: true: "):
        main(["sft", "--config", str(file)])


def test_the_run_that_a_run_left_is_planned(tmp_path, capsys):
    run = parse_train(["kto", "--model_name_or_path", "Qwen2.5-0.5B", "--lora_r", "8", "--batch_size", "3"])
    (tmp_path / "run_config.json").write_text(json.dumps({**run.resolved(1).as_dict(), "about": {"device": "cpu"}}))
    found = told(capsys, "--config", str(tmp_path / "run_config.json"))
    shape = {"model_name_or_path": "Qwen2.5-0.5B", "lora_r": 8, "batch_size": 3, "dtype": "float32"}
    assert found == {**planned(Options(method="kto", **shape)), "not_modelled": []}


@pytest.mark.parametrize("options, reference", [([], 0), (["--beta", "0.1"], 1), (["--reward_kl_coef", "0.1"], 1)])
def test_a_reference_is_there_where_the_options_ask_for_one(options, reference, capsys):
    line = ["grpo", "--model_name_or_path", "Qwen2.5-0.5B", "--max_completion_length", "64", "--json"]
    assert main([*line, *options]) == 0
    parts = json.loads(capsys.readouterr().out)["parts_mib"]
    assert parts["reference"] == reference * parts["weights"]


def test_a_teacher_takes_the_memory_and_the_time_of_its_own_shape(capsys):
    line = ["grpo", "--model_name_or_path", "Qwen2.5-0.5B", "--max_completion_length", "64", "--dtype", "bfloat16"]
    alone = told(capsys, *line)
    taught = told(capsys, *line, "--teacher_model_name_or_path", "Llama-3.1-8B")
    assert alone["parts_mib"]["teacher"] == 0 and "teacher" not in alone["step_parts_ms"]
    assert taught["parts_mib"]["teacher"] == pytest.approx(2 * 8.03e9 / 2**20, rel=1e-3)
    assert taught["step_parts_ms"]["teacher"] > 5 * taught["step_parts_ms"]["forward"]
    extra = taught["needed_mib"] - alone["needed_mib"]
    assert extra == pytest.approx(taught["parts_mib"]["teacher"], abs=1), "weights are in no fragments"


def test_an_anchor_is_a_reference_whose_head_is_read_too(capsys):
    line = ["sft", "--model_name_or_path", "Qwen2.5-0.5B", "--dtype", "bfloat16"]
    for way, copies in (([], 1), (["--lora_r", "8"], 0)):
        dft, asft = (told(capsys, *line, *way, "--loss_type", name) for name in ("dft", "asft"))
        assert dft["parts_mib"]["reference"] == 0 and "reference" not in dft["step_parts_ms"]
        assert asft["parts_mib"]["reference"] == copies * asft["parts_mib"]["weights"]
        assert asft["step_parts_ms"]["reference"] > asft["step_parts_ms"]["forward"]
        assert asft["step_parts_ms"]["head"] == 2 * dft["step_parts_ms"]["head"]


def test_rollouts_are_no_longer_than_they_may_be(capsys):
    line = ["grpo", "--model_name_or_path", "Qwen2.5-0.5B", "--num_generations", "2", "--batch_size", "1"]
    assert told(capsys, *line, "--max_completion_length", "28")["step_tokens"] == 256  # 200 + 2 x 28, in 128s


def test_the_embedded_model_is_planned_too(capsys):
    assert told(capsys, "dpo")["parameters"] == sum(p.numel() for p in tiny_model().parameters())


def test_help_has_the_options_of_both(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["dpo", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{name}" in text for name in ("gpu", "prompt_tokens", "beta", "lora_r"))
    assert "usage: logratio plan dpo" in text


def settings(**about):
    run = parse_train(["dpo", "--model_name_or_path", "Qwen2.5-0.5B", "--lora_r", "8", "--dtype", "bfloat16"])
    on = {"device": "NVIDIA H100 80GB HBM3", "device_mem_mib": 81000.0, "num_processes": 1, **about}
    return {**run.resolved(1).as_dict(), "about": on}


CARD = {"train": {"prompt_tokens": 100.4, "completion_tokens": 51.0}}


def test_what_a_runs_screen_is_told():
    shape = {"model_name_or_path": "Qwen2.5-0.5B", "lora_r": 8, "prompt_tokens": 100, "completion_tokens": 51}
    assert peak_of_run(settings(), CARD) == planned(Options(**shape))["predicted_peak_mem_mib"]
    assert peak_of_run(settings(device="cpu"), CARD) is None and peak_of_run(settings(num_processes=2), CARD) is None
    assert peak_of_run(settings(), {}) is None and peak_of_run({}, {}) is None
    grown, unknown = settings(), settings()
    grown["train"]["micro_batch_tokens"], unknown["model"]["model_name_or_path"] = "auto", "no/such"
    assert peak_of_run(grown, CARD) is None and peak_of_run(unknown, CARD) is None


def test_it_is_entered_for_the_command_line():
    entered = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert EntryPoint("peak", entered[PLANNERS]["peak"], PLANNERS).load() is peak_of_run


def test_a_run_asks_for_its_plan(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "planner", lambda: lambda settings, card: asked.append((settings, card)))
    monkeypatch.chdir(tmp_path)
    words = ["--max_steps", "1", "--batch_size", "2", "--dataset_name", "rows.jsonl", "--output_dir", "out"]
    Path("rows.jsonl").write_text(json.dumps({"prompt": "1", "completion": "2"}) + "\n")
    assert cli.main(["train", "sft", *words]) == 0
    (((told, card)),) = asked
    assert told["about"]["device"] == "cpu" and card["train"]["prompt_tokens"] >= 1
