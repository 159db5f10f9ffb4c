"""Laws of two functions that everything else is built on: what rewards become, and what an LM head gives."""

from .advantage import check_advantage
from .kernel import check_kernel

__all__ = ["check_advantage", "check_kernel"]
