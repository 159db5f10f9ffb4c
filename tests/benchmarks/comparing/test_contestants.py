"""How contestants are written, and what is refused, in which words."""

import re

import pytest

from logratio.benchmarks.comparing.command import CONTEST, parsed
from logratio.benchmarks.comparing.contestants import DECIDED, check_contestants, contestant
from logratio.trainers.errors import UserError

OWN = """
from dataclasses import dataclass
from logratio.losses import DPOLoss

@dataclass(frozen=True, kw_only=True)
class Mine(DPOLoss):
    strength: float = 2.0
"""


def test_a_method_a_variant_options_and_a_name():
    plain, variant, named = (
        contestant(s) for s in ("sft", "dpo:ipo --beta 0.5", "soft=dpo:cdpo --label_smoothing=0.1")
    )
    assert plain.name == "sft" and plain.config().method == "sft"
    assert variant.name == "dpo:ipo --beta 0.5"
    assert (variant.config().loss.loss_type, variant.config().loss.beta) == (("ipo",), 0.5)
    assert named.name == "soft" and named.config().loss.label_smoothing == 0.1


def test_an_option_with_an_equals_sign_is_no_name():
    assert contestant("dpo --beta=0.5").name == "dpo --beta=0.5"


def test_what_is_common_comes_first_and_its_own_goes_before():
    config = contestant("dpo --learning_rate 1e-3").config(["--learning_rate", "1e-5", "--lora_r", "4"])
    assert config.train.learning_rate == 1e-3 and config.model.lora_r == 4


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "compared_own.py").write_text(OWN)
    mine = contestant("compared_own:Mine --strength 3")
    assert mine.config(["--beta", "0.2"]).loss.strength == 3 and mine.config(["--beta", "0.2"]).loss.beta == 0.2


def test_a_file_has_contestants_and_options(tmp_path):
    path = tmp_path / "contest.yaml"
    path.write_text("contestants:\n  a: dpo\n  b: dpo:ipo --beta 2\nseeds: 4\nlora_r: 4\nfresh: true\nmax_steps: 5\n")
    those, options, common = parsed([str(path), "sft", "--seeds", "5"])
    assert [one.name for one in those] == ["a", "b", "sft"]
    assert (options.seeds, options.fresh, common, str(options.budget)) == (5, True, ["--lora_r", "4"], "5 steps")
    path.write_text("contestants: [dpo, sft]\ngradient_checkpointing: false\nlora_r: null\nreward_funcs: [a, b]\n")
    _, options, common = parsed([str(path)])
    assert (options.reward_funcs, common) == (("a", "b"), ["--no-gradient_checkpointing"])
    path.write_text("contestants: [dpo, 'x=sft']\n")
    assert [one.name for one in parsed([str(path)])[0]] == ["dpo", "x"]


def test_without_contestants_five_of_the_embedded_task():
    those, options, common = parsed([])
    assert [one.spec for one in those] == list(CONTEST)
    assert [one.name for one in those] == ["sft", "dpo", "ipo", "orpo", "grpo"]
    assert options.budget.unit == "tokens" and common == []
    assert parsed(["--dataset_name", "mine.jsonl", "--max_steps", "3"])[0] == []


REFUSED = [
    (["dpo"], "a comparison needs two contestants at least, got 1"),
    (["dpo", "dpo"], "two contestants are called 'dpo': give one a name of its own, as in 'b=dpo'"),
    (["dpo", "ppo"], "contestant 'ppo': 'ppo' is neither a method (cpo, dpo, grpo, "),
    (["dpo", ""], "contestant '' is empty: write a method with its options, or module:Class"),
    (["dpo", "dpo:ipo --loss_type hinge"], "contestant 'dpo:ipo --loss_type hinge' has the loss_type twice: dpo:ipo"),
    (["dpo", "dpo:ipo --loss_type=hinge"], "contestant 'dpo:ipo --loss_type=hinge' has the loss_type twice: dpo:ipo"),
    (["dpo", "dpo --seed 3"], "contestant 'dpo --seed 3': --seed is decided by --seeds; leave it out"),
    (["dpo", "dpo --no-shuffle"], "contestant 'dpo --no-shuffle': --shuffle is decided by the order of each seed"),
    (["dpo", "dpo '"], 'contestant "dpo \'" cannot be read: No closing quotation'),
    (
        ["dpo", "nowhere:Mine"],
        "--loss='nowhere:Mine': there is no module 'nowhere' here, on the PYTHONPATH",
    ),
]


@pytest.mark.parametrize(("specs", "message"), REFUSED)
def test_what_is_no_contestant_is_said(specs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_contestants([contestant(spec) for spec in specs])


def test_what_all_share_is_no_contestants_own():
    for name in ("model_name_or_path", "dataset_name", "max_steps", "output_dir", "reward_funcs", "eval_size"):
        with pytest.raises(
            UserError, match=f"--{name} is decided by --{DECIDED[name].split()[0][2:]}.*; leave it out$"
        ):
            contestant(f"dpo --{name.replace('_', '-')}=3")


OPTIONS = [
    (["--threads", "0"], "--threads must be at least 1, got 0"),
    (["--max_completion_length", "0"], "--max_completion_length must be at least 1, got 0"),
    (["--seeds", "1"], "--seeds must be at least 2, got 1: one says nothing of others"),
    (["--max_steps", "3", "--max_tokens", "5"], "--max_steps and --max_tokens are two budgets; give one of them"),
    (["--max_seconds", "0"], "--max_seconds must be positive, got 0.0"),
    (["--dataset_name", "mine.jsonl"], "how long is each to train? Give --max_steps, --max_tokens or --max_seconds"),
    (["--eval_steps", "3"], "contestant 'common to all': --eval_steps is decided by --checks of all; leave it out"),
]


@pytest.mark.parametrize(("words", "message"), OPTIONS)
def test_options_that_do_not_fit_are_said(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        _ = parsed(["sft", "dpo", *words])[1].budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: 3\n", " names no contestants: list them under `contestants`"),
        ("contestants: {a: 3}\n", ": a contestant is written as text, as on the command line, got int 3"),
    ],
)
def test_a_file_without_contestants_is_said(tmp_path, text, message):
    (tmp_path / "contest.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'contest.yaml'}{message}")):
        parsed([str(tmp_path / "contest.yaml")])
