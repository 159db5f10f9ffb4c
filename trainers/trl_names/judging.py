"""Every option of a file judged at once."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from logratio.losses import LOSSES, Loss
from logratio.losses.options import ranges_of

from ..config import parts_of
from ..config.words import hints_of
from . import data, model, rollouts, times, training  # noqa: F401  # they enter their rules
from .defaults import absent_of
from .losses import OF_RLOO, OLDER
from .rules import RULES
from .table import ONLY, OURS, RENAMED, WITHOUT_EFFECT
from .verdicts import Asked, Judged, Kind, Verdict, number, said

REASONS = {name: reason for reason, names in WITHOUT_EFFECT.items() for name in names.split()}
NULL_IS_SAID = ("max_length", "shuffle_dataset")
"""Options at which null is not the same as nothing."""
INSIDE = "model_init_kwargs"
"""What it holds is judged as if it stood beside it."""
OF_OTHERS = "an option of "
"""With which a verdict on an option of other methods begins."""


def is_ours(given: Mapping[str, Any], loss: type[Loss]) -> bool:
    """Whether all options are ours with this loss, and none has a value that only TRL knows."""
    options = options_of(loss)
    for name, value in ((str(key).replace("-", "_"), value) for key, value in given.items()):
        if name == "env" and isinstance(value, Mapping):
            continue
        if name not in options:
            return False
        if name in RULES and value is not None and out_of_domain(loss, name, value, options[name]):
            return False
    return True


def consider(
    method: str,
    given: Mapping[str, Any],
    *,
    loss: type[Loss] | None = None,
    gpu: bool = True,
    words: Mapping[str, Any] | None = None,
) -> Judged:
    """What becomes of each option of a TRL user, whatever it is; see `Judged.check` where that must not be a refusal.

    method: a registered one, or "rloo". given: option -> value, by TRL's names of any age, or ours; `env` too. loss:
    of a method that is not registered. gpu: whether the run has one. words: what goes before them, by our names.
    """
    ours = "grpo" if method == "rloo" else method
    loss = loss or LOSSES[ours]
    file: dict[str, Any] = {}
    verdicts: list[Verdict] = []
    judged = Judged(ours, dict(OF_RLOO) if method == "rloo" else {}, {}, verdicts, [])
    first: dict[str, str] = {}  # of several spellings the first that says something
    for key, name, value in sorted(spelled_today(given), key=lambda one: one[2] is None):
        if name in file:
            verdicts.append(again(key, first[name], value, file[name]))
        else:
            file[name], first[name] = value, key
    own = bool(OURS & file.keys())
    for name, key in first.items():
        has_gpu = gpu and not file.get("use_cpu")
        asked = Asked(name, file[name], file, method, ours=own, gpu=has_gpu, words=words or {})
        verdict = add(judged, checked(verdict_on(asked, loss), loss, asked))
        renamed = verdict.kind is Kind.TAKEN and key.replace("-", "_") != name
        verdicts.append(dataclasses.replace(verdict, key=key, kind=Kind.TRANSLATED if renamed else verdict.kind))
    if isinstance(given.get("env"), Mapping):
        judged.env.update({str(name): str(value) for name, value in given["env"].items()})
        verdicts.append(Verdict("env", given["env"], Kind.TAKEN, {}, "set before anything is loaded"))
    judged.absent.extend([] if own else absent_of(method, {**file, **(words or {})}))
    return judged


def spelled_today(given: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(as it was given, today's name, value) of each; what `INSIDE` holds beside the rest."""
    for key, one in given.items():
        name, value = str(key).replace("-", "_"), one.value if isinstance(one, Enum) else one
        if name == INSIDE and isinstance(value, Mapping):
            yield from ((f"{INSIDE}.{own}", RENAMED.get(own, str(own)), inner) for own, inner in value.items())
        elif name != "env" or not isinstance(value, Mapping):
            yield str(key), RENAMED.get(name, name), value


def again(key: str, other: str, value: Any, first: Any) -> Verdict:
    """On an option that was given before under another spelling."""
    if value is None or value == first:
        return Verdict(key, value, Kind.NO_EFFECT, {}, f"another name of {other}")
    return Verdict(key, value, Kind.REFUSED, {}, f"another name of {other}, which is {said(first)}; leave one out")


def verdict_on(a: Asked, loss: type[Loss]) -> Verdict:
    """By its rule; else as an option of ours of the same name; else by the table."""
    options = options_of(loss)
    mapping = a.key in (INSIDE, "env")
    known = a.key in RULES or a.key in options or a.key in ONLY or a.key in REASONS or mapping
    if known and a.value is None and a.key not in NULL_IS_SAID:
        return a.no_effect("null is as if it were left out")
    if mapping:
        return a.refused("must be a mapping of names to values")
    if a.key in RULES:
        try:
            return RULES[a.key](a)
        except (TypeError, ValueError):
            return a.refused("a value of that kind has no meaning here")
    if a.key in options:
        return a.taken()
    if a.key in ONLY:
        values, instead = ONLY[a.key]
        return a.no_effect("as in any case") if like(a.value, values) else a.refused(instead)
    if a.key in REASONS:
        return a.no_effect(REASONS[a.key])
    return a.refused(unknown(a.key, options))


def like(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether it is one of them; numbers may be text, and an empty list is an empty tuple."""
    return (tuple(value) if isinstance(value, list) else value) in values or str(value) in map(str, values)


def unknown(key: str, options: Mapping[str, Any]) -> str:
    """On an option that neither TRL nor this method has."""
    if elsewhere := of_others(key):
        return elsewhere
    return nobodys(key, {*options, *RULES, *ONLY, *REASONS, *RENAMED}, 3)


def nobodys(key: str, names: Collection[str], most: int, before: str = "") -> str:
    """On an option that nobody has, and which of these names may have been meant: `most` of them, `before` each."""
    near = difflib.get_close_matches(key, sorted(names), n=most, cutoff=0.75)
    meant = " or ".join(f"{before}{name}" for name in near)
    return "no option here, nor of TRL" + (f"; did you mean {meant}?" if near else "")


def of_others(key: str) -> str:
    """On an option of methods of ours, "" where none has it."""
    owners = [name for name, loss in LOSSES.items() if key in options_of(loss)]
    return f"{OF_OTHERS}{', '.join(owners)}" if owners else ""


def names_of(method: str) -> frozenset[str]:
    """All names under which an option of TRL's, or of ours, may be given for a method; "rloo" among them."""
    ours = options_of(LOSSES["grpo" if method == "rloo" else method])
    return frozenset({*ours, *RULES, *ONLY, *REASONS, *RENAMED, INSIDE})


def options_of(loss: type[Loss]) -> dict[str, Any]:
    """Our options with this loss -> their types."""
    return _options_of(loss)  # type: ignore[arg-type]  # a class has a hash


@functools.cache
def _options_of(loss: type[Loss]) -> dict[str, Any]:
    return hints_of(parts_of(loss).values())


def checked(verdict: Verdict, loss: type[Loss], a: Asked) -> Verdict:
    """The verdict, or another where what it became is no option of this method, has no such value, or is not read."""
    options = options_of(loss)
    for name, value in verdict.became.items():
        if name not in options:
            return a.refused(of_others(name))
        if wrong := out_of_domain(loss, name, value, options[name]):
            return a.refused(wrong)
        if unread := not_read(loss, name, value, a, verdict.became):
            return a.no_effect(unread)
    return verdict


def out_of_domain(loss: type[Loss], name: str, value: Any, hint: Any) -> str:
    """What the value must be, "" where it is."""
    table = getattr(loss, "option_tables", {}).get(name)
    several = value if isinstance(value, list | tuple) else [value]
    if table is not None and (wrong := [one for one in several if one not in list(table)]):
        return f"{wrong[0]} is unknown; must be one of {', '.join(table)}"
    if get_origin(hint) is Literal and value not in get_args(hint):
        return f"must be one of {', '.join(get_args(hint))}"
    within = next((found[name] for part in parts_of(loss).values() if name in (found := ranges_of(part))), None)  # type: ignore[arg-type]
    if within is not None and not isinstance(value, bool):
        try:
            numbers = [number(one) for one in several]
        except (TypeError, ValueError):
            return "must be a number"
        if not all(within.admits(one) for one in numbers):
            return str(within)
    return ""


def not_read(loss: type[Loss], name: str, value: Any, a: Asked, became: Mapping[str, Any]) -> str:
    """Why the chosen variant of the loss does not read the option, "" where it does. TRL does not either, silently.

    became: what else is set with it, by our names.
    """
    fields = {f.name: f.default for f in dataclasses.fields(loss)}
    if name not in fields or value == fields[name]:
        return ""
    tables = getattr(loss, "option_tables", {})
    for option, table in tables.items() if name not in tables else ():
        chosen = OF_RLOO[option] if a.method == "rloo" and option in OF_RLOO else a.says(option, fields[option])
        chosen = became.get(option, chosen)
        chosen = [chosen] if isinstance(chosen, str) else list(table if chosen is None else chosen)
        if not {OLDER.get(one, one) for one in chosen} & set(table.readers(name)):
            return f"{option} {', '.join(chosen)} does not read it, in TRL neither"
    switch = getattr(loss, "option_switches", {}).get(name)
    return f"read only where {switch} is not 0" if switch and not a.says(switch, fields[switch]) else ""


def add(judged: Judged, verdict: Verdict) -> Verdict:
    """Enter what became of an option; refused where another has become something else of the same name."""
    for name, value in verdict.became.items():
        if name in judged.options and judged.options[name] != value:
            return Verdict(
                verdict.key,
                verdict.value,
                Kind.REFUSED,
                {},
                f"would set {name} to {said(value)}, which another option sets to {said(judged.options[name])}",
            )
    judged.options.update(verdict.became)
    judged.env.update(verdict.env)
    return verdict
