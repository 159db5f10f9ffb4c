"""Which small mistakes in losses/ would the tests let live? `make mutants`, or `python tests/mutants.py [FILES...]`.

Each mutant is one mistake (`_mutations.py`): a sign, an operator, a comparison, a constant, a mask or a bound dropped.
It is run, in a forked child, by the tests that run its line: first those of its own file, the quickest first, then the
rest of tests/losses, then the comparison with TRL and the oracle (not with --quick). It is

    killed       if a test fails or can no longer be collected, or the process dies;
    timeout      if the tests take several times what they took unchanged: a kill;
    incompetent  if `logratio.losses` can no longer be imported: no test was asked, it is left out of the rate;
    survived     otherwise, and where no test runs its line.

Rate = (killed + timeout) / (killed + timeout + survived). A mutant with an accepted reason (mutants_accepted.toml) is
not run and counts as a survivor. Status 1 where the rate is below 97 % or a survivor has no reason, 2 where the
unchanged sources fail.

Results are kept in build/mutants.jsonl. A result holds while the mutant's source and the test files it rests on are the
same: for a kill the file that killed, for a survivor all; so after a new test only that file runs again, on the
survivors. --fresh forgets them, as one should where a file changed that another one's formulas rest on. Sources and
tests must not be edited while it runs.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _mutation_runs import IMPORTED, baseline, import_all, in_children, trial
from _mutations import Mutant, mutants

ROOT = Path(__file__).parents[1]
ACCEPTED = "tests/mutants_accepted.toml"
LOWEST_RATE = 0.97
OWN = {"_two_gemm": "logps", "_jsd_tile": "jsd"}
"""Whose tests are a file's own, where not its name's."""
AT_IMPORT = "tests/losses/test_options.py"
"""Asks what a class says of itself, without running a line of it."""
APART = "_triton"
"""How the names of files begin that run in a process of their own, under Triton's interpreter, which would not see a
mutant."""
SHARED = ("tests/conftest.py", "tests/losses/conftest.py", "reference/strategies.py")
ORACLE = tuple(
    f"reference/oracle/{name}.py"
    for name in (
        "_math",
        "cpo",
        "dpo",
        "dpo_pairs",
        "grpo",
        "grpo_step",
        "grpo_tokens",
        "head",
        "kto",
        "sampling",
        "sft",
    )
)
TRUTHS = tuple(
    f"benchmarks/{name}.py"
    for name in (
        "peers/case",
        "peers/cases",
        "peers/cases_offline",
        "peers/randoms",
        "peers/sides",
        "peers/truths",
        "verify",
    )
)
LAST = {"tests/benchmarks/test_verify.py": (*TRUTHS, *ORACLE, "reference/trl.py")}
"""Test files outside tests/losses that survivors meet last, and what they rest on."""
ENVIRONMENT = {"CI": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="sources to mutate (default: all of losses/)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--only", type=int, metavar="LINE", help="only the mutants of this line")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of the mutants, evenly spread")
    parser.add_argument("--quick", action="store_true", help="without the comparison with TRL and the oracle")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--report", type=Path, help="JSON of the result (default: build/mutants.json)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project (default: this one)")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    found = chosen(root, args)
    if args.list:
        print(*(m.name for m in found), f"{len(found)} mutants", sep="\n")
        return 0
    os.environ.update(ENVIRONMENT)
    os.chdir(root)
    report = (args.report or root / "build" / "mutants.json").absolute()
    report.parent.mkdir(parents=True, exist_ok=True)
    run = Run(root, report, args.jobs, [] if args.quick else list(LAST), args.fresh)
    if failed := run.prepare():
        print("The unchanged sources fail:", *failed, sep="\n  ")
        return 2
    reasons = accepted_reasons(root, found)[0]
    status = summary(found, run.results(found, reasons), root, report)
    if args.only is None and not args.sample:
        files = {m.file for m in found}
        for file, line, kind in accepted_reasons(root, found)[1]:
            if file in files:
                print(f"accepted, but there is no such mutant: {file}: {kind}: {line}")
    return status


def chosen(root: Path, args: argparse.Namespace) -> list[Mutant]:
    every = (file for file in sorted((root / "losses").rglob("*.py")) if not file.name.startswith(APART))
    files = [(root / f).resolve() for f in args.files] or list(every)
    found = [m for file in files for m in mutants(file.read_text(), file.relative_to(root).as_posix())]
    found = [m for m in found if args.only in (None, m.line)]
    return found[:: max(1, -(-len(found) // args.sample))] if args.sample else found


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def identity(mutant: Mutant) -> str:
    """Of the mutant's code: documentation may change."""
    tree = ast.parse(mutant.source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant("")
    return digest(mutant.file, ast.dump(tree))


class Run:
    """The tests of one project, and what is known of its mutants."""

    def __init__(self, root: Path, report: Path, jobs: int, last: list[str], fresh: bool):
        self.root, self.jobs, self.report = root, jobs, report
        self.store = report.with_suffix(".jsonl")
        self.last = [file for file in last if (root / file).exists()]
        self.losses = [f.relative_to(root).as_posix() for f in sorted((root / "tests/losses").glob("test_*.py"))]
        self.versions = {file: self.version(file, *SHARED, *LAST.get(file, ())) for file in self.losses + self.last}
        self.known: dict[str, dict[str, Any]] = {}
        if fresh:
            self.store.unlink(missing_ok=True)
        if self.store.exists():
            records = map(json.loads, self.store.read_text().splitlines())
            self.known = {record["id"]: record for record in records}
        self.scratch = report.parent / "mutants"
        self.scratch.mkdir(exist_ok=True)
        self.lines: dict[str, dict[str, set[int]]] = {}
        self.seconds: dict[str, float] = {}
        self.modules: dict[str, list[str]] = {}

    def version(self, *files: str) -> str:
        return digest(*(path.read_text() for f in files if (path := self.root / f).exists()))

    def prepare(self) -> list[str]:
        """Run the tests on the unchanged sources, or read how they went; returns those that fail."""
        import_all(IMPORTED)
        import torch

        torch.set_num_threads(1)
        sources = [file.as_posix() for file in sorted((self.root / "losses").rglob("*.py"))]
        groups = {"losses": self.losses, "last": self.last}
        tasks, failed = [], []
        for name, files in groups.items():
            file = self.scratch / f"{name}-{self.version(*sources, *files, *SHARED, *sum(LAST.values(), ()))}.json"
            if file.exists():
                self.learn(name, json.loads(file.read_text()))
            elif files:
                tasks.append(((name, file), partial(baseline, self.root, files), 1800.0))
        for (name, file), result in in_children(tasks, self.jobs, self.scratch):
            failed += result.get("failed") or ([] if "seconds" in result else [f"{name}: {result['by']}"])
            if not failed:
                file.write_text(json.dumps(result))
                self.learn(name, result)
                print(f"unchanged: {len(result['seconds'])} tests pass in {result['run_s']:.0f} s", flush=True)
        return failed

    def learn(self, name: str, result: dict[str, Any]) -> None:
        at_import = result["lines"].pop("", {})
        self.lines |= {test: {f: set(n) for f, n in hits.items()} for test, hits in result["lines"].items()}
        self.seconds |= result["seconds"]
        self.modules[name] = result["modules"]
        for file, lines in at_import.items():
            self.lines.setdefault("", {}).setdefault(file, set()).update(lines)

    def stages(self, mutant: Mutant) -> list[list[str]]:
        """Test files in the order of who is likely to kill it."""
        stem = Path(mutant.file).stem
        folder = Path(mutant.file).parent.name
        name = OWN.get(stem, folder if folder.endswith("_types") or folder == "advantages" else stem)
        families = tuple(f"test_{family}_" for family in (name, name.partition("_")[0]))  # dpo's for dpo_types
        own = [f for f in self.losses if f"{Path(f).stem}_".startswith(families)]
        return [own, [f for f in self.losses if f not in own], self.last]

    def tests(self, mutant: Mutant, files: list[str]) -> list[str]:
        """Tests in `files` that can tell: those that run the line, or the file where it runs at import or always."""
        lines = set(mutant.lines or ())
        always = not lines or bool(lines & self.lines.get("", {}).get(mutant.file, set()))
        own = {*self.stages(mutant)[0], AT_IMPORT} if always else set()
        found = []
        for test in self.seconds:
            file = test.partition("::")[0]
            hits = self.lines.get(test, {}).get(mutant.file, set())
            if file in files and (file in own or (hits if always else hits & lines)):
                found.append(test)
        return sorted(found, key=self.seconds.__getitem__)

    def results(self, found: list[Mutant], accepted: Collection[str]) -> dict[str, dict[str, Any]]:
        """name -> its record, of every mutant; those that run are written down as they end. accepted: names of mutants
        that may live, and are not run."""
        records = {m.name: {"id": identity(m), "name": m.name, "status": "survived", "by": "", "on": {}} for m in found}
        for name, record in records.items():
            known = self.known.get(record["id"])
            if known and name not in accepted:
                still = {f: v for f, v in known["on"].items() if self.versions.get(f) == v}
                if known["status"] == "survived" or still == known["on"]:
                    records[name] = {**known, "name": name, "on": still}
        self.done = 0
        with self.store.open("a") as store:
            for stage in range(3):
                unknown = [m for m in found if m.name not in accepted]
                alive = [m for m in unknown if records[m.name]["status"] == "survived"]
                if stage == 2 and not self.last:
                    break
                if stage == 2 and alive:
                    import_all(self.modules.get("last", []))
                elif stage == 0:
                    import_all(self.modules.get("losses", []))
                print(f"{len(alive)} mutants before {('their own tests', 'the rest', 'TRL and the oracle')[stage]}")
                for mutant, result in in_children(self.tasks(alive, stage, records), self.jobs, self.scratch):
                    if result["status"] == "error":
                        raise RuntimeError(f"{mutant.name}: {result['by']}")
                    record = self.judge(records[mutant.name], result, self.stages(mutant)[stage])
                    store.write(json.dumps(record) + "\n")
                    store.flush()
        return records

    def tasks(self, alive: list[Mutant], stage: int, records: dict[str, dict[str, Any]]) -> Iterator[Any]:
        """What remains to be run of a stage; files that let the mutant live before are not asked again."""
        for mutant in alive:
            record = records[mutant.name]
            files = [f for f in self.stages(mutant)[stage] if f not in record["on"]]
            tests = self.tests(mutant, files)
            if tests:
                limit = 20 + 5 * sum(self.seconds[test] for test in tests)
                yield mutant, partial(trial, self.root, mutant.file, mutant.source, tests), limit
            else:
                record["on"] |= {f: self.versions[f] for f in files}

    def judge(self, record: dict[str, Any], result: dict[str, Any], files: list[str]) -> dict[str, Any]:
        """Write a result into the mutant's record."""
        record |= result
        killer = result["by"].partition("::")[0]
        if result["status"] == "survived":
            record["on"] |= {f: self.versions[f] for f in files}
        else:
            on = [killer] if killer in self.versions else [] if result["status"] == "incompetent" else files
            record["on"] = {f: self.versions[f] for f in on}
        self.done += 1
        print(f"{self.done:5} {result['run_s']:6.2f} s {result['status']:11} {record['name']}", flush=True)
        return record


def accepted_reasons(root: Path, found: list[Mutant]) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """(name of a mutant -> why it may live, entries that fit no mutant)"""
    file = root / ACCEPTED
    reasons, stale = {}, []
    for entry in tomllib.loads(file.read_text()).get("accepted", []) if file.exists() else []:
        key = entry["file"], entry["line"], entry["kind"]
        fits = [m for m in found if (m.file, m.text, m.kind) == key]
        if "change" in entry:
            fits = [m for m in fits if f"{m.before} -> {m.after}" == entry["change"]]
        if "place" in entry:
            fits = [m for m in fits if m.column == entry["place"]]
        reasons |= {m.name: entry["reason"] for m in fits if entry["reason"].strip()}
        if not fits:
            stale.append(key)
    return reasons, stale


def summary(found: list[Mutant], records: dict[str, dict[str, Any]], root: Path, report: Path) -> int:
    """Print the table and the survivors, write the report; returns the status."""
    reasons = accepted_reasons(root, found)[0]
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for m in found:
        status = records[m.name]["status"]
        for file in (m.file, "all"):
            files[file].update([status, "mutants"] + ["accepted"] * (status == "survived" and m.name in reasons))
    columns = ("mutants", "killed", "timeout", "incompetent", "survived", "accepted")
    print(f"\n{'file':24}", *(f"{c:>11}" for c in columns), f"{'rate':>8}")
    rates = {}
    for file in sorted(files, key=lambda f: (f == "all", f)):
        n = files[file]
        dead = n["killed"] + n["timeout"]
        rates[file] = dead / max(1, dead + n["survived"])
        print(f"{file:24}", *(f"{n[c]:11}" for c in columns), f"{rates[file]:8.1%}")
    survivors = [m for m in found if records[m.name]["status"] == "survived"]
    print("\nsurvivors:" if survivors else "\nno survivors")
    for m in survivors:
        print(f"  {m.name}\n      {m.text}" + (f"\n      accepted: {reasons[m.name]}" if m.name in reasons else ""))
    rows = [
        {**{k: v for k, v in records[m.name].items() if k not in ("id", "on")}, "reason": reasons.get(m.name)}
        for m in found
    ]
    table = {file: {**{c: n[c] for c in columns}, "rate": round(rates[file], 4)} for file, n in files.items()}
    report.write_text(json.dumps({"files": table, "mutants": rows}, indent=1) + "\n")
    low = bool(found) and rates["all"] < LOWEST_RATE
    return int(low or any(m.name not in reasons for m in survivors))


if __name__ == "__main__":
    sys.exit(main())
