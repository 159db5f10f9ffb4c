"""Trackers get each line of the log once, and cost no run where they fail."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from logratio.trainers.errors import UserError
from logratio.trainers.logs import trackers
from logratio.trainers.logs.runlog import RunLog
from logratio.trainers.logs.trackers import chosen, flat, named_for

from .._runs import LATEST, back_to, log, train

BOARD = ["--report_to", "tensorboard"]


def scalars(folder):
    """{metric: [(step, value), ...]} as TensorBoard reads them, without what a run that went on has overwritten."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.usefixtures("workspace")
def test_tensorboard_has_the_log_and_goes_on_with_it(capsys):
    pytest.importorskip("tensorboard")
    train("sft", *BOARD)
    back_to(3)
    train("sft", *BOARD, *LATEST)
    rows, found = log("out"), scalars("out/tensorboard")
    assert found.keys() == rows[0].keys() - {"step", "hash"}
    for name, values in found.items():
        assert [step for step, _ in values] == [1, 2, 3, 4, 5, 6], name
        assert [value for _, value in values] == pytest.approx([row[name] for row in rows], rel=1e-6), name
    shutil.copytree("out", "start")
    train("sft", *BOARD, "--resume_from_checkpoint", "start/checkpoint-3", output="other")
    assert scalars("other/tensorboard").keys() == found.keys()
    assert [step for step, _ in scalars("other/tensorboard")["loss"]] == [1, 2, 3, 4, 5, 6]
    (settings,) = Path("out/tensorboard").rglob("hparams.yml")
    assert "train/batch_size: 4" in settings.read_text()
    capsys.readouterr()
    train("sft", *BOARD, "--overwrite_output_dir", "--max_steps", "2", "--save_steps", "2")
    assert [step for step, _ in scalars("out/tensorboard")["loss"]] == [1, 2], "another run's are moved aside"
    assert len(scalars("out/tensorboard.1")["loss"]) == 6


def reported(rows):
    """Of a log's rows, what a tracker is given, and at which step."""
    own = {"step", "hash"}
    return [({name: value for name, value in row.items() if name not in own}, row["step"]) for row in rows]


class StandIn:
    """In the place of the package trackio, and of a run of it: all that is asked of them."""

    def __init__(self):
        self.calls, self.config = [], SimpleNamespace(update=lambda values, **_: self.calls.append(("config", values)))

    def init(self, **given):
        self.calls.append(("init", given))
        return self

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.usefixtures("workspace")
def test_trackio_is_given_each_line_once_and_a_run_that_goes_on_its_name(monkeypatch):
    """By accelerate's own tracker."""
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["trackio"])
    words = ["--report_to", "trackio", "--max_steps", "4", "--save_steps", "2"]

    def asked(*more):
        monkeypatch.setitem(sys.modules, "trackio", stand_in := StandIn())
        train("sft", *words, *more)
        return stand_in.calls

    (_, given), (what, options), *lines, last = asked()
    assert given == {"project": "logratio", "name": "out", "resume": "never"} and last == ("finish",)
    assert what == "config" and options["train/batch_size"] == 4 and options["loss/loss_type"] == "nll"
    assert all(isinstance(value, bool | int | float | str) for value in options.values())
    assert lines == [("log", values, step) for values, step in reported(log("out"))] and len(lines) == 4
    back_to(2)
    (_, given), *lines, last = asked(*LATEST)  # and no configuration again
    assert given == {"project": "logratio", "name": "out", "resume": "allow"} and last == ("finish",)
    assert lines == [("log", values, step) for values, step in reported(log("out")[2:])]


@pytest.mark.usefixtures("workspace")
def test_trackio_has_the_log(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    pytest.importorskip("trackio", reason="pip install trackio (which takes Pillow below 13 and a server along)")
    from trackio.sqlite_storage import SQLiteStorage

    train("sft", "--report_to", "trackio", "--max_steps", "4", "--save_steps", "2")
    back_to(2)
    train("sft", "--report_to", "trackio", "--max_steps", "4", "--save_steps", "2", *LATEST)
    found = [(line.pop("step"), line) for line in SQLiteStorage.get_logs("logratio", "out")]
    assert [step for step, _ in found] == [1, 2, 3, 4, 3, 4], "it has no way to take back what was said of a step"
    for values, step in reported(log("out")):
        (*_, newest) = (line for at, line in found if at == step)
        assert values.items() <= newest.items()


def test_one_that_is_not_installed_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    assert chosen(["none"]) == [] and chosen(["all"]) == chosen(["tensorboard", "none"]) == ["tensorboard"]
    with pytest.raises(UserError) as caught:
        chosen(["tensorboard", "comet_ml"])
    message = "--report_to comet_ml: comet-ml is not installed; pip install comet-ml, or leave it out"
    assert str(caught.value) == message
    from logratio.trainers import cli

    monkeypatch.chdir(tmp_path)
    words = ["train", "sft", "--model_name_or_path", "no/such", "--report_to", "comet_ml", "--output_dir", "out"]
    assert cli.main(words) == 1
    assert capsys.readouterr().err == f"logratio: {message}\n" and list(tmp_path.iterdir()) == []


class Failing:
    requires_logging_directory = False
    name = "mine"

    def __init__(self, project, **options):
        self.seen = []

    def store_init_configuration(self, values):
        json.dumps(values)

    def log(self, values, step):
        if step >= 2:
            raise ConnectionError("the network is gone")

    def finish(self):
        raise AssertionError("it was given up")


class Closed(Failing):
    def store_init_configuration(self, values):
        raise PermissionError("no key")


def test_one_that_fails_is_given_up_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    known = {"mine": Failing, "shut": Closed}
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", known)
    with RunLog(str(tmp_path), {"a": {"b": None}}, total_steps=3, report_to=["shut", "mine"]) as log:
        for step in (1, 2, 3):
            log.step({"step": step, "loss": 1.0})
    said = capsys.readouterr().out
    assert said.count("--report_to mine: the network is gone; the run goes on without") == 1
    assert said.count("--report_to shut: no key; the run goes on without") == 1
    assert said.count("the run goes on without") == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_metrics_have_names_that_the_tracker_takes():
    """MLflow refuses every sign but _ - . : / and the space."""
    values = {"eval_rewards/right/pass@4": 0.5, "loss": 1.0}
    assert named_for("mlflow", values) == {"eval_rewards/right/pass_at_4": 0.5, "loss": 1.0}
    assert named_for("wandb", values) == values


def test_other_processes_report_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.Trackers, "start", lambda self: pytest.fail("not on this process"))
    with RunLog(str(tmp_path / "run"), {}, total_steps=1, main=False, report_to=["tensorboard"]) as log:
        log.step({"step": 1, "loss": 1.0})


def test_options_are_one_level_and_numbers_stay_numbers():
    assert flat({"loss": {"beta": 0.1, "types": ("a", "b")}, "method": "dpo", "x": None}) == {
        "loss/beta": 0.1,
        "loss/types": "('a', 'b')",
        "method": "dpo",
        "x": "None",
    }
