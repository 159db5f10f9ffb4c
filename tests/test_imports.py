"""The direction of imports, floor by floor: losses <- trainers <- benchmarks; reference apart from what it judges.

One exception: the laws speak of losses in the vocabulary of `losses/types.py`, which has no formula in it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("losses", "trainers", "reference", "benchmarks")
MAY_IMPORT = {
    "losses": {"losses"},
    "trainers": {"losses", "trainers"},
    "reference": {"reference"},
    "benchmarks": set(FOLDERS),
}

# The rooms from the ground up: a folder with all that is in it, or a file. Rooms on one floor do not know each other.
FLOORS = (
    ("losses",),
    ("trainers/errors.py",),
    ("trainers/ground", "trainers/logs", "trainers/processes"),
    ("trainers/config",),
    ("trainers/optimizer.py", "trainers/health.py"),
    ("trainers/data",),
    ("trainers/batches",),
    ("trainers/memory.py",),
    ("trainers/attention",),
    ("trainers/layers",),
    ("trainers/policy",),
    ("trainers/window.py",),
    ("trainers/step.py", "trainers/checkpoints"),
    ("trainers/growing.py", "trainers/rollout"),
    ("trainers/preflight.py",),
    ("trainers/setup.py",),
    ("trainers/resume.py", "trainers/evaluating.py"),
    ("trainers/loop.py", "trainers/trl_names"),
    ("trainers/demo_parts.py", "trainers/options.py"),
    ("trainers/cli.py", "trainers/demo.py", "trainers/migrate.py"),
    ("trainers/classes", "trainers/after"),
    ("benchmarks/memory", "benchmarks/peers", "benchmarks/progress.py", "benchmarks/reporting"),
    ("benchmarks/measure", "benchmarks/projects"),
    ("benchmarks/planned.py", "benchmarks/suites.py", "benchmarks/trl_options.py", "benchmarks/verify.py"),
    ("benchmarks/plan.py",),
    ("benchmarks/pages",),
    ("benchmarks/own", "benchmarks/comparing"),
    ("benchmarks/atlas.py", "benchmarks/bench.py", "benchmarks/documents.py", "benchmarks/report.py"),
    ("benchmarks/gallery", "benchmarks/profile.py"),
)

VOCABULARY = "logratio.losses.types"
SPEAK_IT = {"_law_book.py", "_law_runs.py", "family_laws.py", "family_laws_grpo.py", "laws.py"}
SPEAK_IT |= {"generic_laws.py", "gradient_laws.py"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import of a file, whole or in a function; relative ones resolved."""
    package = ["logratio", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from logratio import losses` and `from . import dpo` name modules behind the keyword
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no files in {folder}"
    return found


def room_of(path: Path) -> tuple[int, str] | None:
    """(floor, room) of a file or folder of the repository; None where no floor has it."""
    parts = path.relative_to(ROOT).parts
    above = {"/".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return next(((n, room) for n, floor in enumerate(FLOORS) for room in floor if room in above), None)


def file_of(name: str) -> Path:
    """The module that an absolute dotted name of ours leads to, which may name something inside it."""
    path = ROOT
    for part in name.split(".")[1:]:
        if (path / f"{part}.py").is_file():
            return path / f"{part}.py"
        if not (path / part).is_dir():
            break
        path = path / part
    return path / "__init__.py"


def test_every_file_has_its_floor():
    product = [path for folder in ("losses", "trainers", "benchmarks") for path in files(folder)]
    homeless = [str(path.relative_to(ROOT)) for path in product if room_of(path) is None]
    assert [name for name in homeless if not name.endswith("__init__.py")] == [], "enter them into FLOORS"
    assert [room for floor in FLOORS for room in floor if not (ROOT / room).exists()] == []


@pytest.mark.parametrize("folder", ["losses", "trainers", "benchmarks"])
def test_imports_go_down(folder):
    """From a room to one on a lower floor, or within a room."""
    wrong = []
    for path in files(folder):
        here = room_of(path)
        for line, name in imports(path):
            if here is None or not name.startswith("logratio.") or name.startswith("logratio.reference."):
                continue
            there = room_of(file_of(name))
            if there is not None and there != here and there[0] >= here[0]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "what both need belongs on a lower floor"


@pytest.mark.parametrize("folder", FOLDERS)
def test_direction(folder):
    wrong = []
    for path in files(folder):
        for line, name in imports(path):
            parts = name.split(".")
            if folder == "reference" and path.name in SPEAK_IT and f"{name}.".startswith(f"{VOCABULARY}."):
                continue
            if parts[0] == "logratio" and parts[1] not in MAY_IMPORT[folder]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_losses_import_only_torch_and_the_standard_library():
    """Triton too, in the one file that is only imported where it is used."""
    allowed = sys.stdlib_module_names | {"torch", "logratio"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files("losses")
        for line, name in imports(path)
        if name.split(".")[0] not in (allowed | {"triton"} if path.name.startswith("_triton") else allowed)
    ]
    assert not wrong


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_nothing_imports_by_the_bare_folder_name(folder):
    """`import losses` works from the checkout and nowhere else."""
    bare = {*FOLDERS, "tests"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(folder)
        for line, name in imports(path)
        if name.split(".")[0] in bare
    ]
    assert not wrong


def loaded_by(module: str) -> set[str]:
    """Top-level and logratio's own modules in sys.modules after importing `module` in a fresh interpreter."""
    code = (
        f"import sys, torch; import {module}\n"
        "print(*{'.'.join(m.split('.')[:2]) if m.startswith('logratio') else m.split('.')[0] for m in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(out.stdout.split())


def test_losses_load_none_of_the_heavy_libraries():
    loaded = loaded_by("logratio.losses")
    assert "logratio.losses" in loaded and "torch" in loaded
    heavy = {"transformers", "accelerate", "peft", "datasets", "trl", "hypothesis", "bitsandbytes", "tyro", "triton"}
    assert not loaded & (heavy | {f"logratio.{folder}" for folder in FOLDERS[1:]})


def test_the_property_kit_loads_neither_what_it_tests_nor_trl():
    loaded = loaded_by("logratio.reference.strategies")
    assert "logratio.reference" in loaded
    assert not loaded & {"logratio.losses", "logratio.trainers", "logratio.benchmarks", "trl", "transformers"}


def run(code: str) -> "subprocess.CompletedProcess[str]":
    """In a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")


def test_the_list_of_commands_is_shown_without_loading_any():
    done = run(
        "import sys; from logratio.trainers.cli import main; status = main(['--help'])\n"
        "print(*{m.split('.')[0] for m in sys.modules} | {m for m in sys.modules if m.startswith('logratio.')})\n"
        "sys.exit(status)"
    )
    *shown, loaded = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == ""
    assert any(line.startswith("verify          Compare every loss with TRL") for line in shown)
    heavy = {"torch", "numpy", "transformers", "tyro", "yaml", "rich", "datasets", "peft"}
    assert not set(loaded.split()) & (heavy | {"logratio.losses", "logratio.benchmarks.verify", "logratio.reference"})


def test_bitsandbytes_does_not_ask_for_a_package_that_nothing_here_uses(caplog):
    """PEFT imports it; on a CPU with AVX512-BF16 it would."""
    import bitsandbytes.backends.cpu.ops as ops

    import logratio.trainers  # noqa: F401

    texts = [
        node.value for node in ast.walk(ast.parse(Path(ops.__file__).read_text())) if isinstance(node, ast.Constant)
    ]
    (asked,) = {text for text in texts if isinstance(text, str) and text.startswith("Failed to load CPU gemm_4bit")}
    ops.logger.warning(asked, ImportError("No module named 'kernels'"))
    ops.logger.warning("another warning")
    assert [record.getMessage() for record in caplog.records] == ["another warning"]


def test_a_variant_is_a_screenful():
    """At most 15 lines of code for each function of the files that hold variants, docstring apart."""
    long = {}
    folder = ROOT / "losses"
    paths = [*(folder / "dpo_types").glob("*.py"), folder / "advantages" / "formulas.py"]
    for path in (*paths, *(folder / "grpo_types").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if lines > 15:
                    long[node.name] = lines
    assert not long
