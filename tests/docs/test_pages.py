"""What the pages say is what the sources say: generated parts, messages, links, and the costs of the methods."""

import ast
import re
from functools import cache

import pytest

from logratio.benchmarks.documents import ORDER, PARTS, filled
from logratio.benchmarks.memory.peak import Setup
from logratio.benchmarks.memory.roofline import passes
from logratio.losses import LOSSES

from ._pages import DOCS, PAGES, ROOT, messages, text_of


@pytest.mark.parametrize("page", PARTS)
def test_what_is_generated_is_up_to_date(page, monkeypatch):
    """Else: python -m logratio.benchmarks.documents"""
    if page == "coming_from_trl.md":
        pytest.importorskip("trl")
    monkeypatch.chdir(ROOT)
    assert filled(page, text_of(page)) == text_of(page)


def test_every_method_has_a_page():
    assert {path.stem for path in (DOCS / "methods").iterdir()} == set(LOSSES) == set(ORDER)


@cache
def strings() -> list[str]:
    """All texts of the sources, with a NUL for what an f-string puts in."""
    found = []
    for folder in ("trainers", "losses"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


QUOTED = [(page, message) for page in PAGES for message in messages(page)]


@pytest.mark.parametrize("page, message", QUOTED)
def test_a_quoted_message_is_one_of_the_programs(page, message):
    said = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
    assert len(message) > 15 and any(said.search(text) for text in strings()), message


def test_the_passes_are_the_plans():
    rows = re.findall(r"^\| ([A-Z, ]+) \| (\d)[^|]* \| (\d) \|", text_of("start/which_method.md"), re.MULTILINE)
    told = {name.lower(): (int(a), int(b)) for names, a, b in rows for name in names.split(", ")}
    assert set(told) == set(LOSSES)
    for method, (with_gradient, without) in told.items():
        assert (with_gradient, without) == (1, sum(passes(Setup(method=method))))


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(page))
    assert [link for link in links if "://" not in link and not ((DOCS / page).parent / link).exists()] == []
