"""The variants of DPO beyond sigmoid, hinge and ipo: one function each, in the words of `dpo.py`.

x = beta (r_w - r_l), e = label_smoothing, sp = softplus, s = sigmoid; sums over tokens unless said. Those that TRL 1.16
has bear its names and equal it on one micro-batch; TRL's `+1` in apo_zero and apo_down is kept, the papers have none.
"""

from . import labels, lengths, links, margins, sides, steps  # they fill the table

__all__ = ["labels", "lengths", "links", "margins", "sides", "steps"]
