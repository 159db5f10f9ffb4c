"""Other projects' functions are held to our laws: mistakes are named, verdicts need reasons, files load alone."""

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch

from logratio.benchmarks.projects import of_ours, of_trl, trl_runs
from logratio.benchmarks.projects.examples import batch_of, examples
from logratio.benchmarks.projects.installed import PROJECTS, StandIn, module_of
from logratio.benchmarks.projects.measured import SUBJECTS, hold_loss, measure_subject, rounding, seen, shortened
from logratio.benchmarks.projects.reasons import project_problems
from logratio.benchmarks.projects.subjects import FLOAT32, GIVEN_SUMS, OURS, of, pairs, peer, rollouts, share
from logratio.benchmarks.projects.text import project_tables
from logratio.losses import DPOLoss, GRPOLoss, Kind
from logratio.reference._law_runs import arguments
from logratio.reference.laws import LAWS, check_advantage, check_loss

STORED = json.loads((Path(__file__).parents[2] / "docs" / "atlas.json").read_text())


# ---------------------------------------------------------------------------------------------- one mistake, one law
def policy_gradient(policy, advantages, old, totals):
    """-A log p, right in every respect."""
    return -(advantages[:, None] * policy.logps).sum() / max(totals.num_tokens, 1)


MISTAKES = {
    "mask": lambda p, a, old, t: -(a[:, None] * p.per_token_logps * p.completion_mask).sum() / max(t.num_tokens, 1),
    "padding": lambda p, a, old, t: policy_gradient(p, a, old, t) / p.completion_mask.shape[1],
    "split": lambda p, a, old, t: -share(p, t) * (a[:, None] * p.logps).sum() / max(int(p.completion_mask.sum()), 1),
    "permutation": lambda p, a, old, t: policy_gradient(p, a.cumsum(0), old, t),
    "nothing_scored": lambda p, a, old, t: -(a[:, None] * p.logps).sum() / torch.tensor(t.num_tokens),
    "finite": lambda p, a, old, t: -(a[:, None] * p.masked(p.logps.neg().exp())).sum() / max(t.num_tokens, 1),
    "only_the_policy_learns": lambda p, a, old, t: policy_gradient(p, a, old, t) + 0 * t.num_tokens + _sum(old),
    "direction": lambda p, a, old, t: -policy_gradient(p, a, old, t),
    "gradient": lambda p, a, old, t: policy_gradient(p, a, old, t) + policy_gradient(p, a, old, t).detach(),
    "low_precision": lambda p, a, old, t: (
        -(a[:, None] * p.per_token_logps.where(p.completion_mask, 0)).sum() / max(t.num_tokens, 1)
    ),
}


def _sum(old):
    return 0.0 if old is None else 1e-3 * old.logps.mean(-1).tanh().sum() / max(len(old.logps), 1)


@pytest.mark.parametrize("law", MISTAKES)
def test_a_mistake_is_found_and_named(law):
    row = measure_subject(of("X", "loss", law, rollouts(MISTAKES[law])))
    assert law in row["broken"], row


def test_a_right_loss_keeps_them_all():
    checked = rollouts(policy_gradient)
    row = measure_subject(of("X", "loss", "right", checked, not_asked={"no_broadcast": "", "without_old": "-"}))
    assert {*row["broken"]} <= {"no_broadcast"}, row["broken"]
    assert {*row["not_asked"]} == {"contract", "without_old"}


def test_ours_keep_them_on_the_fixed_examples():
    for loss in (GRPOLoss(), DPOLoss()):
        assert measure_subject(of("ours", "loss", "x", loss))["broken"] == {}


def test_the_examples_are_the_same_every_time():
    (first, *_), (again, *_) = (list(examples("split", "grouped")) for _ in range(2))
    assert first["deal"] == again["deal"]
    assert torch.equal(first["batch"].tokens["policy"]["completion"], again["batch"].tokens["policy"]["completion"])
    with pytest.raises(AssertionError, match="^split"):
        hold_loss("split", rollouts(MISTAKES["split"]))


@pytest.mark.parametrize("law", sorted(LAWS.keys() - OURS.keys()))
def test_every_law_is_asked_with_what_its_equation_speaks_of(law):
    for kind in ("grouped", "paired"):
        for example in examples(law, kind):
            inspect.signature(LAWS[law].check).bind(None, **example)


def test_what_cannot_be_asked_says_why():
    loss = pairs(lambda a, b, ref_a, ref_b: -torch.nn.functional.logsigmoid(a - b - ref_a + ref_b).mean())
    row = measure_subject(of("X", "loss", "dpo", loss, not_asked=GIVEN_SUMS))
    assert {*GIVEN_SUMS} <= {*row["not_asked"]} and {"split", "permutation", "finite"} <= {*row["held"]}
    nll = peer(Kind.SEQUENCE, lambda policy, totals: -policy.sums.sum() / max(totals.num_tokens, 1))
    assert measure_subject(of("X", "loss", "nll", nll))["broken"] == {}


def test_an_error_is_a_verdict():
    def fails(rewards):
        raise RuntimeError("stack expects a non-empty list\nmore")

    row = measure_subject(of("X", "advantage", "fails", fails, claims=FLOAT32))
    assert row["held"] == [] and set(row["broken"].values()) == {"RuntimeError: stack expects a non-empty list"}
    uneven = {"scale": None, **FLOAT32}
    row = measure_subject(of("X", "advantage", "mean", lambda rewards: rewards - rewards.mean(1, True), claims=uneven))
    assert row["not_asked"] == {"scaled": "nothing is claimed of the scale"} and "missing" in row["broken"]


def test_what_is_seen_becomes_one_line():
    assert (
        shortened("the gradient of x is [[1, nan]], expected [[1, 2]]")
        == "the gradient of x is not finite at 1 of 2 tokens"
    )
    assert shortened("the gradient of x is [[3.0, 0.0]], expected [[2.0, 0.0]]") == "the gradient of x is off by 50 %"
    assert shortened("old of x got the gradient tensor([[1.0") == "old of x got the gradient"
    assert shortened("the loss is 0.12345678901") == "the loss is 0.123457"
    assert len(shortened("word " * 100)) < 170
    assert rounding("the loss is 1.0000001, expected 1") and not rounding("the loss is 1.001, expected 1")
    assert not rounding("the loss is nan, expected 1")
    assert rounding("the gradient of x is [[1.0000001]], expected [[1.0]]")
    assert not any(rounding(f"the gradient of x is [[{x}]], expected [[1.0]]") for x in (1.001, "nan"))


# ---------------------------------------------------------------------------------------------- TRL, run
def measured(name):
    (subject,) = [s for s in of_trl.subjects() if s.name == name]
    return measure_subject(subject)


def test_trls_token_mean_is_broken_by_a_split_and_dapo_is_not():
    assert "split" in measured("GRPO bnpo")["broken"]
    assert "split" in measured("GRPO dapo")["held"]


def test_trls_epoch_leaves_out_what_fills_no_window():
    assert trl_runs.last_prompts() == {"prompts": 5, "seen": 4}


def test_merging_for_the_sampler_moves_the_base_in_bfloat16(monkeypatch):
    monkeypatch.setattr(trl_runs, "SYNCS", 2)
    found = trl_runs.merged()
    assert found["bfloat16"]["changed"] > 100 and found["bfloat16"]["drift"] > 1e4 * found["float32"]["drift"]


@pytest.mark.slow
def test_continuous_batching_leaves_the_adapters_in_bfloat16():
    found = trl_runs.cast()
    assert found["with"]["dtype"] == "bfloat16" and found["without"]["dtype"] == "float32"
    assert found["with"]["moved"] < 0.1 * found["without"]["moved"]


@pytest.mark.slow
@pytest.mark.parametrize("project", ["ours", *PROJECTS])
def test_what_holds_on_the_fixed_examples_holds_on_drawn_ones(project):
    """Drawn batches may score nothing at all, or overflow: a loss that is NaN there by `nothing_scored`, `mask` or
    `finite` is NaN in every law."""
    if project != "ours" and importlib.util.find_spec(PROJECTS[project][0].replace("-", "_")) is None:
        pytest.skip(f"{project} is not installed")
    for subject in (subject for subject in SUBJECTS[project]() if subject.what == "loss"):
        row = measure_subject(subject)
        with subject.opened() as loss:
            for law in row["held"]:
                said = seen(lambda loss=loss, law=law: check_loss(loss, laws=[law], max_examples=20))
                known = {"nothing_scored", "mask", "finite"} & {*row["broken"]} and ("nan" in said or "inf" in said)
                assert known or not said, (subject.name, law, said)


# ---------------------------------------------------------------------------------------------- files, alone
@pytest.fixture
def package(tmp_path, monkeypatch):
    """One whose `__init__` fails, as one does that needs a cluster, and a file in it that imports what is not there."""
    inner = tmp_path / "clustered" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner):
        (folder / "__init__.py").write_text("raise RuntimeError('no cluster')")
    (inner / "losses.py").write_text(
        "from absent_cluster.deep import Queue\nimport absent_cluster\n\n"
        "def loss(x: 'Queue | None') -> float:\n    return 2 * x\n\ndef used():\n    return Queue(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "clustered.inner.losses"
    for name in [name for name in sys.modules if name.startswith("clustered")]:
        del sys.modules[name]


def test_a_file_is_imported_without_the_packages_around_it(package):
    module = module_of(package, absent=("absent_cluster",))
    assert module.loss(3.0) == 6.0
    assert not any(isinstance(x, StandIn) for x in sys.modules.values())
    with pytest.raises(TypeError):
        module.used()  # a stand-in computes nothing


def test_what_is_not_stood_in_for_is_missed(package):
    with pytest.raises(ModuleNotFoundError, match="absent_cluster"):
        module_of(package)
    with pytest.raises(ModuleNotFoundError, match=r"nowhere is not installed: pip install --no-deps verl==0.9.1"):
        module_of("nowhere.losses")


# ---------------------------------------------------------------------------------------------- reasons, the page
def test_every_broken_law_has_its_reason_and_every_reason_its_law():
    rows = STORED["projects"]["rows"]
    assert {*STORED["projects"]["versions"]} == {*PROJECTS} and project_problems(rows) == []
    stranger = {
        "project": "X",
        "what": "head",
        "name": "y",
        "held": [],
        "broken": {"definition": "seen"},
        "not_asked": {},
    }
    assert project_problems([*rows, stranger])[0] == "X, y: definition is broken without a reason (seen)"
    ours = stranger | {"project": "ours", "what": "loss", "broken": {"mask": "seen"}}
    assert "ours, y: mask is broken (seen)" in project_problems([*rows, ours])
    fewer = [row | {"broken": {}} if row["project"] == "verl" else row for row in rows]
    assert "verl, geo_mean: split is kept, where a reason says that it is not" in project_problems(fewer)


def test_the_tables_count_and_name_what_is_not_installed():
    rows = [
        {
            "project": "TRL",
            "what": "loss",
            "name": name,
            "held": held,
            "broken": broken,
            "not_asked": {"mask": "why not"},
        }
        for name, held, broken in (("a", ["split"], {}), ("b", [], {"split": "the loss is 2, expected 1"}))
    ]
    text = project_tables({"versions": {"TRL": "1.16.0"}, "rows": rows})
    assert "| `split` | **1 of 2** |" in text and "Not installed: Liger, verl, OpenRLHF, torchtune." in text
    assert "| TRL | `split` | b | the loss is 2, expected 1 |" in text and "- `mask`: why not." in text


def test_float32_is_what_makes_equal_rewards_teach():
    """The textbook's (R - mean) / (std + 1e-6) on equal rewards, as projects have it: rounding over rounding."""

    def textbook(rewards):
        return (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-6)

    with pytest.raises(AssertionError, match="^equal_rewards"):
        check_advantage(textbook, laws=["equal_rewards"], dtype=torch.float32)


def test_every_loss_of_ours_can_be_asked_on_the_fixed_batches():
    """A type that needs more of a batch than they have would end the measurement."""
    asked = 0
    for subject in of_ours.subjects():
        if subject.what == "loss":
            with subject.opened() as loss:
                assert loss(**arguments(loss, batch_of(loss.kind))).loss.isfinite(), subject.name
            asked += 1
    assert asked > 60
