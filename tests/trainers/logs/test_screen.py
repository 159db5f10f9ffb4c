"""The screen at every width: no line is too long, and the figures that matter are all there."""

import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from logratio.trainers.logs.screen import WIDE, Screen, clock, figures_of
from logratio.trainers.logs.sparkline import BARS, PLAIN, sparkline

NAN = math.nan
ALARM = "step 7: the loss is far beyond " + "what blind guessing costs, " * 6 + "lower it"
COMMON = {"grad_norm": 12345.678, "learning_rate": 1e-12, "num_tokens": 10**9, "tokens_per_s": 123456.789}
COMMON |= {"step_ms": 98765.4321, "peak_mem_mib": 81234.5}
ROWS = {
    "sft": {"loss": -12345.678, "mean_token_accuracy": 1e-12, "grad_norm": 1e-12},
    "plain sft": {"loss": 2.5, "nll": -1.2345e-10, "grad_norm": -9.8765e-100},
    "dpo": {"loss": -1.2345e-12, "rewards/accuracies": -12345.678, "rewards/margins": -6.789e-11},
    "kto": {"loss": -12345.678, "kl": -1.2345e-12, "rewards/margins": -12345.678},
    "grpo": {"reward": -12345.678, "kl": -1.2345e-12, "completions/mean_length": 12345.678},
}


SAMPLE = [("row 1234567", "one\n\ttwo " * 40 + "END"), ("chosen", "二" * 300), ("rejected", "\x1b[31m" + "no" * 300)]


def shown(row, width, *, alarm="", sample=(), planned=None, has=None, **options):
    """The lines, as a console of that width prints them; a run at its 999,999th step."""
    screen = Screen(1234567, planned=planned, has=has)
    screen.sample = list(sample)
    for step in (999_997, 999_998, 999_999):
        screen.add({"loss": 1.0, **COMMON, **row, "step": step})
    screen.alarm = alarm
    console = Console(file=io.StringIO(), width=width, record=True, soft_wrap=True, **options)
    console.print(screen)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 109, 110, 120, 200])
@pytest.mark.parametrize("method", ROWS)
def test_it_fits_and_has_all_figures(method, width):
    row = ROWS[method] | {"eval_" + name: value for name, value in ROWS[method].items()}
    lines = shown(row, width, alarm=ALARM, sample=SAMPLE, planned=79012.5, has=143771.0)
    assert max(map(cell_len, lines)) <= width, lines
    text = " ".join(" ".join(lines).split())
    assert lines[0].startswith("step 999999/1234567 ") and "81%" in lines[0] and lines[0].endswith(" left")
    for name, value in ROWS[method].items():
        assert f"{value:.4g}" in text, (name, lines)
    if width < WIDE:
        assert len(lines) == 2
    else:
        assert "evaluation of step 999999" in text and "81,234 MiB" in text and ALARM[:80] in text
        assert lines[-1].startswith("step 7") and lines[-1].endswith("…")
        assert "memory 81,234 MiB at its peak (planned 79,012, of 143,771)" in text
        assert [line.split(":")[0] for line in lines[-4:-1]] == ["row 1234567", "chosen", "rejected"]
        assert lines[-4].startswith("row 1234567: ...") and lines[-4].endswith("END")
        assert lines[-2].startswith("rejected: \\x1b[31mnono") and lines[-2].endswith("...")
        assert all(
            name in text for name in ("grad_norm", "learning_rate 1e-12", "123,457 tokens/s", "98,765 ms a step")
        )


def test_memory_stands_beside_what_is_known():
    row = {"loss": 1.0}
    assert "MiB at its peak (of 143,771)" in " ".join(shown(row, 120, has=143771.0))
    assert "MiB at its peak (planned 10)" in " ".join(shown(row, 120, planned=10.4))
    assert "(" not in " ".join(shown(row, 120))


def test_eighty_columns_name_the_metrics_as_the_log_does():
    assert shown({"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.1}, 80)[1] == (
        "loss 0.5  rewards/accuracies 0.75  rewards/margins 0.1"
    )


def test_what_is_not_a_number_is_left_out():
    row = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": NAN}
    assert shown(row, 80)[1] == "loss 0.5  rewards/accuracies 0.75"
    assert "nan" not in " ".join(shown({**row, "grad_norm": NAN, "loss": NAN}, 120))


@pytest.mark.parametrize(
    "row, names",
    [
        ({"loss": 1, "nll": 1, "grad_norm": 2}, ["loss", "nll", "grad_norm"]),
        ({"loss": 1, "mean_token_accuracy": 1, "nll": 1, "grad_norm": 2}, ["loss", "mean_token_accuracy", "grad_norm"]),
        ({"loss": 1, "rewards/margins": 2}, ["loss", "rewards/margins"]),
        ({"loss": 1, "entropy": 3, "completions/mean_length": 2}, ["entropy", "loss", "completions/mean_length"]),
        ({}, []),
        ({"loss": 1, "kl": 0, "mean_token_accuracy": 1, "grad_norm": 1}, ["loss", "kl", "grad_norm"]),
    ],
)
def test_figures_are_the_methods(row, names):
    assert figures_of(row) == names


def test_before_the_first_step_there_is_a_bar_alone():
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(Screen(10, first=5))
    (line,) = console.export_text().splitlines()
    assert line.startswith("step 5/10") and "50%" in line and "left" not in line


def test_a_terminal_of_ascii_gets_ascii():
    text = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=text, width=120, force_terminal=True, color_system=None)
    screen = Screen(10)
    screen.add({"step": 1, **COMMON, **ROWS["grpo"]})
    screen.alarm, screen.sample = ALARM, SAMPLE[:2]
    console.print(screen)  # would raise where a character has no bytes
    text.flush()
    assert text.buffer.getvalue().count(b"\n") == 7 and b"chosen: \\u4e8c" in text.buffer.getvalue()


def test_time_is_read_as_a_clock():
    assert [clock(s) for s in (0, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]


def test_a_sparkline_goes_from_the_smallest_to_the_largest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 20) == BARS
    assert sparkline([5, 0, 1, NAN, 7], 4) == "▁▂ █"
    assert sparkline([3, 3, 3], 3) == "▄▄▄" and sparkline([], 5) == sparkline([1.0], 0) == ""
    assert sparkline([-1.7e308, 1.7e308, math.inf], 3, plain=True) == PLAIN[0] + PLAIN[-1] + " "
    assert sparkline([1e-12, 2e-12], 2) == "▁█"
