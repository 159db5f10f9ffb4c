"""Options: from the words of a command line, and a file beside them, to the configuration of a run.

They are the fields of the configuration's dataclasses and of the loss itself, with flat names in any order. A YAML file
or a run's run_config.json (`--config`) gives the same options; what is said on the command line wins.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from .errors import UserError
from .ground.plugins import import_object

if TYPE_CHECKING:
    from logratio.losses import Loss

    from .config import RunConfig

METHODS = ("dpo", "cpo", "tpo", "grpo", "kto", "listwise", "orpo", "sft")
"""Those of `logratio.losses.LOSSES`, which is not imported for their names."""
OURS_OF = {"rloo": "grpo"}
"""Method of TRL -> ours, with options that `trl_names` adds."""
CUSTOM = "custom"
"""The method of a run that is given its loss alone."""
RUN = {"method", "loss_class"}
"""Entries by which a run_config.json is known."""
TRAIN_HELP = (
    f"train METHOD    train with one of: {', '.join(METHODS)}; `logratio train METHOD --help` lists the options"
)


def parse_train(argv: list[str]) -> RunConfig:
    """METHOD and options -> configuration. Exits with a message for options that do not parse, as argparse does."""
    return parse(argv)[0]


def parse(
    argv: list[str],
    command: str = "train",
    *,
    more: type[Any] | None = None,
    gpu: bool | None = None,
    quiet: bool = False,
) -> tuple[RunConfig, Any]:
    """The configuration of a run, and what else the command asks for.

    more: a dataclass of further options; None: there are none. gpu: whether the run will have one; None: as here.
    quiet: nothing is shown of how a file was read.
    """
    from logratio.losses import LOSSES

    from .config.files import read_entries

    argv = list(argv)
    custom, config_file = _take(argv, "--loss"), _take(argv, "--config")
    path = Path(config_file or "")
    entries = read_entries(path, f"--config {path}") if config_file else {}
    trained = method = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if method is None and custom is None and argv[:1] in (["-h"], ["--help"]):
        print(TRAIN_HELP.replace("train", command, 1).replace("logratio train", f"logratio {command}"))
        raise SystemExit(0)
    if RUN <= entries.keys():
        method, custom = run_of(path, entries, method, custom)
        entries = options_in(entries)
    if method is None and custom is None:
        raise UserError(f"{command} needs a method, one of: {', '.join(LOSSES)}")
    method = OURS_OF.get(method or CUSTOM, method or CUSTOM)
    if custom is None and method not in LOSSES:
        raise UserError(f"unknown method {method!r}, expected one of: {', '.join(LOSSES)}")
    loss = load_loss(custom) if custom else LOSSES[method]
    words = options_among(argv)
    check_words(trained or method, loss, argv, more, f"logratio {command} {method}")
    entries = ours(entries, trained or method, loss, words, f"--config {path}", gpu=gpu, quiet=quiet)
    return _filled(method, loss, entries, argv, f"logratio {command} {method}", more)


def check_words(method: str, loss: type[Loss], argv: list[str], more: type[Any] | None, prog: str) -> None:
    """Exit with status 2, as argparse does, and a line for each, where there are options that are none of ours."""
    from .config.words import given, hints_of

    known = hints_of(parts_in(options_of(loss, more))).keys()  # type: ignore[arg-type]  # a class has a hash
    ours = {*known, *(f"no_{name}" for name in known), "help", ""}
    words = {name: values for name, values in given(argv) if not name.startswith("tyro_")}
    unknown = {name: values for name, values in words.items() if name not in ours}
    if unknown and not {"-h", "--help"} & set(argv):
        from .trl_names.words import about_words

        own = {name: value for name, value in options_among(argv).items() if name in known}
        lines = about_words(method, loss, unknown, known, own)
        sys.stderr.write("\n  ".join([f"logratio: {prog} does not have:", *lines]) + "\n")
        raise SystemExit(2)


def config_of(method: str, loss: type[Loss], entries: dict[Any, Any], argv: Sequence[str] = ()) -> RunConfig:
    """The run of these options by our names, and of the words of a command line, which go before them."""
    return _filled(method, loss, entries, argv, f"logratio train {method}")[0]


def _filled(
    method: str,
    loss: type[Loss],
    entries: dict[Any, Any],
    argv: Sequence[str],
    prog: str,
    more: type[Any] | None = None,
) -> tuple[RunConfig, Any]:
    import tyro

    from .config import RunConfig
    from .config.words import hints_of, refuse_misfits

    every = options_of(loss, more)  # type: ignore[arg-type]  # a class has a hash
    hints = hints_of(parts_in(every))
    argv = [*words_of(entries, hints), *argv]
    refuse_misfits(argv, hints)
    try:
        options: Any = tyro.cli(
            every,
            args=argv,
            prog=prog,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.HelptextFromCommentsOff),
            use_underscores=True,
        )
    except ValueError as error:  # a loss refuses its fields
        raise UserError(str(error)) from error
    chosen = dict(vars(options))
    chosen["loss"] = loss(**{f.name: getattr(options.loss, f.name) for f in dataclasses.fields(loss)})
    asked = chosen.pop("more", None)
    return RunConfig(method=method, **chosen), asked


@functools.cache
def options_of(loss: type[Loss], more: type[Any] | None = None) -> type[Any]:
    """The dataclass that the command line fills: one field for each configuration, whose own fields are the options."""
    import tyro

    from .config import parts_of

    parts: dict[str, Any] = {**parts_of(loss), "loss": with_readers(loss)}
    parts |= {} if more is None else {"more": more}
    return dataclasses.make_dataclass(
        "Options",
        [
            (name, Annotated[part, tyro.conf.arg(name="")], dataclasses.field(default_factory=part))
            for name, part in parts.items()
        ],
    )


def with_readers(loss: type[Loss]) -> type[Loss]:
    """The same loss, whose help says of an option which variants read it, where not all do."""
    import tyro

    from logratio.losses.options import readers_said

    hints: dict[str, Any] = get_type_hints(loss, include_extras=True)
    fields: list[Any] = []
    for f in dataclasses.fields(loss):
        if said := readers_said(loss, f.name):
            more = tyro.conf.arg(help_behavior_hint=f"(default: {{}}; {said})".format)
            fields.append((f.name, Annotated[hints[f.name], more], dataclasses.field(default=f.default)))
    return dataclasses.make_dataclass(loss.__name__, fields, bases=(loss,), frozen=True, kw_only=True)


def load_loss(name: str) -> type[Loss]:
    """`module:Class`, or a registered name."""
    from logratio.losses import LOSSES, Loss

    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        raise UserError(f"--loss {name!r} is neither module:Class nor one of: {', '.join(LOSSES)}")
    loss = import_object(name, "--loss")
    if not (
        isinstance(loss, type) and issubclass(loss, Loss) and hasattr(loss, "kind") and dataclasses.is_dataclass(loss)
    ):
        raise UserError(f"--loss {name!r} is not a dataclass derived from logratio.losses.Loss with a `kind`")
    from .config.run import check_own

    check_own(loss)
    return loss


def options_among(argv: Sequence[str]) -> dict[str, Any]:
    """Option -> its first value, True where it has none, of words that no type was checked of yet."""
    from .config.words import given

    return {name: values[0] if values else True for name, values in given(argv)}


def ours(
    entries: dict[Any, Any],
    method: str,
    loss: type[Loss],
    words: dict[str, Any],
    source: str,
    *,
    gpu: bool | None,
    quiet: bool,
) -> dict[Any, Any]:
    """The options of a file as ours: themselves, or where one is TRL's all as `trl_names` judges and shows them. The
    variables of its `env` are set, as TRL does. gpu, quiet: see `parse`."""
    from .trl_names import consider, is_ours
    from .trl_names.shown import show

    env = entries.get("env")
    os.environ.update({str(name): str(value) for name, value in env.items()} if isinstance(env, dict) else {})
    if method not in OURS_OF and is_ours(entries, loss):
        return {name: value for name, value in entries.items() if name != "env"}
    import torch

    if gpu is None:
        gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    judged = consider(method, entries, loss=loss, gpu=gpu, words=words).check(source)
    os.environ.update(judged.env)
    if entries and not quiet and os.environ.get("RANK", "0") == "0":
        show(judged, source)
    return judged.options


def run_of(path: Path, entries: dict[Any, Any], method: str | None, custom: str | None) -> tuple[str, str | None]:
    """Method and loss of a run_config.json, which the command line need not name again, and must not contradict."""
    own = entries["loss_class"]
    if method not in (None, entries["method"]) or custom not in (None, own):
        raise UserError(f"--config {path} is of the method {entries['method']} with the loss {own}; leave yours out")
    return entries["method"], None if own == entries["method"] else own


def options_in(entries: dict[Any, Any]) -> dict[Any, Any]:
    """The options of a run_config.json, out of its sections; what it says about the run is none."""
    sections = [part for name, part in entries.items() if isinstance(part, dict) and name != "about"]
    return {name: value for part in sections for name, value in part.items()}


def parts_in(options: type[Any]) -> list[Any]:
    """The dataclasses whose fields are the options."""
    return [f.default_factory for f in dataclasses.fields(options)]


def words_of(entries: dict[Any, Any], known: dict[str, Any]) -> list[str]:
    """The file's entries as command-line words, so that types are checked in one place only. known: option -> type."""
    words: list[str] = []
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if isinstance(value, bool) and known[name] is bool:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(_word, value)]
        elif value is not None:
            words += [f"--{name}", _word(value)]
    return words


def _word(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)


def _take(argv: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from argv and return the value."""
    for i, word in enumerate(argv):
        if word == option:
            if i + 1 == len(argv):
                raise UserError(f"{option} needs a value")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if word.startswith(option + "="):
            del argv[i]
            return word.split("=", 1)[1]
    return None
