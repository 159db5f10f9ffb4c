"""`logratio verify` holds for every loss, writes what it promises, and fails where a loss is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from logratio.benchmarks.verify import BOUNDS, CASES, main, verify
from logratio.losses import DPO_TYPES, GRPO_TYPES, KTO_TYPES, LOSSES, SFT_TYPES
from logratio.trainers.errors import UserError


@pytest.mark.parametrize("method", CASES)
def test_every_case_is_within_bounds(method: str) -> None:
    rows = list(verify([method], seed=1))
    assert len(rows) == len(CASES[method]) * len(BOUNDS)
    for row in rows:
        assert row["ok"], row


def test_every_loss_and_loss_type_is_a_case() -> None:
    assert set(CASES) == set(LOSSES)
    for method, table in {"sft": SFT_TYPES, "dpo": DPO_TYPES, "kto": KTO_TYPES, "grpo": GRPO_TYPES}.items():
        assert {options["loss_type"] for options in CASES[method]} == set(table)


def test_a_wrong_loss_is_found_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = DPO_TYPES["hinge"]
    monkeypatch.setitem(DPO_TYPES, "hinge", lambda r, loss: right(r, loss) * 1.0001)
    monkeypatch.setitem(CASES, "dpo", [{"loss_type": "hinge"}, {"loss_type": "ipo"}])
    file = tmp_path / "rows.json"
    assert main(["--method", "dpo", "--json", str(file)]) == 1
    assert "2 of 4 within bounds" in capsys.readouterr().out
    rows = json.loads(file.read_text())
    keys = ["method", "variant", "against", "dtype", "loss_rel_err", "grad_rel_err", "ok"]
    assert [list(row) for row in rows] == [keys] * 4
    assert [(row["variant"], row["against"], row["ok"]) for row in rows] == [
        ("hinge", "trl", False),
        ("hinge", "oracle", False),
        ("ipo", "trl", True),
        ("ipo", "oracle", True),
    ]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="^unknown method 'ppo', expected one of: sft, dpo, kto, orpo, grpo$"):
        main(["--method", "ppo"])
