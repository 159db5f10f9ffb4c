"""The page says what the lines say: ratios, ooms, the newest, their sources; of a CPU no times; and plots are drawn."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from logratio.benchmarks.report import BEGINNING, load, main, newest
from logratio.benchmarks.reporting.rows import groups, lines_of, quotient
from logratio.benchmarks.reporting.tables import number
from logratio.trainers.errors import UserError

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib: pip install -e '.[bench]'"
)
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
VERSIONS = {"torch": "2.11.0", "trl": "1.16.0"}


def record(suite: str, case: str, contestant: str, *, gpu: str = H100, date: str = "10:00:00", **fields: Any) -> dict:
    on_cpu = gpu == "cpu"
    certificate = {
        "date": f"2026-01-02T{date}+00:00", "commit": "abc123", "command": f"logratio bench {suite}", "device": gpu,
        "driver": None if on_cpu else "550.54", "cuda": None if on_cpu else "12.8", "cpu": "Quick 9000", "threads": 1,
        "python": "3.11.9", "versions": VERSIONS, "settings": {"seed": 0, "repeats": 20, "lengths": {"prompt": 7}},
    }  # fmt: skip
    fixed = {"suite": suite, "case": case, "contestant": contestant, "status": "ok", "error": None, "gpu": gpu}
    return fixed | fields | {"certificate": certificate}


def step(contestant: str, ms: float | None, mib: float | None = None, method: str = "dpo", **fields: Any) -> dict:
    """A step of 16 examples and 8000 tokens; without ms one that gave no number."""
    figures: dict[str, Any] = {"method": method, "adapter": "lora", "model": "Qwen2.5-0.5B", "workload": "gsm8k"}
    if ms is not None:
        figures |= {"step_ms_p20": 0.9 * ms, "step_ms_p50": ms, "step_ms_p80": 1.2 * ms, "peak_mem_mib": mib}
        figures |= {"tokens_per_s": 8e6 / ms, "examples_per_s": 16e3 / ms, "num_tokens": 8000}
    figures |= fields
    suite, case = figures.pop("suite", "step"), figures.pop("case", f"{method}-lora")
    return record(suite, case, contestant, **figures)


def head(contestant: str, ms: float | None, **fields: Any) -> dict:
    shape = {"hidden_size": 896, "vocab_size": 151936, "num_tokens": 8192, "dtype": "bfloat16", "head": "frozen"}
    if ms is not None:
        shape |= {"time_ms_p20": 0.9 * ms, "time_ms_p50": ms, "time_ms_p80": 1.1 * ms, "grad_hidden_err": 2e-3}
    shape |= fields
    return record(shape.pop("suite", "head"), shape.pop("case", "head-a"), contestant, **shape)


def scale(contestant: str, value: int, ms: float | None, mib: float | None = None, **fields: Any) -> dict:
    along = {"suite": "scale", "case": f"length={value}", "axis": "sequence_length", "value": value}
    return step(contestant, ms, mib, **along, **fields)


def write(folder: Path, **files: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def report(tmp_path: Path, **files: list[dict]) -> str:
    """The page that these records make."""
    results = write(tmp_path / "results", **files)
    assert main(["--results", str(results), "--out", str(tmp_path)]) == 0
    return (tmp_path / "README.md").read_text()


def lines(page: str, *words: str) -> list[str]:
    """Cells of the table lines that have all these words."""
    found = [line for line in page.splitlines() if line.startswith("|") and all(word in line for word in words)]
    return [re.sub(r"\s*\|\s*", "|", line) for line in found]


@needs_matplotlib
def test_a_step_beside_its_peers(tmp_path: Path) -> None:
    ours = step("logratio", 200, 9000, predicted_peak_mem_mib=9450, num_padded_tokens=7000, parts={"forward": 150.0})
    ours["ledger"] = {"logps_err": 1.1e-3, "grad_cosine": 0.999987, "share_changed": 0.031}
    ours |= {"padding": 0.0028, "saved_mib": 3605.2}
    theirs = step("trl", 350, 13500, grad_rel_err=2e-5, num_padded_tokens=13100, padding=0.39, saved_mib=5855.0)
    gone = step("trl+liger", None, status="oom", error="CUDA out of memory.\nTried | to allocate")
    no = step("trl", None, method="kto", status="refused", error="no | such thing")
    page = report(tmp_path, step=[gone, theirs, ours, no, step("logratio", 100, 8000, "kto")])
    assert page.startswith(BEGINNING + "`results/step.jsonl` (5 lines)")
    (mine,) = lines(page, "dpo", "logratio")
    assert mine == (
        "|dpo|logratio|200 (180-240)|40,000|80.0|1.00×|9,000|1.00×|9,450 (+5.0 %)|3,605|1.00×|8,000 (7,000; 0.28 %)||"
        "logps err 1.1e-03, grad cosine 0.999987, share changed 3.1 %||"
    )
    (peer,) = lines(page, "dpo", "trl |")
    assert "|350 (315-420)|22,857|45.7|1.75×|13,500|1.50×||5,855|1.62×|8,000 (13,100; 39 %)|2.0e-05|" in peer
    assert lines(page, "dpo", "trl+liger") == ["|dpo|trl+liger|||||||||||||out of memory: CUDA out of memory.|"]
    assert "refused: no \\| such thing" in page
    assert page.index("| dpo |") < page.index("| kto |")
    assert (
        "- step.jsonl:1-5; NVIDIA H100 80GB HBM3, driver 550.54, CUDA 12.8; commit abc123; `logratio bench step`"
        in page
    )
    assert "Python 3.11.9, torch 2.11.0, trl 1.16.0; seed 0, repeats 20, lengths (prompt 7)." in page


@needs_matplotlib
def test_the_head_and_what_it_cannot_run(tmp_path: Path) -> None:
    rows = [head("logratio (triton)", 8.0, peak_mem_mib=300, tflops=512.0, share_of_gemm=0.81, logps_err=1e-3)]
    rows += [head("logratio (two_gemm)", 10.0, peak_mem_mib=600), head("trl", 20.0, peak_mem_mib=None)]
    rows += [head("torch", None, status="failed", error="RuntimeError: no")]
    rows += [head("trl", 5.0, case="head-b", hidden_size=64)]
    page = report(tmp_path, head=rows)
    time, rate, memory, errors = lines(page, "896")
    shape = "|896|151,936|8,192|bfloat16|frozen|"
    assert time == shape + "8.00 (7.20-8.80), 1.00×|10.0 (9.00-11.0), 1.25×|20.0 (18.0-22.0), 2.50×|failed|"
    assert rate == shape + "512, 81 %|-|-|failed|"
    assert memory == shape + "300, 1.00×|600, 2.00×|-|failed|"
    assert errors.startswith(shape + "1.0e-03 / 2.0e-03 / -|")
    assert lines(page, "|", "64 |")[0].endswith("|not run|not run|5.00 (4.50-5.50)|not run|"), "no ratio to what is not"
    assert "logratio (triton) (1×) |" in page and "- torch, failed: RuntimeError: no (`head-a`)" in page


@needs_matplotlib
def test_scaling_tables_and_sources(tmp_path: Path) -> None:
    rows = [scale("logratio", 512, 100, 5000), scale("logratio", 1024, 200, 6000), scale("trl", 512, 300, 10000)]
    rows += [scale("trl", 1024, None, status="oom", error="CUDA")]
    page = report(tmp_path, scale=rows, step=[step("logratio", 1.0), step("trl", 2.0)])
    assert lines(page, "512") == [
        "|512|100 (90.0-120), 1.00×|300 (270-360), 3.00×|",
        "|512|5,000, 1.00×|10,000, 2.00×|",
    ]
    assert lines(page, "1,024")[0].endswith("|out of memory|") and "sequence length" in page
    assert "- trl, out of memory: CUDA (`length=1024`)" in page
    assert re.findall(r"^- ((?:step|scale)\.jsonl:[^;]*);", page, re.M) == ["step.jsonl:1-2", "scale.jsonl:1-4"]


@needs_matplotlib
def test_the_newest_line_counts_and_no_device_mixes_with_another(tmp_path: Path) -> None:
    rows = [step("logratio", 100.0), step("trl", 170.0, date="12:00:00"), step("trl", 999.0, date="11:00:00")]
    rows += [step("trl", 888.0), step("trl", 300.0, gpu=H200), step("logratio", 200.0, gpu=H200)]
    page = report(tmp_path, step=rows)
    first, second = page.split(f"## {H200}")
    assert "1.70×" in first and "1.50×" in second and "999" not in page and "888" not in page
    assert "- step.jsonl:1-2;" in first and "- 2 older lines of the same measurements: not shown." in first
    assert "- step.jsonl:5-6;" in second and "older line" not in second


@needs_matplotlib
def test_of_a_cpu_ratios_and_no_times(tmp_path: Path) -> None:
    rows = [step("logratio", 271.8, gpu="cpu"), step("trl", 543.6, gpu="cpu")]
    heads = [head(name, ms, gpu="cpu", tflops=ms) for name, ms in (("logratio", 27.1), ("trl", 81.3))]
    page = report(tmp_path, quick=[*rows, *heads, step("logratio", 50.0)])
    gpu, cpu = page.split("## CPU: Quick 9000\n")
    assert "50.0 (45.0-60.0)" in gpu and "ratios are shown and no times" in cpu
    assert lines(cpu, "dpo", "trl")[0].startswith("|dpo|trl|2.00×|") and lines(cpu, "896", "3.00×")
    for shown in ("272", "271", "544", "543", "27.1", "81.3", "29.4", "14.7", " ms"):
        assert shown not in cpu, shown
    assert "1 thread;" in cpu


@needs_matplotlib
def test_nothing_is_dropped(tmp_path: Path) -> None:
    """Two cases that a table's columns cannot tell apart, and a suite that has no table."""
    rows = [step("logratio", 10.0), step("logratio", 20.0, case="dpo-long"), record("learn", "x", "logratio")]
    rows += [head("logratio", 1.25, case="a"), head("logratio", 2.25, case="b")]
    page = report(tmp_path, all=rows)
    assert lines(page, "`dpo-lora`", "10.0 (") and lines(page, "`dpo-long`", "20.0 (")
    assert lines(page, "1.25 (") and lines(page, "2.25 (") and "no table for this suite yet: all.jsonl:3." in page


def test_no_results_and_malformed_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]
    for make in (lambda: None, lambda: write(tmp_path / "results", step=[])):
        make()
        assert main(words) == 2
        assert "run `logratio bench ...` first" in capsys.readouterr().err
    file = tmp_path / "results" / "step.jsonl"
    good = json.dumps(step("logratio", 1.0)) + "\n"
    for bad, said in {
        '{"suite": \n': r"step\.jsonl:2 is not JSON",
        "[]\n": r"step\.jsonl:2 is no JSON object",
        '{"suite": "step"}\n': r"step\.jsonl:2 has no 'case'",
        good.replace('"ok"', '"fine"'): r"step\.jsonl:2: status must be one of ok",
        good.replace("2026-01-02T", "soon"): r"step\.jsonl:2: the certificate has no date",
    }.items():
        file.write_text(good + bad + good)
        with pytest.raises(UserError, match=said):
            main(words)
    assert not (tmp_path / "out").exists(), "nothing is written"
    file.write_text(good + good[:50])
    assert [row["source"] for row in load(tmp_path / "results")] == ["step.jsonl:1"]


def test_without_a_run_or_results_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout, that has both, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    write(tmp_path / "benchmarks" / "results", step=[step("logratio", 1.0)])
    for words in ([], ["--out", "benchmarks"]):
        with pytest.raises(UserError) as refused:
            main(words)
        assert str(refused.value) == (
            "name a run's folder for its page (logratio report runs/latest), or the folder of measured lines for "
            "tables and plots of them (logratio report --results benchmarks/results)"
        )
    assert [path.name for path in (tmp_path / "benchmarks").iterdir()] == ["results"]


@needs_matplotlib
def test_the_report_of_results_lies_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    write(tmp_path / "benchmarks" / "results", step=[step("logratio", 1.0)])
    assert main(["--results", "benchmarks/results"]) == 0
    assert (tmp_path / "benchmarks/README.md").read_text().startswith("Generated by `logratio report` from `results/")


def test_a_page_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    results = write(tmp_path / "results", step=[step("logratio", 1.0)])
    with pytest.raises(UserError, match="not made by `logratio report`"):
        main(["--results", str(results), "--out", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


@needs_matplotlib
def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All four kinds, of a readable size and with something on them; the same lines make the same bytes."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from logratio.benchmarks.reporting.palette import COLOURS

    parts = {"reference": 40.0, "forward": 50.0, "backward": 90.0}
    rows = [step("logratio", 200, 9000, predicted_peak_mem_mib=9450, parts=parts), step("trl", 350, 13500)]
    along = [scale("logratio", 512, 100, 5000), scale("logratio", 4096, 800, 9000), scale("trl", 512, 300, 10000)]
    files = {"step": rows, "scale": [*along, scale("trl", 4096, None, status="oom")]}
    page = report(tmp_path, **files)
    named = re.findall(r"!\[.*\]\(plots/(.*)\)", page)
    made = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert sorted(named) == sorted(made) and len(made) == 4
    kinds = ("step-time-and-memory", "where-the-time-goes", "scaling", "predicted-and-measured")
    of_kind = {kind: next(name for name in made if kind in name) for kind in kinds}
    for kind, name in of_kind.items():
        image = imread(tmp_path / "plots" / name)[:, :, :3]
        height, width, _ = image.shape
        assert 700 < width < 1600 and 250 < height < 1400, (name, image.shape)
        share = (image < 0.97).any(-1).mean()
        assert 0.02 < share < 0.6, (name, share)
        for contestant in ("logratio", "trl"):
            inked = (abs(image - to_rgb(COLOURS[contestant])) < 0.01).all(-1).sum()
            expected = contestant == "logratio" or kind in ("step-time-and-memory", "scaling")
            assert (inked > 20) == (expected and kind != "where-the-time-goes"), (name, contestant, inked)
    (tmp_path / "plots" / "old.png").write_bytes(b"")
    assert report(tmp_path, **files) == page
    assert {name: (tmp_path / "plots" / name).read_bytes() for name in made} == made
    assert "plots/old.png is of none of these lines" in capsys.readouterr().out


@needs_matplotlib
def test_bars_are_as_high_as_their_numbers() -> None:
    from logratio.benchmarks.reporting import plots

    def heights(**where: Any) -> list[list[float]]:
        rows = [step("logratio", 200, 2048, **where), step("trl", 300, 4096, **where)]
        figure = plots.peers([row | {"device": "x"} for row in rows])
        assert figure is not None
        return [[bar.get_height() for bar in ax.patches] for ax in figure.axes]  # type: ignore[attr-defined]

    assert heights() == [[200, 300], [2.0, 4.0]]
    assert heights(gpu="cpu") == [[1.0, 1.5], [2.0, 4.0]]


@needs_matplotlib
def test_a_title_says_what_its_plot_shows(tmp_path: Path) -> None:
    """Of a CPU memory is what autograd keeps; where nobody measured any, no title speaks of it."""
    from logratio.benchmarks.reporting import plots

    def drawn(*rows: dict) -> tuple[list[str], list[str]]:
        rows = [row | {"device": "x", "source": "step.jsonl:1"} for row in rows]  # type: ignore[assignment]
        figure = plots.peers(rows)
        assert figure is not None
        titles = [plot.title for plot in plots.draw(rows, tmp_path) if plot.suite == "step"]
        return [ax.get_ylabel() for ax in figure.axes], titles

    name = "Qwen2.5-0.5B, lora, gsm8k"
    kept = [step("logratio", 200, gpu="cpu", saved_mib=1024.0), step("trl", 300, gpu="cpu", saved_mib=2048.0)]
    assert drawn(*kept) == (["step time / ours", "kept by autograd (GiB)"], [f"{name}: step time and memory"])
    assert drawn(step("logratio", 200), step("trl", 300)) == (["step time (ms, p50)"], [f"{name}: step time"])


def test_the_command_is_known_without_matplotlib_and_models() -> None:
    """`logratio --help` loads every command; only drawing needs matplotlib, and nothing what trains."""
    code = "import sys; sys.modules |= {'matplotlib': None, 'transformers': None}; import logratio.benchmarks.report"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_numbers_and_line_numbers() -> None:
    shown = [number(x) for x in (0.01234, 1.0, 12.34, 99.96, 123.4, 12345.6, None)]
    assert shown == ["0.0123", "1.00", "12.3", "100", "123", "12,346", ""]
    assert number(0.4, 1) == "0.4" and number(1234.5, 1) == "1,234"
    rows = [{"source": f"{name}:{n}"} for name, n in [("b", 7), ("a", 3), ("a", 10), ("a", 4), ("a", 5)]]
    assert lines_of(rows) == "a:3-5, 10; b:7"
    methods = [{"method": name} for name in ("grpo", "zpo", "dpo", None, "sft")]
    assert [name for (name,) in groups(methods, "method")] == ["sft", "dpo", "grpo", None, "zpo"]


def test_dates_are_compared_as_times(tmp_path: Path) -> None:
    late, early = step("trl", 1.0), step("trl", 2.0)
    late["certificate"]["date"], early["certificate"]["date"] = "2026-01-02T03:30:00+00:00", "2026-01-02T05:00:00+02:00"
    (row,) = newest(load(write(tmp_path / "results", step=[late, early])))
    assert row["step_ms_p50"] == 1.0 and row["older"] == 1


def test_no_ratio_is_of_two_commits_or_settings(tmp_path: Path) -> None:
    ours, theirs, again = step("logratio", 100.0), step("trl", 250.0), step("logratio", 50.0, date="23:00:00")
    kept = newest(load(write(tmp_path / "one", step=[ours, theirs, again])))
    assert {row["contestant"] for row in kept} == {"logratio", "trl"}
    for key, value in (("commit", "another"), ("settings", {"batch_size": 1})):
        again["certificate"] = again["certificate"] | {key: value}
        (row,) = newest(load(write(tmp_path / key, step=[ours, theirs, again])))
        assert row["step_ms_p50"] == 50.0 and row["older"] == 2


def test_ratios_of_steps_that_took_turns_are_paired():
    ours, theirs = step("logratio", 100.0, time_to_ours=1.0), step("trl", 250.0, time_to_ours=2.25)
    assert quotient(theirs, ours, "step_ms_p50") == 2.25  # and not 2.5
    assert quotient(theirs, ours, "examples_per_s") == pytest.approx(1 / 2.25)
    other_run = step("trl", 250.0, time_to_ours=2.25, date="11:00:00")
    assert quotient(other_run, ours, "step_ms_p50") == 2.5
    assert quotient(step("trl", 250.0, 30.0, time_to_ours=2.25), step("logratio", 100.0, 20.0), "peak_mem_mib") == 1.5


def test_reading_is_told_by_what_a_step_takes(tmp_path):
    fields = {"suite": "data", "gpu": "cpu", "row_tokens": 500, "peak_rss_mib": 786.4, "beyond_imports_mib": 212.9}
    rates = {"packed_examples_per_s": 1174.0, "read_examples_per_s": 4068.0}
    rows = [step("logratio", 9.0, case=f"data-{n}", rows=n, **rates, **fields) for n in (1_000_000, 5_000)]
    (tmp_path / "cpu.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    small, large = (f"| {rows} | 500 | 5.87× | 20.34× | 786 | 213 |" for rows in ("5,000", "1,000,000"))
    assert "examples to micro-batches" in page and page.index(small) < page.index(large)


def test_what_the_host_costs_is_told_in_passes_of_the_plain_model(tmp_path):
    fields = {"suite": "host", "case": "dpo-lora-32x64-short", "model": "32x64", "gpu": "cpu"}
    rows = [step(name, 9.0, units=u, passes_units=u / 2, **fields) for name, u in (("logratio", 2.5), ("trl", 5.1))]
    (tmp_path / "cpu.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "next to nothing to compute" in page and "| dpo | 2.50 | 5.10 |" in page and "| dpo | 1.25 | 2.55 |" in page


def test_rollouts_are_told_by_a_tokens_time(tmp_path):
    """Half the time for a quarter of the tokens is half the speed."""
    fields = {"suite": "rollout", "case": "rollout-ends", "model": "SmolLM2-135M", "gpu": "cpu", "ends": True}
    turns = (("logratio", 200.0, 80.0, 300.0), ("trl", 100.0, 40.0, 900.0))
    rows = [
        step(name, ms, rollout_ms_p50=rollout, rollout_tokens_per_s=rate, **fields) for name, rollout, rate, ms in turns
    ]
    (tmp_path / "cpu.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    rollouts, steps = page.split("**Rollouts, a token's time as multiple of ours**")[1].split("**Whole GRPO steps")
    assert "| 1.00× | 2.00× |" in rollouts and "| 1.00× | 3.00× |" in steps
