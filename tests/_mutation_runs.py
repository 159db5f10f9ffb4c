"""One run of the tests in a child process: of the unchanged sources, or with a mutant in the place of its module."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

PLUGINS = ("_hypothesis_pytestplugin", "pytest_timeout")
"""The only ones that are loaded: of what else is installed, some take seconds."""
WITHOUT = ("cacheprovider", "unraisableexception", "faulthandler")
OPTIONS = ["-x", "-q", "--tb=no", "--import-mode=importlib"]
OPTIONS += [f"-p{name}" for name in PLUGINS] + [f"-pno:{name}" for name in WITHOUT]
IMPORTED = ("pytest", *PLUGINS, "torch", "numpy", "hypothesis.strategies")
ADDRESS_SPACE = 16 << 30  # bytes, so that a mutant that asks for everything is refused it


class Finder(importlib.abc.MetaPathFinder):
    """Finds what is below `logratio` under `root`, whatever is installed; `source` in place of the file `mutated`."""

    def __init__(self, root: Path, mutated: str = "", source: str = ""):
        self.root, self.mutated, self.source = root, mutated, source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        package, *names = fullname.split(".")
        if package != "logratio" or not names:
            return None
        file = self.root.joinpath(*names)
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        loader: Any = importlib.machinery.SourceFileLoader(fullname, str(file))
        if file.relative_to(self.root).as_posix() == self.mutated:
            loader = Mutated(fullname, str(file))
            loader.text = self.source
        return importlib.util.spec_from_file_location(fullname, file, loader=loader) if file.exists() else None


class Mutated(importlib.machinery.SourceFileLoader):
    text: str

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


class Watcher:
    """A pytest plugin: the chosen tests, in the order given; the same examples each time; what failed first."""

    def __init__(self, chosen: list[str] | None = None):
        self.rank = None if chosen is None else {test: i for i, test in enumerate(chosen)}
        self.failed: list[str] = []

    def pytest_configure(self, config: Any) -> None:
        """Shrinking and explaining an example takes minutes, and one that fails is all that matters."""
        from hypothesis import HealthCheck, Phase, settings

        phases = (Phase.explicit, Phase.generate)
        checks = list(HealthCheck)
        settings.register_profile(
            "mutants",
            derandomize=True,
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=checks,
            report_multiple_bugs=False,
        )
        settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.rank is not None:
            rank = self.rank
            items[:] = sorted((i for i in items if i.nodeid in rank), key=lambda i: rank[i.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


class Recorder(Watcher):
    """Also which lines of the losses each test runs ("": at import and collection), and how long it takes."""

    def __init__(self, root: Path):
        super().__init__()
        self.folder = str(root / "losses") + os.sep
        self.lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.seconds: dict[str, float] = {}
        self.test = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test, self.start = nodeid, time.monotonic()
        sys.settrace(self.trace)  # a test may have taken it away

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = time.monotonic() - self.start
        self.test = ""

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        return self.trace_lines if file.startswith(self.folder) else None

    def trace_lines(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines[self.test]["losses/" + frame.f_code.co_filename[len(self.folder) :]].add(frame.f_lineno)
        return self.trace_lines


def baseline(root: Path, files: list[str]) -> dict[str, Any]:
    """Run unchanged: what fails, what each test runs, and which modules the tests need besides."""
    import pytest

    sys.meta_path.insert(0, Finder(root))
    known = set(sys.modules)
    recorder = Recorder(root)
    sys.settrace(recorder.trace)
    code = pytest.main([o for o in OPTIONS if o != "-x"] + [f"--rootdir={root}", *files], plugins=[recorder])
    sys.settrace(None)
    outside = [n for n, m in sys.modules.items() if n not in known and "-packages" in str(getattr(m, "__file__", ""))]
    lines = {test: {f: sorted(n) for f, n in hits.items()} for test, hits in recorder.lines.items()}
    failed = recorder.failed or ([] if code == 0 else [f"pytest ended with {int(code)}"])
    own = ("logratio", "tests", "conftest", "__editable__")
    modules = [name for name in outside if not name.startswith(own)]
    return {"failed": failed, "lines": lines, "seconds": recorder.seconds, "modules": modules}


def trial(root: Path, file: str, source: str, tests: list[str]) -> dict[str, Any]:
    """Run `tests` with the mutant: killed by the first that fails, or incompetent where it cannot be imported."""
    import pytest

    sys.meta_path.insert(0, Finder(root, file, source))
    module = file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    try:
        importlib.import_module(f"logratio.{module}")
    except BaseException as error:
        return {"status": "incompetent", "by": f"{type(error).__name__}: {error}"[:200]}
    watcher = Watcher(tests)
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    code = pytest.main([*OPTIONS, f"--rootdir={root}", *files], plugins=[watcher])
    if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return {"status": "survived", "by": ""}
    return {"status": "killed", "by": (watcher.failed or [f"pytest ended with {int(code)}"])[0]}


def import_all(names: Iterable[str]) -> None:
    """Before the forks, so that no child has to. What does not import alone is left to the children."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        for name in names:
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children do not walk, and so do not copy, what is here


Task = tuple[Any, Callable[[], dict[str, Any]], float]
"""(its name, what the child does, its limit in seconds)"""


def in_children(tasks: Iterable[Task], jobs: int, scratch: Path, *, quiet: bool = True) -> Iterator[tuple[Any, dict]]:
    """Do each task in a forked child, `jobs` at a time; yields (name, result) as they end."""
    waiting = iter(tasks)
    running: dict[int, tuple[Any, float, float]] = {}
    try:
        while True:
            while len(running) < jobs and (task := next(waiting, None)) is not None:
                name, work, limit = task
                running[fork(work, scratch, quiet)] = name, time.monotonic(), limit
            if not running:
                return
            time.sleep(0.01)
            for pid, (name, start, limit) in list(running.items()):
                seconds = time.monotonic() - start
                ended = os.waitpid(pid, os.WNOHANG)[0] == pid
                if not ended and seconds < limit:
                    continue
                del running[pid]
                result = {"status": "killed", "by": "the process ended"}  # what it is if it left nothing behind
                if not ended:
                    kill(pid)
                    result = {"status": "timeout", "by": f"{limit:.0f} s"}
                file = scratch / f"{pid}.json"
                if file.exists():
                    result = json.loads(file.read_text()) if ended else result
                    file.unlink()
                yield name, {**result, "run_s": round(seconds, 2)}
    finally:
        for pid in running:
            kill(pid)


def fork(work: Callable[[], dict[str, Any]], scratch: Path, quiet: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        limit_memory()
        if quiet:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
        try:
            result = work()
        except BaseException as error:  # the fault of this program, not of a mutant
            result = {"status": "error", "by": f"{type(error).__name__}: {error}"}
        (scratch / f"{os.getpid()}.json").write_text(json.dumps(result))
    finally:
        os._exit(0)


def limit_memory() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = ADDRESS_SPACE if hard == resource.RLIM_INFINITY else min(ADDRESS_SPACE, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def kill(pid: int) -> None:
    """The child and all that it started."""
    for stop in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            stop(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
