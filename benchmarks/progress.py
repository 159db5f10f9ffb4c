"""What a command that takes minutes is doing: a bar on a terminal, and lines as they come everywhere."""

from __future__ import annotations

from types import TracebackType

from rich import progress
from rich.console import Console


def say(console: Console, line: str) -> None:
    """Print it as it is, as long as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """A bar below the lines that `say` prints. Where there is no terminal, the lines alone, written out at once."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn())
        self.bar = progress.Progress(
            *columns, progress.TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self.what, self.task = what, self.bar.add_task(what, total=total)

    def say(self, line: str) -> None:
        """Print it above the bar."""
        say(self.bar.console, line)

    def begin(self, name: str) -> None:
        """Show on the bar what is being done."""
        self.bar.update(self.task, description=f"{self.what}: {name}")

    def step(self, line: str = "") -> None:
        """One more is done; print what came of it."""
        if line:
            self.say(line)
        self.bar.advance(self.task)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
