"""Laws that every trainer keeps, whoever wrote it: `check_trainer(fn)` holds one to all of them.

A trainer is a function that trains a tiny model of its own and shows what became of it:

    def fn(rows, *, batch_size, steps, micro_batch_size, processes, seed, learning_rate=0.1, stop_after=None) -> Trained

rows: see `make_rows`; batch_size: rows of an optimizer step, over all micro-batches and processes; stop_after: end
after that step, save, and let a new run go on from it. All but the first three may be absent: a law that needs what
`fn` does not take is not asked, and the report says so.

Two faults of the kind that the law `split` finds, intermediate micro-batches dropped where the optimizer is offloaded
and means of means, weakened the SFT that many papers compare with (arXiv 2604.23747).
"""

from .._verdicts import LawViolation, Report
from .book import LAWS
from .check import check_trainer, verdicts
from .trained import DESIGNS, IDS, KINDS, Trained, adamw, make_rows, sgd

__all__ = [
    "DESIGNS",
    "IDS",
    "KINDS",
    "LAWS",
    "LawViolation",
    "Report",
    "Trained",
    "adamw",
    "check_trainer",
    "make_rows",
    "sgd",
    "verdicts",
]
