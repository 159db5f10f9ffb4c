"""The command line: options in any order and spelling, YAML, losses from outside, and one sentence for bad input."""

import dataclasses
import json
import re
from importlib.metadata import entry_points

import pytest
import torch
from peft import PeftModel

from logratio.losses import LOSSES
from logratio.trainers import cli, options
from logratio.trainers.errors import UserError
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_model

PROMISED = {"step", "loss", "grad_norm", "learning_rate", "num_tokens", "tokens_per_s", "step_ms", "peak_mem_mib"}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A working directory with four rows of every kind in `rows.jsonl`."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for i in range(4):
        right, wrong = str(i + 1), str(i + 30)
        row = {"prompt": f"{i}+1=", "completion": right, "chosen": right, "rejected": wrong, "answer": right}
        rows.append({**row, "label": i % 2 == 0})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lists = [{"completions": [row["chosen"], row["rejected"], "7"], "rewards": [1, 0, 0.5]} for row in rows]
    both = [{"prompt": row["prompt"]} | own for row, own in zip(rows, lists, strict=True)]
    (tmp_path / "lists.jsonl").write_text("\n".join(map(json.dumps, both)))
    return tmp_path


SHORT = ["--dataset_name", "rows.jsonl", "--lora_r", "2", "--batch_size", "2", "--output_dir", "out"]
METRICS = {
    "sft": {"nll"},
    "dpo": {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"},
    "kto": {"rewards/chosen", "rewards/rejected", "kl"},
    "listwise": {"rewards/chosen", "rewards/margins", "rewards/accuracies", "frac_reward_zero_std"},
    "orpo": {"nll_loss", "log_odds_ratio", "rewards/margins"},
    "grpo": {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "rewards/exact_answer/mean",
        "entropy",
    },
}


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METRICS)
def test_every_method_trains_logs_and_saves(workspace, method):
    extra = ["--num_generations", "2", "--max_completion_length", "4"] if method == "grpo" else []
    if method == "listwise":  # its columns are names that rewards of grpo have
        (workspace / "lists.jsonl").rename(workspace / "rows.jsonl")
    assert cli.main(["train", method, *SHORT, "--max_steps", "2", "--learning_rate", "1e-3", *extra]) == 0
    rows = log_of(workspace / "out")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(PROMISED <= row.keys() for row in rows)
    assert METRICS[method] <= rows[0].keys() | rows[1].keys()  # KTO: a step may have no desirable example
    assert rows[1]["num_tokens"] > rows[0]["num_tokens"] > 0
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 5e-4])
    assert all(torch.tensor(row[name]).isfinite() for row in rows for name in PROMISED)
    loaded = PeftModel.from_pretrained(tiny_model(42), workspace / "out")
    moved = sum(p.abs().sum().item() for name, p in loaded.named_parameters() if "lora_B" in name)
    if method != "grpo":  # whose rewards are all the same here
        assert moved > 0
    config = json.loads((workspace / "out" / "run_config.json").read_text())
    assert config["method"] == method and config["train"]["batch_size"] == 2 and config["model"]["lora_r"] == 2
    assert config["loss"].keys() == {f.name for f in dataclasses.fields(LOSSES[method])}


def test_a_second_run_moves_the_first_ones_log_aside(workspace):
    for seed in ("1", "2"):
        words = ["train", "sft", *SHORT, "--max_steps", "1", "--seed", seed, "--overwrite_output_dir"]
        assert cli.main(words) == 0
    seeds = [json.loads((workspace / "out" / f"run_config{n}.json").read_text())["train"]["seed"] for n in ("", ".1")]
    assert seeds == [2, 1]
    assert len(log_of(workspace / "out")) == 1 and (workspace / "out" / "metrics.1.jsonl").exists()


def test_a_full_models_configuration_is_its_own(workspace):
    """config.json in the output is the model's, so that it loads; the run's has another name."""
    words = ["--dataset_name", "rows.jsonl", "--max_steps", "1", "--output_dir", "out", "--learning_rate", "1e-3"]
    assert cli.main(["train", "sft", *words]) == 0
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(workspace / "out")
    assert json.loads((workspace / "out" / "config.json").read_text())["model_type"] == "llama"
    assert json.loads((workspace / "out" / "run_config.json").read_text())["method"] == "sft"
    assert not torch.equal(loaded.lm_head.weight, tiny_model(42).lm_head.weight)
    assert cli.main(["train", "sft", *words[:-2], "--model_name_or_path", "out", "--output_dir", "next"]) == 0


def test_options_in_any_order_and_spelling():
    one = parse_train(["dpo", "--beta", "0.3", "--lora_r", "4", "--no-shuffle", "--batch_size=3"])
    other = parse_train(["dpo", "--batch-size", "3", "--no_shuffle", "--lora-r=4", "--beta", "0.3"])
    assert one == other
    assert (one.loss.beta, one.model.lora_r, one.data.shuffle, one.train.batch_size) == (0.3, 4, False, 3)


@pytest.mark.parametrize("more", [[], ["--sync_ref_model"], ["--sync_ref_model", "--max_steps", "2"]])
def test_a_flag_is_set_wherever_it_stands(tmp_path, more):
    """In what an option of TRL's file depends on, too."""
    file = tmp_path / "trl.yaml"
    file.write_text("ref_model_mixup_alpha: 0.3\nbf16: true\n")
    config = parse_train(["dpo", "--config", str(file), *more])
    assert config.model.ref_model_mixup_alpha == (0.3 if more else None)


def test_yaml_gives_the_same_options_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 1e-5\nbeta: 0.3\nshuffle: no\ngradient-checkpointing: true\ncompletion_only_loss: true\n"
        "lora_r: 4\nlora_target_modules: [q_proj, v_proj]\nmax_steps: null\nwarmup_steps: 3\noutput_dir: runs/x\n"
    )
    config = parse_train(["dpo", "--config", str(file), "--beta", "0.7", "--shuffle"])
    assert config == parse_train(["dpo", "--beta", "0.7", f"--config={file}", "--shuffle"])
    assert config.train.learning_rate == 1e-5 and config.train.warmup_steps == 3 and config.train.max_steps is None
    assert config.loss.beta == 0.7 and config.data.shuffle and config.model.gradient_checkpointing
    assert config.data.completion_only_loss is True
    assert config.model.lora_target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 0.3", "betta: 0.3: no option here, nor of TRL; did you mean beta?"),
        ("num_generations: 4", "num_generations: 4: an option of grpo"),
        ("- beta", "must map option names to values, got a list"),
        ("beta: [1", "cannot be read: while parsing a flow sequence"),
        (None, "there is no such file"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path, capsys, text, message):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    assert cli.main(["train", "dpo", "--config", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"logratio: --config {file}") and message in error and error.count("\n") == 1


def test_a_value_of_the_wrong_type_in_yaml_is_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("learning_rate: fast\n")
    assert cli.main(["train", "dpo", "--config", str(tmp_path / "run.yaml")]) == 1
    assert capsys.readouterr().err == "logratio: --learning_rate takes a number, not 'fast'\n"


LOSS_MODULE = '''
from dataclasses import dataclass
from typing import ClassVar
from logratio.losses import Kind, Loss, LossOutput, Mean, PairLogps, Totals

@dataclass(frozen=True, kw_only=True)
class Likelier(Loss):
    """Raises the chosen's log-prob, each sum scaled."""
    kind: ClassVar[Kind] = Kind.PAIRED
    scale: float = 1.0
    """Factor of the loss."""

    def __post_init__(self):
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} must be positive")

    def __call__(self, policy: PairLogps, *, totals: Totals) -> LossOutput:
        loss = -self.scale * policy.chosen.sums.sum() / totals.num_sequences
        return LossOutput(loss, {"chosen_logps": Mean.of(policy.chosen.sums)})

class NoLoss:
    pass

@dataclass(frozen=True, kw_only=True)
class NoDefault(Likelier):
    tau: float

@dataclass(frozen=True, kw_only=True)
class Taken(Likelier):
    seed: int = 1

@dataclass(frozen=True, kw_only=True)
class NoLength(Likelier):
    kind: ClassVar[Kind] = Kind.GROUPED

@dataclass(frozen=True, kw_only=True)
class Typo(Loss):
    kind: ClassVar[Kind] = Kind.PAIRED
    stats: ClassVar = ("entropie",)
'''


def test_a_loss_from_outside_trains(workspace, capsys):
    (workspace / "outside_loss.py").write_text(LOSS_MODULE)
    words = ["train", "--loss", "outside_loss:Likelier", *SHORT, "--max_steps", "3", "--learning_rate", "1e-2"]
    assert cli.main([*words, "--scale", "2"]) == 0
    rows = log_of(workspace / "out")
    for row in rows:
        assert row["loss"] == pytest.approx(-2 * row["chosen_logps"], rel=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]
    config = json.loads((workspace / "out" / "run_config.json").read_text())
    assert config["loss"] == {"scale": 2.0} and config["method"] == "custom"

    capsys.readouterr()
    for spec, message in {
        "outside_loss:NoLoss": "is not a dataclass derived from logratio.losses.Loss with a `kind`",
        "outside_loss:Missing": "has no 'Missing'",
        "no_such_module_here:X": "there is no module 'no_such_module_here' here, on the PYTHONPATH or installed",
        "outside_loss:NoDefault": "--loss outside_loss:NoDefault: its field tau needs a default",
        "outside_loss:Taken": "--seed is an option of every such run already; rename its field",
        "outside_loss:NoLength": "NoLength is a loss over rollouts, and needs a field max_completion_length: int = 512",
        "outside_loss:Typo": "Typo.stats='entropie' is unknown, expected one of: entropy, log_z, ",
        "nonsense": f"--loss 'nonsense' is neither module:Class nor one of: {METHODS}",
    }.items():
        assert cli.main(["train", "--loss", spec, *SHORT]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("logratio: ") and error.count("\n") == 1
    assert cli.main([*words, "--scale", "-1"]) == 1
    assert capsys.readouterr().err == "logratio: scale=-1.0 must be positive\n"


METHODS = ", ".join(LOSSES)
BAD = {
    "nope": "unknown command 'nope', expected one of: train",
    "train": f"train needs a method, one of: {METHODS}",
    "train --lora_r 4": f"train needs a method, one of: {METHODS}",
    "train ppo": f"unknown method 'ppo', expected one of: {METHODS}",
    "train dpo --loss_type nope": "loss_type='nope' is unknown, expected one of: sigmoid, hinge, ipo",
    "train dpo --beta -1": "beta=-1.0 must be positive",
    "train dpo --loss": "--loss needs a value",
    "train dpo --dataset_name nofile.jsonl": "the data file nofile.jsonl does not exist (looked in ",
    "train dpo --load_in_4bit": "--load_in_4bit freezes the model, so something else must train: add --lora_r 16",
    "train dpo --batch_size 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 2": (
        "--batch_size 3 contradicts per_device_train_batch_size x gradient_accumulation_steps x processes = 4; "
        "give one or the other"
    ),
    "train dpo --dataset_train_split nope": "the data set 'arithmetic' has no split 'nope', only 'train' and 'test'",
    "train dpo --model_name_or_path ./nowhere": "--model_name_or_path ./nowhere does not exist (looked in ",
    "train dpo --model_name_or_path runs/a/b": "--model_name_or_path runs/a/b does not exist (looked in ",
    "train dpo --model_name_or_path nowhere": (
        "no model configuration could be loaded from 'nowhere', which is no folder here (looked in "
    ),
    "train dpo --dataset_name rows.jsonl --eval_size 4": "--eval_size 4 leaves nothing of 4 examples to train on",
    "train kto --dataset_name rows.jsonl --batch_size 1": (
        "4 examples in steps of --batch_size 1 make a step of 1, in which kto cannot pair its prompt with another's "
        "completion; choose another batch_size"
    ),
    "train grpo --dataset_name rows.jsonl --reward_funcs nope": "the reward 'nope' is unknown, expected one of exact_",
    "train grpo --dataset_name rows.jsonl --beta 0.1 --precompute_ref_log_probs": (
        "--precompute_ref_log_probs needs completions beforehand, and rollouts are not known yet"
    ),
    "train dpo --dataset_name rows.jsonl --optim adamw_8bit": "--optim adamw_8bit needs a GPU; use adamw_torch on cpu",
    "train dpo --dataset_name rows.jsonl --lora_r 2 --lora_target_modules nope": "--lora_target_modules nope: ",
    "train dpo --dataset_name rows.jsonl --adapter_name_or_path ./none": "no adapter could be loaded from './none': ",
}


@pytest.mark.parametrize("words", BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_one_sentence_and_status_1(workspace, capsys, words):
    assert cli.main(words.split()) == 1
    error = capsys.readouterr().err.splitlines()[-1:]
    assert error and error[0].startswith(f"logratio: {BAD[words]}"), error
    assert not (workspace / "runs").exists(), "nothing is left behind"


def test_unknown_options_are_status_2(capsys):
    for words, named in (
        ("train dpo --bta 1", "--bta"),
        ("train sft --beta 1", "--beta"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words.split())
        assert stopped.value.code == 2 and named in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(workspace, capsys):
    assert (
        cli.main(["train", "sft", *SHORT, "--max_steps", "9", "--learning_rate", "1e30", "--max_grad_norm", "0"]) == 1
    )
    error = capsys.readouterr().err
    assert re.search(r"^logratio: step \d: the (loss|gradient) is not finite", error, re.MULTILINE)
    assert not list((workspace / "out").glob("*.safetensors"))


def test_methods_are_named_without_loading_them():
    assert options.METHODS == tuple(LOSSES)


def test_help_lists_commands_and_options(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for entry in entry_points(group=cli.COMMANDS):
        assert f"{entry.name:<15} {entry.load().__doc__.splitlines()[0]}\n" in shown
    assert METHODS in shown
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "dpo", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--beta", "--lora_r", "--dataset_name", "--micro_batch_tokens"))


def test_help_says_which_variants_read_an_option(capsys):
    def shown(*words: str) -> str:
        with pytest.raises(SystemExit):
            cli.main(["train", *words, "--help"])
        return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())

    dpo, grpo = shown("dpo"), shown("grpo")
    assert "--dpop_lambda FLOAT Penalty on a chosen" in dpo and "(default: 50.0; loss_type: dpop)" in dpo
    assert "(default: 0.0; loss_type: cdpo, robust, exo_pair, aot, aot_unpaired)" in dpo
    assert "(default: 0.5; f_divergence_type: alpha_divergence)" in dpo
    assert "--loss_weights {None}|{[FLOAT [FLOAT ...]]} Weight of each loss_type (default: 1). (default: None)" in dpo
    assert "(default: k3; loss_type: all but rloo, real, target_po, a2po; beta: not 0)" in grpo
    assert "luspo too is token-level unless asked" in grpo and "cispo: the cap of the ratio itself (default: 5" in grpo
    assert "for simpo too, whose paper has none: give 0" in shown("cpo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "cpo --loss_type simper --beta 2",
            "beta=2.0 is not read by loss_type simper; leave it out: it is an option of all but simper",
        ),
        ("dpo --beta nan", "beta=nan must be finite"),
        ("kto --desirable_weight -1", "desirable_weight=-1.0 must not be negative"),
        ("sft --seed 4294967296", "--seed must be in [0, 4294967295], got 4294967296"),
        ("sft --learning_rate inf", "--learning_rate must be finite, got inf"),
        ("sft --lora_r 4 --lora_alpha nan", "--lora_alpha must be finite, got nan"),
        ("grpo --reward_weights nan", "--reward_weights must be finite, got (nan,)"),
    ],
)
def test_options_out_of_range_or_unread_are_one_sentence(words, message, capsys):
    assert cli.main(["train", *words.split()]) == 1
    assert capsys.readouterr().err == f"logratio: {message}\n"


def test_options_of_a_loss_are_of_its_own_class():
    assert type(parse_train(["dpo", "--loss_type", "cdpo", "--label_smoothing", "0.1"]).loss) is LOSSES["dpo"]


def test_commands_that_only_an_installed_package_has_are_said_to_be_missing(monkeypatch, capsys):
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    assert cli.main(["plan"]) == 1
    assert capsys.readouterr().err == (
        "logratio: unknown command 'plan', expected one of: train; the others are there once the package is installed "
        "(`pip install -e .`)\n"
    )


def test_user_errors_from_sub_commands_and_interrupts_have_a_status(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    def refused(argv):
        raise UserError("no")

    for raised, status, text in ((interrupted, 130, "logratio: interrupted\n"), (refused, 1, "logratio: no\n")):
        monkeypatch.setattr(cli, "dispatch", raised)
        assert cli.main([]) == status and capsys.readouterr().err == text


def test_what_a_message_quotes_steers_no_terminal(monkeypatch, capsys):
    """Of a reward's error, or of a server's answer."""

    def fails(argv):
        raise UserError("the reward 'x' said \x1b[2Jé\u202e\ud800, \tnaïvely\n日本")

    monkeypatch.setattr(cli, "dispatch", fails)
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == ("logratio: the reward 'x' said \\x1b[2Jé\\u202e\\ud800, \tnaïvely\n日本\n")
