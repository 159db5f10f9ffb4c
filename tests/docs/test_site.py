"""The site is built without a warning: no page outside of the navigation, no link or anchor to nowhere, no network."""

import re
import subprocess
import sys

import pytest

from ._pages import ROOT

pytest.importorskip("material")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if re.match("WARNING|ERROR|Aborted", line)]
    assert (done.returncode, told) == (0, []), done.stderr
    return folder


def test_every_page_is_there(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    made = {path.parent.relative_to(site) for path in site.rglob("index.html")} - {site.relative_to(site)}
    assert {str(page) for page in pages if str(page) != "index"} == {str(page) for page in made}


def test_what_a_page_loads_is_in_the_site(site):
    for path in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]*?(?:src|href)="?([^" >]+)', path.read_text())
        away = [one for one in loaded if re.match(r"(https?:)?//", one)]
        assert away == [], path
        if path.name == "index.html":
            assert all((path.parent / one.partition("?")[0]).exists() for one in loaded if not one.startswith("data:"))


def test_no_link_leads_out_of_the_site(site):
    """Files of the repository are named, and not linked."""
    text = (site / "totals" / "index.html").read_text()
    assert "<code>losses/types.py</code>" in text and "../../losses" not in text
