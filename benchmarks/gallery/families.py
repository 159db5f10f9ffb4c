"""Which losses are drawn, with which options, and what of the laws they break on purpose."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from logratio.losses import LOSSES, Kind, Loss
from logratio.reference.laws import laws_of

from ..documents import first_sentence, maker
from ..peers.breaks import BREAKS
from ..peers.cases import CASES
from .curves import LENGTHS_TO_1

TITLES = {
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "listwise": "Losses of lists",
    "orpo": "ORPO",
    "cpo": "CPO and SimPO",
    "tpo": "TPO",
    "grpo": "GRPO",
}
MOST = 8
"""Variants in a picture."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """name: its loss_type, or the method where that has none. entry: of its table. state: from earlier steps."""

    method: str
    name: str
    entry: Any
    options: dict[str, Any]
    state: Mapping[str, float]

    @property
    def loss(self) -> Loss:
        fixed = LENGTHS_TO_1 if LOSSES[self.method].kind is Kind.GROUPED else {}
        return LOSSES[self.method](**self.options, **fixed)

    @property
    def told(self) -> str:
        """Its docstring, as it stands."""
        said = inspect.getdoc(maker(self.entry)) or ""
        if hasattr(self.entry, "shift"):
            said += f"\nshift: {first_sentence(self.entry.shift)}"
        return said

    @property
    def laws(self) -> list[str]:
        return laws_of(self.loss)

    @property
    def broken(self) -> list[str]:
        """Laws that it breaks on purpose; the tests hold every variant to all others."""
        return [law for law, variants in BREAKS.items() if self.name in variants]


@cache
def variants(method: str) -> dict[str, Variant]:
    """All that are registered, with the options of their first case; of one without a case, the defaults."""
    loss = LOSSES[method]
    table = getattr(loss, "option_tables", {}).get("loss_type", {method: loss})
    found = {}
    for name, entry in table.items():
        case = next((c for c in CASES if c.method == method and c.options.get("loss_type", method) == name), None)
        options = {} if table.keys() == {method} else {"loss_type": name}
        if case is not None:
            # what has its own default is drawn with it
            options |= {k: v for k, v in case.options.items() if k == "label_smoothing"}
        found[name] = Variant(method, name, entry, options, {} if case is None else case.state)
    return found


def groups(method: str) -> Iterator[tuple[str, str, list[Variant]]]:
    """(name, what they have in common, variants) of each picture: by the module that they are written in."""
    by_module: dict[str, list[Variant]] = {}
    for one in variants(method).values():
        by_module.setdefault(maker(one.entry).__module__, []).append(one)
    for module, members in by_module.items():
        said = first_sentence(sys.modules[module]) if len(by_module) > 1 else ""
        parts = [members[at : at + MOST] for at in range(0, len(members), MOST)]
        for number, part in enumerate(parts, 1):
            name = module.rpartition(".")[2] if len(by_module) > 1 else ""
            yield "-".join(filter(None, (method, name, str(number) if len(parts) > 1 else ""))), said, part
