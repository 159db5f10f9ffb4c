"""Every code block of the pages. By its language:

python, json, yaml with a title    written as that file into a folder of its own; JSON is parsed line by line
python                             run there, in one namespace a page; what is printed is what the comment says
sh                                 run there, word for word
console                            needs a GPU, the hub, or a checkout: options are parsed, plans are made
text                               formulas and output, not run
"""

import contextlib
import io
import json
import re
import shlex
import sys

import pytest

from logratio.benchmarks.comparing import command as compare
from logratio.benchmarks.own.command import parsed, train_words
from logratio.trainers import cli
from logratio.trainers.config import RunConfig
from logratio.trainers.options import parse_train

from ._pages import PAGES, ROOT, blocks, text_of

LANGUAGES = {"python", "json", "yaml", "sh", "console", "text"}
INSTALLING = {"make install", "source .venv/bin/activate"}


def lines_of(text):
    """Commands, those that go on behind a backslash whole."""
    return text.replace("\\\n", " ").splitlines()


def runs(page):
    return any(block.language in ("sh", "python") for block in blocks(page))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_that_says_what_is_done_with_it(page):
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert len(re.findall(r"^```", text_of(page), re.MULTILINE)) == 2 * len(blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)])
def test_what_can_run_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, space = set(sys.modules), {"__name__": "page"}
    for language, title, text in blocks(page):
        if title:
            (tmp_path / title).write_text(text)
        if language == "json":
            assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
        elif language == "sh":
            for line in lines_of(text):
                program, *words = shlex.split(line)
                assert program == "logratio" and cli.main(words) == 0, line
        elif language == "python":
            prints(text, page, space)
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]
    if page.startswith("methods/"):
        has_its_metrics(page, tmp_path)
    told = capsys.readouterr().out
    for block in blocks(page):
        assert block.language != "text" or "saved in" not in block.text or block.text in told


def prints(text, page, space):
    """Run a block; each `print(...)  # this` prints this."""
    said = re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, page, "exec"), space)
    lines = printed.getvalue().splitlines()
    assert (lines if said and len(lines) == len(said) else lines[-len(said) :] if said else []) == said


def has_its_metrics(page, folder):
    """All names in the table of metrics are in the log of the page's own run."""
    method = page.removeprefix("methods/").removesuffix(".md")
    last = json.loads((folder / "runs" / method / "metrics.jsonl").read_text().splitlines()[-1])
    table = text_of(page).split("## Metrics")[1].split("\n\n")[1]
    names = [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert names and set(names) <= last.keys(), set(names) - last.keys()


CONSOLE = [
    (page, line.removeprefix("$ "))
    for page in PAGES
    for block in blocks(page)
    if block.language == "console"
    for line in lines_of(block.text)
]


@pytest.mark.parametrize("page, line", CONSOLE)
def test_what_needs_a_gpu_or_the_hub_has_options_that_there_are(page, line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(line)
    if line in INSTALLING:
        return
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "train":
        assert program == "logratio" and isinstance(parse_train(words[1:]).resolved(1), RunConfig)
    elif words[0] == "compare":
        those, options, common = compare.parsed(words[1:])
        configs = [one.config(common) for one in those]
        assert program == "logratio" and options.budget and len(configs) > 1
    elif words[0] == "bench":
        assert program == "logratio" and isinstance(parse_train(train_words(*parsed(words[1:]))), RunConfig)
    else:
        assert program == "logratio" and words[0] == "plan" and cli.main(words) == 0
        assert "predicted peak memory" in capsys.readouterr().out
