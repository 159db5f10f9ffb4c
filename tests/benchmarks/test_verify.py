"""`logratio verify` holds for every loss, writes what it promises, and fails where a loss is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from logratio.benchmarks.peers.cases import CASES, Case
from logratio.benchmarks.verify import main, verify
from logratio.losses import CPO_TYPES, DPO_TYPES, GRPO_TYPES, KTO_TYPES, LOSSES, SFT_TYPES, TPO_TYPES
from logratio.trainers.errors import UserError

TABLES = {
    "sft": SFT_TYPES,
    "dpo": DPO_TYPES,
    "kto": KTO_TYPES,
    "cpo": CPO_TYPES,
    "tpo": TPO_TYPES,
    "orpo": {None: None},
    "grpo": GRPO_TYPES,
}


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.method} {case.name}") for case in cases])


FIRST = {(case.method, case.options.get("loss_type")): case for case in reversed(CASES) if case.trl}
"""One case of every loss type that TRL has; the command compares all of them."""


@named(CASES)
def test_every_case_is_the_oracles(case: Case) -> None:
    (row,) = verify([case], seed=1, truths=["oracle"], architectures=[LlamaConfig])
    assert row["ok"], row


@named(list(FIRST.values()))
def test_every_loss_type_is_trls(case: Case) -> None:
    (row,) = verify([case], seed=1, truths=["trl"], architectures=[Qwen2Config])
    assert row["ok"], row


def test_every_loss_and_loss_type_is_a_case() -> None:
    assert set(TABLES) == set(LOSSES) == {case.method for case in CASES}
    for method, table in TABLES.items():
        types = [case.options.get("loss_type") for case in CASES if case.method == method]
        assert {name for name in types if not isinstance(name, tuple)} == set(table)


def test_cases_have_names_of_their_own() -> None:
    assert len({(case.method, case.name) for case in CASES}) == len(CASES)


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
    keys = ["method", "variant", "against", "dtype", "loss_rel_err", "grad_rel_err", "ok"]
    assert [list(row) for row in rows] == [keys] * 6
    assert [(row["variant"], row["against"], row["ok"]) for row in rows] == [
        ("hinge", "trl", False),
        ("hinge", "oracle", False),
        ("ipo", "trl", True),
        ("ipo", "oracle", True),
        (refused.name, "oracle", "hinge" not in refused.name),
        (ours_alone.name, "oracle", True),
    ]
    assert f"{sum(row['ok'] for row in rows)} of 6 within bounds" in out


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="^unknown method 'ppo', expected one of: .*dpo.*"):
        main(["--method", "ppo"])
