"""The LM head: hidden states and targets in, log-probabilities and row statistics out, without keeping logits."""

from ._tile import Transform
from .jsd import linear_jsd
from .logps import TokenLogps, linear_logps
from .support import Support

__all__ = ["Support", "TokenLogps", "Transform", "linear_jsd", "linear_logps"]
