"""README.md and its like: Python runs and prints what it says, quoted code and named files exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_python_runs_and_prints_what_it_says_or_is_the_sources_own() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    quoted, run = [b for b in blocks if "import " not in b], [b for b in blocks if "import " in b]
    assert len(quoted) == len(run) == 1
    assert quoted[0] in (ROOT / "losses" / "dpo.py").read_text()
    said = re.findall(r"^print\(.*\)  # (.*)$", run[0], re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(run[0], "README.md", "exec"), {})
    assert printed.getvalue().splitlines() == said != []


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/totals.md",
        "docs/laws.md",
        "docs/atlas.md",
        "docs/coming_from_trl.md",
        "docs/training.md",
    ],
)
def test_what_a_document_links_to_exists(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_its_layout_is_the_trees() -> None:
    layout = (ROOT / "CONTRIBUTING.md").read_text()
    layout = layout[layout.index("## Layout") :]
    folders: list[str] = []
    for indent, names in re.findall(r"^    ( *)((?:[a-z]+(?:/|\.py)(?:, )?)+)", layout, re.MULTILINE):
        if not indent:
            folders.append(names)
        for name in names.split(", "):
            assert (ROOT / (folders[-1] if indent else "") / name).exists(), name
    top = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert top - {"build/"} <= set(folders)
    for folder in ("trainers", "benchmarks"):
        for path in (ROOT / folder).iterdir():
            if (path / "__init__.py").exists():
                assert re.search(rf"^      {path.name}/", layout, re.MULTILINE), f"{folder}/{path.name} is not in it"
