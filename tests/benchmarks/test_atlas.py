"""The atlas measures what it says: verdicts need their reasons, splits move the peers and not ours, faults are seen."""

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from logratio.benchmarks import atlas
from logratio.benchmarks.peers import peers
from logratio.benchmarks.peers.compared import ATLAS, Compared, same
from logratio.benchmarks.peers.reasons import REASONS
from logratio.benchmarks.peers.truths import difference
from logratio.benchmarks.projects.faults import (
    FAULTS,
    Fault,
    Outcome,
    Rollout,
    guarded,
    measure_fault,
    pairs,
    rollout,
    sound,
)
from logratio.trainers.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"
PAGE = ["atlas-errors.png", "atlas-splits.png", "atlas.json", "atlas.md"]
RUNS: dict[str, Any] = {
    "cast": {name: {"dtype": "x", "moved": 1, "weights": 2} for name in ("with", "without")},
    "merged": dict.fromkeys(("bfloat16", "float32"), {"changed": 1, "weights": 2, "drift": 0.5, "adapters": 1.0}),
    "last_prompts": {"prompts": 5, "seen": 4},
}
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel: pip install -e '.[peers]'"
)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """One variant that the split moves in TRL, one that it does not, one that differs, one that TRL refuses."""
    smoothed = {"loss_type": "cdpo", "label_smoothing": 0.1}
    asked = ("dpo", smoothed | {"loss_type": "sigmoid"})
    cases = [same("dpo", loss_type="aot"), same("dpo", loss_type="hinge")]
    cases.append(Compared("dpo", smoothed, asked, label="sigmoid with e = 0.1"))
    cases.append(same("dpo", loss_type=("sigmoid", "sft"), use_weighting=True))
    return {"faults": [], "laws": []} | atlas.measure(["variants"], cases)


def test_equal_different_and_refused(measured: dict) -> None:
    aot, hinge, smoothed, weighted = measured["variants"]
    assert aot["verdict"] == hinge["verdict"] == "equal" and aot["reason"] == ""
    assert max(aot["loss_rel_err"], aot["grad_rel_err"]) < 1e-5
    assert smoothed["verdict"] == "different" and smoothed["grad_rel_err"] > 0.05
    assert smoothed["reason"].startswith("label_smoothing is taken with `sigmoid` and ignored")
    assert weighted["verdict"] == "refused" and weighted["error"].startswith("RuntimeError")
    assert atlas.problems(measured) == []


def test_a_split_moves_trls_sorted_margins_and_not_ours(measured: dict) -> None:
    aot, hinge, *_ = measured["splits"]
    assert aot["trl"] > 0.01 and aot["ours"] < 1e-5 and "Sorted" in aot["reasons"]["trl"]
    assert hinge["trl"] < 1e-5 and hinge["ours"] < 1e-5 and hinge["reasons"] == {}


@needs_liger
def test_liger_is_measured_too() -> None:
    rows, split = atlas.measure_one(same("orpo", ("ORPO", {"beta": 1.0, "nll_target": True}), beta=1.0))
    assert [row["verdict"] for row in rows] == ["equal", "equal"]
    assert split["liger"] == pytest.approx(split["trl"]) and split["trl"] > 0.01 > 1e-5 > split["ours"]
    rows, _ = atlas.measure_one(same("orpo", ("ORPO", {})))
    assert [row["verdict"] for row in rows] == ["equal", "different"]


@needs_liger
def test_a_rollouts_tokens_are_counted_over_the_step_if_liger_is_told() -> None:
    whole = peers.ligers("GRPO", {"beta": 0.0}).grads
    told = {"beta": 0.0, "num_items_in_batch": True}
    assert difference(peers.ligers("GRPO", told, 4).grads, whole) < 1e-5
    assert difference(peers.ligers("GRPO", {"beta": 0.0}, 4).grads, whole) > 0.01


# ---------------------------------------------------------------------------------------------- what is an error
def changed(measured: dict, table: str, row: int, **values: Any) -> dict:
    out = copy.deepcopy(measured)
    out[table][row] |= values
    return out


@pytest.mark.parametrize(
    "table, row, values, message",
    [
        (
            "variants",
            0,
            {"verdict": "different", "grad_rel_err": 0.1},
            "trl, dpo aot: different without a reason (0.1)",
        ),
        ("variants", 1, {"verdict": "refused", "error": "E"}, "trl, dpo hinge: refused without a reason (E)"),
        ("variants", 2, {"verdict": "equal"}, "equal, where a reason says that it is not"),
        ("variants", 2, {"verdict": "refused"}, "refused, which is not what its reason says"),
        ("variants", 2, {"loss_rel_err": 0.0, "grad_rel_err": 5e-4}, "neither equal nor clearly different (0.0005)"),
        ("variants", 3, {"verdict": "different", "loss_rel_err": 1.0, "grad_rel_err": 1.0}, "not what its reason says"),
        ("splits", 1, {"ours": 0.01}, "ours, dpo hinge: a split changes the gradient by 0.01"),
        ("splits", 1, {"trl": 0.01}, "trl, dpo hinge: a split changes it by 0.01, reason known: False"),
        ("splits", 0, {"trl": 1e-7}, "trl, dpo aot: a split changes it by 1e-07, reason known: True"),
    ],
)
def test_a_verdict_and_its_reason_must_fit(measured: dict, table: str, row: int, values: dict, message: str) -> None:
    (found,) = atlas.problems(changed(measured, table, row, **values))
    assert message in found


def test_a_reason_for_a_row_that_is_not_there_is_an_error(measured: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "REASONS", {("trl", "dpo aot"): "x", ("trl", "dpo nothing"): "y"})
    monkeypatch.setattr(atlas, "SPLIT_REASONS", {})
    monkeypatch.setattr(atlas, "LAW_REASONS", {("TRL cpo", "uneven"): "z"})
    assert atlas.stale(measured) == ["trl, dpo nothing: a reason for no row"]


def test_a_wrong_reason_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(atlas, "installed", lambda name: peers.LIGER_VERSION)
    monkeypatch.setattr(atlas, "ATLAS", [same("sft", loss_type="nll")])
    monkeypatch.setattr(atlas, "FAULTS", [])
    monkeypatch.setattr(atlas, "TRAINERS", {})
    monkeypatch.setattr(atlas, "measure_projects", lambda told: {"versions": {}, "rows": []})
    monkeypatch.setattr(atlas, "measure_runs", lambda: RUNS)
    monkeypatch.setattr(atlas, "LAW_REASONS", {})
    monkeypatch.setattr(atlas, "REASONS", {})
    monkeypatch.setattr(atlas, "SPLIT_REASONS", {})
    assert atlas.main(["--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == PAGE
    monkeypatch.setattr(atlas, "REASONS", {("trl", "sft nll"): "TRL differs."})
    assert atlas.main(["--out", str(tmp_path / "not")]) == 1
    assert "error: trl, sft nll: equal, where a reason says that it is not" in capsys.readouterr().out
    assert not (tmp_path / "not").exists()


def test_a_part_is_measured_again_and_the_others_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(atlas, "installed", lambda name: peers.LIGER_VERSION)
    stored = json.loads((DOCS / "atlas.json").read_text()) | {"versions": peers.versions()}
    (tmp_path / "atlas.json").write_text(json.dumps(stored))
    monkeypatch.setattr(atlas, "measure_runs", lambda: RUNS)
    assert atlas.main(["--part", "runs", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "atlas.json").read_text()) == stored | {"runs": RUNS}
    (tmp_path / "atlas.json").write_text(json.dumps(stored | {"versions": {"trl": "1.0"}}))
    with pytest.raises(UserError, match=r"atlas.json is of \{'trl': '1.0'\}, here is .*: measure all parts"):
        atlas.main(["--part", "runs", "--out", str(tmp_path)])
    for words in (["--part", "typo"], ["--part", "runs", "--method", "dpo"]):
        with pytest.raises(UserError, match="expected one of variants, faults, laws, projects, runs"):
            atlas.main(words)


def test_the_command_needs_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "installed", lambda name: None)
    with pytest.raises(UserError, match=r"needs liger-kernel==0.8.5, found None: pip install"):
        atlas.main([])
    for method in ("ppo", "listwise"):
        said = f"^unknown method '{method}', expected one of: sft, dpo, kto, orpo, cpo, tpo, grpo$"
        with pytest.raises(UserError, match=said):
            atlas.main(["--method", method])


def test_the_command_needs_matplotlib_before_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "installed", lambda name: peers.LIGER_VERSION)
    monkeypatch.setattr(atlas, "measure", lambda *_: pytest.fail("it has measured"))
    for name in ("matplotlib", "logratio.benchmarks.reporting.atlas_plots"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"plots need matplotlib \(.*\): pip install -e '.\[bench\]' in the checkout"):
        atlas.main([])


# ---------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_ours_is_sound_where_a_peer_is_not(fault: Fault) -> None:
    out = guarded(fault.ours)
    assert sound(out, fault.exact), out


BENIGN = {
    "dpo": ((0.5, -0.3), {"loss_type": "discopop"}),
    "cpo": ((-0.7, -1.1), {"loss_type": "alphapo", "alpha": 0.25}),
    "orpo": ((-0.7, -1.1), {}),
    "grpo": ((Rollout([-1.0, -2.0], [-1.3, -1.8], [-1.1, -1.9], advantage=-0.7),), {"loss_type": "sapo", "beta": 0.3}),
}


@pytest.mark.parametrize(
    "peer, method",
    [("trl", method) for method in BENIGN]
    + [pytest.param("liger", method, marks=needs_liger) for method in ("dpo", "orpo", "grpo")],
)
def test_on_ordinary_inputs_a_peer_gives_what_we_do(peer: str, method: str) -> None:
    """So that a fault is the peer's, and not of the way in which it is run."""
    inputs, options = BENIGN[method]
    runs = rollout(*inputs, **options) if method == "grpo" else pairs(method, *inputs, liger=peer == "liger", **options)
    expected, found = runs["ours"](), runs[peer]()
    assert found.error == "" and found[:2] == pytest.approx(expected[:2], rel=1e-5) and expected.value != 0


def test_trls_faults_are_seen_in_its_own_trainers() -> None:
    named = [
        f for f in FAULTS if f.name.startswith(("DPO discopop", "ORPO, a_w = 0", "GRPO with beta 1, log p_ref - l"))
    ]
    for row in (measure_fault(Fault(f.name, f.cause, f.exact, f.ours, f.trl)) for f in named):
        assert not row["trl"]["sound"] and row["ours"]["sound"], row


@needs_liger
def test_ligers_faults_are_seen() -> None:
    rows = [measure_fault(Fault(f.name, f.cause, f.exact, f.ours, liger=f.liger)) for f in FAULTS if f.liger]
    assert len(rows) > 5 and not any(row["liger"]["sound"] for row in rows)


def test_a_fault_that_is_gone_and_one_of_ours_are_errors(measured: dict) -> None:
    fault = Fault("F", "why", 1.0, ours=lambda: Outcome(2.0, 0.0), trl=lambda: Outcome(1.0, 0.0))
    found = atlas.problems(measured | {"faults": [measure_fault(fault)]})
    assert found == ["trl, F: no fault was seen (1, gradient 0)", "ours, F: 2, gradient 0"]
    assert not sound(Outcome(float("nan"), 0.0), None) and not sound(Outcome(1.0, float("inf")), None)
    assert not sound(Outcome(error="RuntimeError"), None) and sound(Outcome(1.0005, 0.0), 1.0)


# ---------------------------------------------------------------------------------------------- the page
def test_the_page_is_made_from_the_measurements_of_every_variant() -> None:
    """Run `logratio atlas` after a change of the variants, the reasons or the page."""
    stored = json.loads((DOCS / "atlas.json").read_text())
    assert (DOCS / "atlas.md").read_text() == atlas.page(stored)
    assert atlas.problems(stored) == atlas.stale(stored) == []
    asked = {(peer, case.name) for case in ATLAS for peer in ("trl", "liger") if getattr(case, peer) is not None}
    assert {(row["peer"], row["variant"]) for row in stored["variants"]} == asked
    assert {row["variant"]: row["reason"] for row in stored["variants"] if row["reason"]}.keys() == {
        name for _, name in REASONS
    }
    assert [row["fault"] for row in stored["faults"]] == [fault.name for fault in FAULTS]
    assert stored["versions"]["liger-kernel"] == peers.LIGER_VERSION
