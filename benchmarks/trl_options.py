"""What becomes of TRL's options, as docs/coming_from_trl.md has it. The installed TRL is asked which it has."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

from logratio.losses import LOSSES
from logratio.trainers.trl_names.defaults import ALSO, HERE, TRL_DEFAULTS
from logratio.trainers.trl_names.judging import options_of
from logratio.trainers.trl_names.rules import RULES
from logratio.trainers.trl_names.table import ONLY, RENAMED, WITHOUT_EFFECT
from logratio.trainers.trl_names.verdicts import said

from .peers.text import code, table

OPTIONS = [options_of(loss).keys() for loss in LOSSES.values()]
COMMON = set.intersection(*map(set, OPTIONS))
"""Ours with every method."""


def trl_classes() -> dict[str, list[type[Any]]]:
    """method -> the dataclasses of the installed TRL whose fields its users may give."""
    from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, RLOOConfig, ScriptArguments, SFTConfig
    from trl.scripts.utils import DatasetMixtureConfig

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        from trl.experimental.cpo import CPOConfig
        from trl.experimental.orpo import ORPOConfig
        from trl.experimental.tpo import TPOConfig

    of = {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig, "orpo": ORPOConfig, "cpo": CPOConfig}
    of |= {"tpo": TPOConfig, "grpo": GRPOConfig, "rloo": RLOOConfig}
    return {method: [config, ModelConfig, ScriptArguments, DatasetMixtureConfig] for method, config in of.items()}


def taken() -> str:
    """Options of TRL's that mean the same here."""
    theirs = {f.name for parts in trl_classes().values() for part in parts for f in dataclasses.fields(part)}
    return ", ".join(map(code, sorted((theirs & set().union(*OPTIONS)) - RULES.keys()))) + "."


def spellings() -> str:
    """Older and other names."""
    return table(("given", "judged as"), ((code(old), code(new)) for old, new in sorted(RENAMED.items())))


def judged() -> str:
    """What depends on the value, the method and the other options, by the rules' docstrings."""
    names: dict[Any, list[str]] = {}
    for name, rule in RULES.items():
        names.setdefault(rule, []).append(name)
    rows = ((codes(of_rule), " ".join((rule.__doc__ or "").split())) for rule, of_rule in names.items())
    return table(("option", "what becomes of it"), rows)


def without_effect() -> str:
    without = {why: [name for name in names.split() if name not in COMMON] for why, names in WITHOUT_EFFECT.items()}
    return table(("option", "why"), ((codes(names), why) for why, names in without.items() if names))


def accepted() -> str:
    """What is accepted at what happens anyway."""
    rows = (
        (code(name), "off" if one.values[0] is None else code(said(one.values[0])), one.instead)
        for name, one in sorted(ONLY.items())
        if name not in COMMON
    )
    return table(("option", "accepted", "anything else"), rows)


def defaults() -> str:
    """Those of TRL's that differ, and that a run's result depends on."""
    rows: list[tuple[str, ...]] = []
    found: dict[tuple[str, str], list[str]] = {}
    for method, values in TRL_DEFAULTS.items():
        for name, value in values.items():
            if name in HERE and method in (HERE[name].methods or TRL_DEFAULTS):
                found.setdefault((name, said(value)), []).append(method)
    for (name, value), methods in found.items():
        which = "all" if len(methods) == len(TRL_DEFAULTS) else ", ".join(methods)
        rows.append((code(name), which, value, HERE[name].here))
    for name, (value, here) in ALSO.items():
        assert here.needs is not None
        rows.append((code(name), f"with `{here.needs[0]}: {said(here.needs[1])}`", said(value), here.here))
    return table(("option", "methods", "TRL 1.16", "here"), rows)


def codes(names: Iterable[str]) -> str:
    return ", ".join(map(code, names))


PARTS = {
    "taken": taken,
    "spellings": spellings,
    "judged": judged,
    "without effect": without_effect,
    "accepted": accepted,
    "defaults": defaults,
}
"""By their names in the page."""
