"""What docs/laws.md shows works as it stands: what is right keeps the laws, broken forms are found out."""

import contextlib
import dataclasses
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from logratio.losses import CompletionLogps, PairLogps, Totals
from logratio.reference import trainer_laws
from logratio.reference.function_laws import advantage, kernel
from logratio.reference.laws import LAWS, LawViolation, check_loss
from logratio.trainers import RunConfig, cli

DOCUMENT = (Path(__file__).parents[1] / "docs" / "laws.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)


def assert_shown(violation, block):
    """The document shows the message; Hypothesis may come to other numbers some day."""
    said, shown = f"LawViolation: {violation}".splitlines(), block.splitlines()
    assert said[0] == shown[0] and len(said) == len(shown)
    for ours, documents in zip(said, shown, strict=True):
        assert re.sub(r"[-\d._]+", "", ours) == re.sub(r"[-\d._]+", "", documents)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A working directory with the document's module in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_loss.py").write_text(blocks("python")[0])
    yield tmp_path
    sys.modules.pop("my_loss", None)


def test_it_keeps_the_laws(workspace, monkeypatch):
    """The document's own lines, on fewer batches."""
    tried = []

    def fewer(loss, max_examples=50):
        tried.append(loss)
        check_loss(loss, max_examples=5)

    monkeypatch.setattr("logratio.reference.laws.check_loss", fewer)
    exec(blocks("python")[1], {})
    assert [loss.beta for loss in tried] == [0.1, 2.0]


def test_its_broken_form_is_found_out_as_the_document_says(workspace):
    right = blocks("python")[0]
    wrong = right.replace("per_pair.sum() / totals.num_sequences", "per_pair.mean()")
    assert wrong != right
    module: dict = {"__name__": "wrong"}
    sys.modules["wrong"] = sys  # dataclasses look their module up
    try:
        exec(wrong, module)
        with pytest.raises(LawViolation) as violation:
            check_loss(module["SquaredHinge"]())
    finally:
        del sys.modules["wrong"]
    assert_shown(violation.value, blocks("text")[0])


def test_it_trains(workspace):
    (command,) = blocks("sh")
    program, *words = shlex.split(command)
    assert program == "logratio" and cli.main(words) == 0
    rows = [json.loads(line) for line in (workspace / "runs" / "own" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(1.0, rel=1e-5)  # the policy is the reference: every margin is 0
    assert {"rewards/margins", "grad_norm"} <= rows[0].keys()
    config = json.loads((workspace / "runs" / "own" / "run_config.json").read_text())
    assert config["loss"] == {"beta": 0.2}


def test_its_trainer_keeps_the_laws_and_its_broken_form_does_not():
    printed, space = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(blocks("python")[2], space)
    assert printed.getvalue() == blocks("text")[1]
    told = re.search(r"Had it divided by `(.*)`, a mean of means", DOCUMENT)
    wrong = blocks("python")[2].replace("/ count(window)", f"/ ({told[1]})")
    with pytest.raises(LawViolation) as violation:
        exec(wrong, {})
    assert_shown(violation.value, blocks("text")[2])


def test_its_advantages_and_heads_keep_the_laws():
    exec(blocks("python")[3], {})


def test_its_own_properties_hold_and_a_wrong_one_does_not(workspace):
    module: dict = {"__name__": "properties"}
    exec(blocks("python")[-1], module)
    module["test_it_is_not_negative"]()
    module["test_it_is_1_where_the_policy_is_the_reference"]()
    wrong: dict = {"__name__": "properties"}
    exec(blocks("python")[-1].replace("batch, 1.0)", "batch, 2.0)").replace(">= 0", ">= 0.5"), wrong)
    for name in ("test_it_is_not_negative", "test_it_is_1_where_the_policy_is_the_reference"):
        with pytest.raises(AssertionError):
            wrong[name]()


def test_from_python_it_is_a_run_as_well(workspace):
    """As the page has it; and what it is called with has the names of its table."""
    loss = importlib.import_module("my_loss").SquaredHinge()
    assert 'RunConfig(method="custom", loss=SquaredHinge(), ...)' in DOCUMENT
    assert RunConfig(method="custom", loss=loss).as_dict()["loss"] == {"beta": 0.1}
    table = DOCUMENT.split("What it\nis called with has")[1].split("Hold it to the laws")[0]
    named = set(re.findall(r"`(?:policy|totals)?\.(\w+)`", table))
    classes = (PairLogps, CompletionLogps, Totals)
    known = {name for one in classes for name in (*vars(one), *(f.name for f in dataclasses.fields(one)))}
    assert {"chosen", "sums", "num_tokens"} <= named <= known, named - known


TABLES = {
    "A loss of your own": LAWS,
    "A trainer": trainer_laws.LAWS,
    "An advantage, a head": {**advantage.LAWS, **kernel.LAWS},
}


@pytest.mark.parametrize("section", TABLES)
def test_every_law_is_in_its_table(section):
    text = DOCUMENT.split(f"## {section}\n")[1].split("\n## ")[0]
    table = re.findall(r"^\| (`.*`) \|", text, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(table))) == sorted(TABLES[section])
