"""The mutation check: the mistakes it makes, those it must not make, and that it tells killed from survived."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tools(monkeypatch):
    """A module of the check by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    return importlib.import_module


@pytest.fixture
def mutants(tools):
    return tools("_mutations").mutants


def changed(mutants, source: str, inside: str = "def f(x, y, mask, r) -> Tensor:\n    ") -> set[tuple[str, str, str]]:
    return {(m.kind, m.before, m.after) for m in mutants(inside + source, "losses/f.py")}


@pytest.mark.parametrize(
    ("source", "kind", "before", "after"),
    [
        ("return -x", "sign", "-x", "x"),
        ("return x * y", "sign", "x * y", "-(x * y)"),
        ("z = logsigmoid(x)", "sign", "logsigmoid(x)", "logsigmoid(-x)"),
        ("z = x.exp()", "sign", "x.exp()", "(-x).exp()"),
        ("z = x.exp()", "function", "x.exp()", "x.expm1()"),
        ("z = x.exp_()", "function", "x.exp_()", "x.expm1_()"),
        ("z = torch.log(x)", "function", "torch.log(x)", "torch.log1p(x)"),
        ("z = x.sum(-1)", "function", "x.sum(-1)", "x.mean(-1)"),
        ("z = x.sum(-1)", "constant", "-1", "0"),
        ("z = torch.min(x, y)", "function", "torch.min(x, y)", "torch.max(x, y)"),
        ("z = max(x, y)", "function", "max(x, y)", "min(x, y)"),
        ("z = x + y", "operator", "x + y", "x - y"),
        ("z = x * y", "operator", "x * y", "x / y"),
        ("z += y", "operator", "z += y", "z -= y"),
        ("z = x ** 2", "power dropped", "x ** 2", "x"),
        ("z = -1 / x", "sign", "-1", "1"),
        ("z = x & mask", "operator", "x & mask", "x | mask"),
        ("z = x & mask", "mask dropped", "x & mask", "x"),
        ("z = ~mask", "mask inverted", "~mask", "mask"),
        ("z = x and y", "operator", "x and y", "x or y"),
        ("z = x < y", "comparison", "x < y", "x <= y"),
        ("z = x < y", "comparison", "x < y", "x >= y"),
        ("z = x is None", "comparison", "x is None", "x is not None"),
        ("z = x if mask else y", "condition", "mask", "not mask"),
        ("z = True", "boolean", "True", "False"),
        ("z = [0, 1, 2, 0.5]", "constant", "0.5", "0.75"),
        ("z = [0, 1, 2, 0.5]", "constant", "0", "1"),
        ("z = x.where(mask, y)", "mask dropped", "x.where(mask, y)", "x"),
        ("z = torch.where(mask, x, y)", "mask dropped", "torch.where(mask, x, y)", "x"),
        ("z = Mean.of(x, mask)", "mask dropped", "Mean.of(x, mask)", "Mean.of(x)"),
        ("z = x.detach()", "detach dropped", "x.detach()", "x"),
        ("z = x.clamp(min=1)", "bound dropped", "x.clamp(min=1)", "x"),
        ("z = x.clamp(min=1)", "function", "x.clamp(min=1)", "x.clamp(max=1)"),
        ("z = x.clamp(0, y)", "bound dropped", "x.clamp(0, y)", "x.clamp(None, y)"),
        ("z = x.abs()", "call dropped", "x.abs()", "x"),
        ("z = r.chosen / r.rejected", "attribute", "r.chosen", "r.rejected"),
        ("chosen = x; rejected = chosen", "name", "chosen", "rejected"),
        ("z = r.sums + r.averages", "attribute", "r.sums", "r.averages"),
        ("check(x)", "statement dropped", "check(x)", "pass"),
        ("raise ValueError(1 + 2)", "raise dropped", "raise ValueError(1 + 2)", "pass"),
    ],
)
def test_the_mistakes_of_a_formula_are_made(mutants, source, kind, before, after):
    assert (kind, before, after) in changed(mutants, source)


def test_defaults_are_changed(mutants):
    assert changed(mutants, "class A:\n    beta: float = 0.5", "") == {("constant", "0.5", "0.75")}
    assert changed(mutants, "def f(x=1): ...", "") == {("constant", "1", "2")}


@pytest.mark.parametrize(
    "source",
    [
        '"""Docstring: -x + 1 < 2."""',
        "z: Literal[1] | None",
        "def g(x: Literal[-1] | None) -> A | B: ...",
        "import a.b",
        "if TYPE_CHECKING:\n        z = 1 + 2",
        "@overload\n    def g(x=1): ...",
        "__all__ = ['a'] + ['b']",
        "z = f'{x + 1}'",
        "z = g(y, dtype=x.max())",
        "z = TypeVar('z', bound=A | B)",
    ],
)
def test_what_is_no_formula_is_left_alone(mutants, source):
    assert changed(mutants, source) == set()


def test_a_raise_is_dropped_whole_and_its_message_left_alone(mutants):
    assert {kind for kind, *_ in changed(mutants, "raise ValueError(f'{x}' + 'y', -x)")} == {"raise dropped"}


@pytest.mark.parametrize("name", ["orpo.py", "sft.py"])
def test_every_mutant_compiles_differs_and_has_a_name_of_its_own(mutants, name):
    source = (ROOT / "losses" / name).read_text()
    found = mutants(source, name)
    sources = {m.source for m in found} | {ast.unparse(ast.parse(source))}
    assert len(sources) == len(found) + 1 and len({m.name for m in found}) == len(found)
    for m in found:
        compile(m.source, name, "exec")
        assert source.splitlines()[m.line - 1].strip() == m.text


def test_a_child_that_is_late_is_killed_and_one_that_dies_is_noticed(tools, tmp_path):
    survived = {"status": "survived", "by": ""}
    tasks = [
        ("late", lambda: time.sleep(60), 0.3),
        ("dead", lambda: os._exit(3), 9.0),
        ("wrong", lambda: 1 / 0, 9.0),
        ("fine", lambda: survived, 9.0),
    ]
    results = dict(tools("_mutation_runs").in_children(tasks, 2, tmp_path))
    assert {name: result["status"] for name, result in results.items()} == {
        "late": "timeout",
        "dead": "killed",
        "wrong": "error",
        "fine": "survived",
    }


def test_a_result_holds_while_the_code_is_the_same(tools, mutants):
    identity = tools("mutants").identity
    before, moved, other = (
        identity(mutants(f'"""{text}"""\ndef f(x):\n    return x + {number}', "losses/f.py")[0])
        for text, number in (("One.", 5), ("Two\n\nlines.", 5), ("One.", 6))
    )
    assert before == moved != other


@pytest.mark.parametrize(
    ("survivors", "reasons", "status"),
    [([], [], 0), ([3], [], 1), ([3], [3], 0), ([3], [4], 1), ([3, 4], [3, 4], 1)],
    ids=["none", "without a reason", "with a reason", "with a reason for another", "too many"],
)
def test_the_status_is_1_for_a_survivor_without_a_reason_or_a_low_rate(
    tools, mutants, tmp_path, survivors, reasons, status
):
    source = "def f(x):\n" + "\n".join(f"    x[{i}] = x + 0" for i in range(20))
    found = [m for m in mutants(source, "losses/f.py") if m.kind == "constant"] + mutants("x = 2 * 3", "losses/g.py")
    records = {m.name: {"name": m.name, "status": "killed", "by": ""} for m in found}
    for i in survivors:
        records[found[i].name]["status"] = "survived"
    entries = [f'file = "{m.file}"\nline = "{m.text}"\nkind = "{m.kind}"' for m in found]
    changes = [f'change = "{m.before} -> {m.after}"\nreason = "equivalent: it is zero"' for m in found]
    text = "\n".join(f"[[accepted]]\n{entries[i]}\n{changes[i]}" for i in reasons) or "accepted = []"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/mutants_accepted.toml").write_text(text)
    assert 1 / len(found) < 1 - tools("mutants").LOWEST_RATE < 2 / len(found)
    assert tools("mutants").summary(found, records, tmp_path, tmp_path / "out.json") == status
    table = json.loads((tmp_path / "out.json").read_text())["files"]["all"]
    assert table["survived"] == len(survivors) and table["accepted"] == len(set(survivors) & set(reasons))


FORMULA = '''"""A loss."""
LIMIT = 5.0
assert LIMIT > 4


def loss(x: float) -> float:
    """-2 x, at most LIMIT"""
    if x > 9:
        return unseen * 3
    return min(-x * 2, LIMIT)
'''
TESTS = """from logratio.losses.small import loss

def test_value():
    assert loss(1.5) == -3
"""


@pytest.mark.slow
def test_killed_and_survived_from_end_to_end(tmp_path):
    """The sign is seen by the test, the limit is not; a new test is run on what survived, and on nothing else."""
    files = {"losses/__init__.py": "", "losses/small.py": FORMULA, "tests/losses/test_small.py": TESTS}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def run() -> tuple[int, dict[tuple[str, str], str], str]:
        command = [sys.executable, ROOT / "tests" / "mutants.py", "--root", tmp_path, "losses/small.py"]
        done = subprocess.run([*command, "--report", tmp_path / "out.json"], capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        rows = json.loads((tmp_path / "out.json").read_text())["mutants"]
        return done.returncode, {row["name"].split(" ", 1)[1]: row["status"] for row in rows}, done.stdout

    status, verdicts, output = run()
    assert status == 1
    assert verdicts["sign '-x' -> 'x'"] == "killed"
    assert verdicts["operator '-x * 2' -> '-x / 2'"] == "killed"
    assert verdicts["comparison 'x > 9' -> 'x <= 9'"] == "killed"
    assert verdicts["constant '5.0' -> '7.5'"] == "survived"
    assert verdicts["constant '3' -> '4'"] == "survived"  # no test runs it
    assert verdicts["comparison 'LIMIT > 4' -> 'LIMIT <= 4'"] == "incompetent"
    assert "losses/small.py:2:9 constant '5.0' -> '7.5'\n      LIMIT = 5.0" in output

    # with a reason it is not run, and lives
    entry = 'file = "losses/small.py"\nline = "LIMIT = 5.0"\nkind = "constant"\nplace = {}\nreason = "as good"'
    accepted = tmp_path / "tests/mutants_accepted.toml"
    for place, lives in ((8, False), (9, True)):
        accepted.write_text("[[accepted]]\n" + entry.format(place))
        assert ("accepted: as good" in run()[2]) == lives
    accepted.unlink()

    test = tmp_path / "tests/losses/test_small_limit.py"
    test.write_text("from logratio.losses import small\n\ndef test_limit():\n    assert small.loss(-8) == 5\n")
    accepted.write_text("[[accepted]]\n" + entry.format(9))
    assert run()[1]["constant '5.0' -> '7.5'"] == "survived"
    accepted.unlink()
    status, verdicts, output = run()
    assert verdicts["constant '5.0' -> '7.5'"] == "killed"
    assert "sign '-x' -> 'x'" not in output
    assert status == 1
