"""Whoever waits sees lines as they come; whoever has a terminal sees a bar that leaves nothing behind."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from logratio.benchmarks.progress import Progress
from logratio.benchmarks.verify import main


class Recorder(io.StringIO):
    """What had been flushed, line by line."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_without_a_terminal_lines_alone_and_at_once() -> None:
    out = Recorder()
    with Progress(Console(file=out, width=20), "verify", 2) as progress:
        progress.begin("a case")
        progress.step("a line that is longer than [the] console is wide")
        assert out.flushed[-1] == "a line that is longer than [the] console is wide\n"
        progress.step()
        progress.say("another")
    assert out.getvalue() == "a line that is longer than [the] console is wide\nanother\n"


def test_on_a_terminal_a_bar_says_what_is_being_done() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=80, force_terminal=True), "verify", 2) as progress:
        progress.begin("a case")
        progress.step("a line")
        progress.bar.refresh()
        shown = out.getvalue()
        assert "verify: a case" in shown and "1/2" in shown and "a line\n" in shown
    assert out.getvalue().endswith("\x1b[2K"), "the bar is wiped out"


def test_rows_of_verify_come_one_by_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is cut short has shown what it had found."""

    def rows(cases: object, seed: int) -> object:
        errors = dict.fromkeys(("our_loss_err", "trl_loss_err", "our_grad_err", "trl_grad_err"))
        yield (
            {"method": "orpo", "variant": "orpo", "against": "oracle", "dtype": "float64", "ok": True}
            | errors
            | {
                "loss_rel_err": 1e-16,
                "grad_rel_err": 2e-15,
            }
        )
        raise KeyboardInterrupt

    monkeypatch.setattr("logratio.benchmarks.verify.verify", rows)
    with pytest.raises(KeyboardInterrupt):
        main(["--method", "orpo"])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["orpo", "oracle", "float64", "1.0e-16", "2.0e-15", "yes", "orpo"]
