"""The configuration as a table: what differs between runs, what differs from the defaults, and the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from logratio.losses import LOSSES
from logratio.trainers.config import DataConfig, ModelConfig, RolloutConfig, SaveConfig, TrainConfig
from logratio.trainers.config.model import LORA, SYNC

from .runs import SECTIONS, Run, section
from .words import plain

PLACE = "output_dir"
"""An option that says where a run is, not what it is."""
UNKNOWN = object()
LONGEST = 24
"""Characters of a version or a fingerprint that are shown."""


@dataclass(frozen=True)
class Option:
    """values: of each run. default: of the first run's method; None where nobody knows it. changed: of each run,
    whether its value is another than its default."""

    part: str
    name: str
    values: tuple[str, ...]
    default: str | None
    changed: tuple[bool, ...]
    differs: bool

    @property
    def told(self) -> bool:
        """Whether it says something of these runs that the defaults do not."""
        return self.differs or any(self.changed)


def options(runs: Sequence[Run]) -> list[Option]:
    """All options of the runs, in the order of run_config.json, those with something to say first."""
    defaults = [defaults_of(run) for run in runs]
    found = []
    for part in SECTIONS:
        names = dict.fromkeys(name for run in runs for name in section(run.config, part))
        for name in names:
            values = tuple(section(run.config, part).get(name) for run in runs)
            known = [own.get((part, name), UNKNOWN) for own in defaults]
            changed = tuple(
                name != PLACE and name in section(run.config, part) and default is not UNKNOWN and value != default
                for run, value, default in zip(runs, values, known, strict=True)
            )
            differs = name != PLACE and any(value != values[0] for value in values)
            default = None if known[0] is UNKNOWN or name == PLACE else plain(known[0])
            found.append(Option(part, name, tuple(map(plain, values)), default, changed, differs))
    return sorted(found, key=lambda option: (not option.differs, not option.told))


def defaults_of(run: Run) -> dict[tuple[str, str], Any]:
    """(part, name) -> what the option is where nothing is said; of a loss that is not ours nothing is known."""
    kind = LOSSES.get(str(run.config.get("loss_class")))
    loss = None if kind is None else kind()
    model = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    model |= LORA if run.option("model", "lora_r") else {}
    model |= SYNC if run.option("model", "sync_ref_model") else {}
    model["disable_dropout"] = UNKNOWN if loss is None else ModelConfig().resolved(loss).disable_dropout
    known = {
        "loss": {} if loss is None else dataclasses.asdict(loss),
        "model": model,
        "data": dataclasses.asdict(DataConfig()),
        "train": dataclasses.asdict(TrainConfig().resolved(run.method, 1)),
        "save": dataclasses.asdict(SaveConfig()),
        "rollout": dataclasses.asdict(RolloutConfig()),
    }
    return {
        (part, name): list(value) if isinstance(value, tuple) else value
        for part, values in known.items()
        for name, value in values.items()
    }


def versions(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...], bool]]:
    """(what, its value in each run, whether these differ) of the code, the packages and the machine."""

    def line(name: str, values: Sequence[Any]) -> tuple[str, tuple[str, ...], bool]:
        return name, tuple(map(plain, values)), any(value != values[0] for value in values)

    found = [line("commit", [run.about.get("commit") for run in runs])]
    packages = dict.fromkeys(name for run in runs for name in section(run.about, "versions"))
    found += [line(name, [section(run.about, "versions").get(name) for run in runs]) for name in packages]
    for key, name in (
        ("device", "device"),
        ("num_processes", "processes"),
        ("data", "fingerprint of the data"),
        ("frozen", "fingerprint of the frozen weights"),
    ):
        if any(run.about.get(key) is not None for run in runs):
            found.append(line(name, [run.about.get(key) for run in runs]))
    return [(name, tuple(value[:LONGEST] for value in values), differs) for name, values, differs in found]
