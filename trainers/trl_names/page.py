"""The tables of docs/coming_from_trl.md: `python -m logratio.trainers.trl_names.page` writes them anew.

They are behind a beginning that is written by hand. The installed TRL is asked which options it has.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from logratio.losses import LOSSES

from . import judging
from .defaults import ALSO, HERE, TRL_DEFAULTS
from .rules import RULES
from .table import ONLY, RENAMED, WITHOUT_EFFECT
from .verdicts import said

BEGIN = "<!-- written by `python -m logratio.trainers.trl_names.page` from here on -->\n"


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


def tables() -> str:
    """All of them, in Markdown."""
    theirs = {f.name for parts in trl_classes().values() for part in parts for f in dataclasses.fields(part)}
    of_methods = [judging.options_of(loss).keys() for loss in LOSSES.values()]
    ours, common = set().union(*of_methods), set.intersection(*map(set, of_methods))
    by_rule: dict[Any, list[str]] = {}
    for name, rule in RULES.items():
        by_rule.setdefault(rule, []).append(name)
    taken = sorted((theirs & ours) - RULES.keys())
    without = {why: [name for name in names.split() if name not in common] for why, names in WITHOUT_EFFECT.items()}
    only = {name: one for name, one in ONLY.items() if name not in common}
    return "\n\n".join(
        [
            "## Taken as they stand",
            ", ".join(map(code, taken)) + ".",
            "## Older and other spellings",
            table(("given", "judged as"), ((code(old), code(new)) for old, new in sorted(RENAMED.items()))),
            "## Taken or translated, by value, method and the other options",
            table(("option", "what becomes of it"), ((codes(names), doc(rule)) for rule, names in by_rule.items())),
            "## Without effect",
            table(("option", "why"), ((codes(names), why) for why, names in without.items() if names)),
            "## Accepted at what happens anyway, else refused",
            table(
                ("option", "accepted", "anything else"),
                (
                    (code(name), "off" if one.values[0] is None else code(said(one.values[0])), one.instead)
                    for name, one in sorted(only.items())
                ),
            ),
            "## Defaults that differ",
            "Where a file leaves one of these out and the result depends on it, the table at the start of the run says "
            "so. `logratio train` keeps its own default.",
            table(("option", "methods", "TRL 1.16", "here"), defaults()),
        ]
    )


def defaults() -> Iterable[tuple[str, ...]]:
    """Rows of the table of defaults."""
    found: dict[tuple[str, str], list[str]] = {}
    for method, values in TRL_DEFAULTS.items():
        for name, value in values.items():
            if name in HERE and method in (HERE[name].methods or TRL_DEFAULTS):
                found.setdefault((name, said(value)), []).append(method)
    for (name, value), methods in found.items():
        which = "all" if len(methods) == len(TRL_DEFAULTS) else ", ".join(methods)
        yield code(name), which, value, HERE[name].here
    for name, (value, here) in ALSO.items():
        assert here.needs is not None
        yield code(name), f"with `{here.needs[0]}: {said(here.needs[1])}`", said(value), here.here


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def code(text: str) -> str:
    return f"`{text}`"


def codes(names: Iterable[str]) -> str:
    return ", ".join(map(code, names))


def doc(rule: Any) -> str:
    return " ".join((rule.__doc__ or "").split())


def renewed(text: str) -> str:
    """A page with its tables written anew."""
    return text.partition(BEGIN)[0] + BEGIN + "\n" + tables() + "\n"


if __name__ == "__main__":
    page = Path("docs/coming_from_trl.md")
    page.write_text(renewed(page.read_text()))
