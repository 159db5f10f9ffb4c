"""The table of verdicts: a table on a terminal of any width, plain lines elsewhere; and the page of all options."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from logratio.trainers.trl_names import consider, shown

GIVEN = {"learning_rate": 1e-5, "max_seq_length": 64, "packing": True, "bf16": True, "optim": "sgd", "save_steps": 5}
LINES = """x.yaml, judged by TRL 1.16's names
  refused: optim: sgd (the optimizer is AdamW: adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit)
  translated: max_seq_length: 64 -> max_length: 64
  translated: bf16: true -> mixed_precision: bf16
  without effect: packing: true (rows are packed by micro_batch_tokens in any case, each seeing itself alone; \
batch_size counts rows, not packed blocks as TRL's does)
  not in the file: train_sampling_strategy (TRL's default is sequential, here rows are shuffled)
  taken: learning_rate: 1e-05, save_steps: 5
"""


def test_without_a_terminal_it_is_lines():
    file = io.StringIO()
    shown.show(consider("kto", GIVEN), "x.yaml", file)
    assert file.getvalue() == LINES


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_on_a_terminal_it_is_a_table_that_fits(width, monkeypatch):
    """No option or value is broken in two."""
    file = io.StringIO()
    monkeypatch.setattr(shown, "Console", lambda file: Console(file=file, force_terminal=True, width=width))
    shown.show(consider("kto", GIVEN), "x.yaml", file)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
    assert max(map(cell_len, lines)) <= width
    words = " ".join(lines).split()
    for word in ("refused", "translated", "paged_adamw_8bit", "train_sampling_strategy", "mixed_precision:", "taken"):
        assert word in words, word
    order = [words.index(word) for word in ("optim:", "max_seq_length:", "packing:", "train_sampling_strategy")]
    assert order == sorted(order)


def test_markup_in_a_file_is_text():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown, "Console", lambda file: console)
        shown.show(consider("sft", {"run_name": "[bold]x[/]", "output_dir": "[red]"}), "[x].yaml", file)
    assert "[bold]x[/]" in file.getvalue() and "[red]" in file.getvalue() and "[x].yaml" in file.getvalue()
