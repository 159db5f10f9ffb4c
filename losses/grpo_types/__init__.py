"""The parts of GRPO, each a small registered function: surrogates by family, normalisers, levels, KL estimators."""

from . import groups, levels, ratios, selected, smooth, weighted, weights  # they fill the tables
from .base import GRPO_TYPES, KL_ESTIMATORS, LEVELS, LOSS_AGGREGATIONS, GRPOType, Ratios

__all__ = [
    "GRPO_TYPES",
    "KL_ESTIMATORS",
    "LEVELS",
    "LOSS_AGGREGATIONS",
    "GRPOType",
    "Ratios",
    "groups",
    "levels",
    "ratios",
    "selected",
    "smooth",
    "weighted",
    "weights",
]
