"""`logratio verify` holds for every loss, writes what it promises, and fails where a loss is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config

from logratio.benchmarks.peers.case import Case
from logratio.benchmarks.peers.cases import CASES
from logratio.benchmarks.peers.sides import trls
from logratio.benchmarks.peers.truths import Gradient, Subject
from logratio.benchmarks.verify import Errors, line, main, verify, worst
from logratio.losses import CPO_TYPES, DPO_TYPES, GRPO_TYPES, KTO_TYPES, LISTWISE_TYPES, LOSSES, SFT_TYPES, TPO_TYPES
from logratio.reference import oracle
from logratio.reference.oracle import SequenceLogps
from logratio.trainers.errors import UserError

from .._cases import enough, traits

TABLES = {
    "sft": SFT_TYPES,
    "dpo": DPO_TYPES,
    "kto": KTO_TYPES,
    "cpo": CPO_TYPES,
    "tpo": TPO_TYPES,
    "orpo": {None: None},
    "listwise": LISTWISE_TYPES,
    "grpo": GRPO_TYPES,
}


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.method} {case.name}") for case in cases])


FIRST = {(case.method, case.options.get("loss_type")): case for case in reversed(CASES) if case.trl}
FIRST |= {("sampled", case.options.get("sampling_correction")): case for case in CASES if case.trl and case.sampled}
"""One case of every loss type and correction that TRL has; the command compares all of them."""


ENOUGH, PAIRS = enough(CASES, together=1), enough(CASES, together=2)
ALONE = [case for case in ENOUGH if not any(case is first for first in FIRST.values())]


@named(ALONE)
def test_every_loss_type_and_option_is_the_oracles(case: Case) -> None:
    (row,) = verify([case], seed=1, truths=["oracle"], architectures=[LlamaConfig])
    assert row["ok"], row


@pytest.mark.slow
@named([case for case in CASES if case not in ENOUGH])
def test_every_other_case_is_the_oracles(case: Case) -> None:
    (row,) = verify([case], seed=1, truths=["oracle"], architectures=[LlamaConfig])
    assert row["ok"], row


@named(list(FIRST.values()))
def test_every_loss_type_is_trls_and_the_oracles(case: Case) -> None:
    rows = list(verify([case], seed=1, truths=["trl", "oracle"], architectures=[Qwen2Config]))
    assert len(rows) == 2 and all(row["ok"] for row in rows), rows


def test_every_loss_and_loss_type_is_a_case() -> None:
    assert set(TABLES) == set(LOSSES) == {case.method for case in CASES}
    for method, table in TABLES.items():
        types = [case.options.get("loss_type") for case in CASES if case.method == method]
        assert {name for name in types if not isinstance(name, tuple)} == set(table)


def test_no_loss_type_and_no_option_is_left_to_the_slow_tests() -> None:
    """And no two of them, where two are asked for."""
    assert {str(t) for case in ENOUGH for t in traits(case)} == {str(t) for case in CASES for t in traits(case)}
    pairs = [{str((a, b)) for case in some for a in traits(case) for b in traits(case)} for some in (PAIRS, CASES)]
    assert pairs[0] == pairs[1] and len(ENOUGH) < len(PAIRS) < len(CASES)
    assert all(case in ENOUGH for case in CASES if len(traits(case)) == 1), "and each loss type that is one alone"


def test_cases_have_names_of_their_own() -> None:
    assert len({(case.method, case.name) for case in CASES}) == len(CASES)


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logratio.benchmarks.verify.verify", lambda *_: iter(()))
    for place, why in ((tmp_path, "Is a directory"), (Path(__file__) / "x.json", "File exists|Not a directory")):
        with pytest.raises(UserError, match=f"^{place} could not be written: ({why}); choose another --json$"):
            main(["--json", str(place)])
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob(".*partial"))
    assert main(["--json", str(tmp_path / "new" / "rows.json")]) == 0 and (tmp_path / "new" / "rows.json").exists()


def test_a_wrong_loss_is_found_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = DPO_TYPES["hinge"]
    wrong = right._replace(formula=lambda r, loss: right.formula(r, loss) * 1.0001)
    monkeypatch.setitem(DPO_TYPES, "hinge", wrong)
    plain = [c for c in CASES if c.method == "dpo" and c.options in ({"loss_type": "hinge"}, {"loss_type": "ipo"})]
    refused = next(c for c in CASES if c.differs)
    ours_alone = next(c for c in CASES if c.method == "dpo" and c.trl is None)
    monkeypatch.setattr("logratio.benchmarks.verify.CASES", [*plain, refused, ours_alone])
    file = tmp_path / "rows.json"
    assert main(["--method", "dpo", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert f"not compared with TRL: dpo {refused.name}: {refused.differs}" in out
    assert "1 of 4 cases are of losses or options that TRL has not" in out
    rows = json.loads(file.read_text())
    keys = ["method", "variant", "against", "dtype"]
    errors = ("{}_rel_err", "our_{}_err", "trl_{}_err", "rounding_{}_err")
    keys += [key.format(part) for part in ("loss", "grad") for key in errors]
    assert [list(row) for row in rows] == [[*keys, "ok"]] * 6
    assert all((row["our_grad_err"] is None) == (row["against"] == "oracle") for row in rows)
    assert [(row["variant"], row["against"], row["ok"]) for row in rows] == [
        ("hinge", "trl", False),
        ("hinge", "oracle", False),
        ("ipo", "trl", True),
        ("ipo", "oracle", True),
        (refused.name, "oracle", "hinge" not in refused.name),
        (ours_alone.name, "oracle", True),
    ]
    assert f"{sum(row['ok'] for row in rows)} of 6 within bounds" in out
    assert "out of bounds: dpo hinge against trl" in out
    assert all(line(row) in out for row in rows)


@pytest.mark.parametrize(
    "errors, within",
    [
        (Errors(9e-6, 9e-6, 0.0), True),  # within the plain bound
        (Errors(1.9e-5, 1.2e-5, 0.7e-5), True),  # what rounding did to both
        (Errors(1.9e-5, 1.5e-5, 0.7e-5), True),  # 2 x 0.7e-5 + 1e-6, just
        (Errors(1.9e-5, 1.6e-5, 0.7e-5), False),  # ours is further off than rounding explains
        (Errors(1.1e-5, 1.1e-5, 1e-7), False),
        (Errors(9.9e-5, 1e-6, 9.9e-5), True),
        (Errors(2.2e-5, 1.9e-5, 0.8e-5, rounding=1.9e-5), True),  # TRL's was exact by luck
        (Errors(2.2e-5, 1.9e-5, 0.8e-5, rounding=1.7e-5), False),
        (Errors(1.2e-4, 1.1e-4, 1e-5, rounding=1e-3), False),  # so much is rounded nowhere
        (Errors(1e-3, 1e-6, 1e-3), False),  # TRL's is another formula
        (Errors(2e-3, 1e-3, 1e-3), False),
        (Errors(float("nan"), float("nan"), 1e-6), False),
        (Errors(1e-3, 1e-6, float("nan")), False),
        (Errors(1.1e-5), False),  # nothing to measure by
    ],
)
def test_what_is_within_bounds(errors: Errors, within: bool) -> None:
    assert errors.within(1e-5) is within


def test_the_row_shows_the_model_that_is_out_of_bounds() -> None:
    rounded, wrong = Errors(3e-5, 2e-5, 1e-5), Errors(2e-5, 2e-5, 1e-6)
    assert worst([rounded, wrong], 1e-5) == worst([wrong, rounded], 1e-5) == wrong
    assert worst([Errors(1e-6), Errors(2e-6)], 1e-5) == Errors(2e-6)


@pytest.mark.parametrize("factor, ok", [(1 + 3e-5, True), (1.001, False)])
def test_a_formula_of_trls_that_differs_is_out_of_bounds(
    factor: float, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FIRST["dpo", "sigmoid"]

    def other(*args: object) -> Gradient:
        theirs = trls(*args)  # type: ignore[arg-type]
        return replace(theirs, grads={name: grad * factor for name, grad in theirs.grads.items()})

    monkeypatch.setattr("logratio.benchmarks.verify.trls", other)
    (row,) = verify([case], seed=1, truths=["trl"], architectures=[LlamaConfig])
    assert row["grad_rel_err"] > 1e-5 and row["ok"] is ok
    assert row["trl_grad_err"] == pytest.approx(factor - 1, rel=0.2) and row["our_grad_err"] < 1e-5


def test_rounding_that_a_loss_enlarges_does_not_hide_a_wrong_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiscoPOP's gradient is as ill-conditioned as any here: it is held to what rounding explains, and no more."""
    case = FIRST["dpo", "discopop"]
    (row,) = verify([case], seed=0, truths=["trl"], architectures=[LlamaConfig])
    assert row["ok"]
    right = DPO_TYPES["discopop"]
    wrong = right._replace(formula=lambda r, loss: right.formula(r, loss) * 1.0003)
    monkeypatch.setitem(DPO_TYPES, "discopop", wrong)
    (row,) = verify([case], seed=0, truths=["trl"], architectures=[LlamaConfig])
    assert not row["ok"] and 1e-6 < row["rounding_grad_err"] < 1e-4 < row["our_grad_err"] < 4e-4


def test_what_is_rounded_is_exact_again_afterwards() -> None:
    subject = Subject(LlamaConfig, 0)
    examples = subject.examples(FIRST["dpo", "sigmoid"])

    def sums() -> list[float]:
        passes = [x.completion for x in subject.policy_passes(examples, 0)] + subject.reference_passes(examples, 1)
        return [x.sum().item() for x in passes]

    exact = sums()
    with subject.rounded(0):
        one = sums()
    with subject.rounded(1):
        other = sums()
    assert sums() == exact
    off = [[abs(a / b - 1) for a, b in zip(x, exact, strict=True)] for x in (one, other)]
    assert off[0] == pytest.approx(off[1], rel=1e-3) and one != other
    assert all(1e-9 < x < 1e-5 for x in off[0])


def test_what_cases_share_does_not_depend_on_their_order() -> None:
    """A model is used for all of them: no case may leave anything behind."""
    cases = [FIRST["kto", "kto"], FIRST["dpo", "sigmoid"], FIRST["grpo", "rloo"], FIRST["dpo", "sigmoid"]]
    rows = list(verify(cases, seed=1, truths=["oracle"], architectures=[LlamaConfig]))
    (alone,) = verify(cases[1:2], seed=1, truths=["oracle"], architectures=[LlamaConfig])
    assert rows[1] == rows[3] == alone


def test_the_gradient_by_the_chain_rule_is_autograds() -> None:
    subject = Subject(LlamaConfig, 0)
    (example,) = subject.examples(FIRST["sft", "nll"])[:1]
    ids = example.completions[0].ids

    def loss(out: SequenceLogps) -> Tensor:
        return out.completion.exp().sum() + out.entropy.square().sum() - out.log_z.sum()

    model = subject.models[torch.float64]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    direct = torch.autograd.grad(loss(oracle.sequence_logps(model, example.prompt_ids, ids)), list(trained.values()))
    for _ in range(2):
        shared = subject.gradient(loss(subject.passed(example, 0)))
        assert list(shared) == list(trained)
        for got, wanted in zip(shared.values(), direct, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_only_variants_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--method", "orpo", "--only", "beta"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 within bounds" in out and "orpo,beta=1.0" in out
    with pytest.raises(UserError, match="^no variant has a name with discopopp in it$"):
        main(["--only", "discopopp"])


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="^unknown method 'ppo', expected one of: .*dpo.*"):
        main(["--method", "ppo"])
