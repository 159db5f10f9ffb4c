"""The mathematics: `linear_logps` and the losses. Imports torch only."""

from .dpo import DPO_TYPES, DPOLoss, PairRatios
from .grpo import GRPO_TYPES, GRPOLoss, GRPOType
from .kto import KTO_TYPES, KTOLoss
from .logps import TokenLogps, linear_logps
from .orpo import ORPOLoss
from .sft import SFT_TYPES, SFTLoss
from .types import (
    LOSSES,
    CompletionLogps,
    Kind,
    Loss,
    LossOutput,
    Mean,
    PairLogps,
    Totals,
    register,
    variant,
)

__all__ = [
    "DPO_TYPES",
    "GRPO_TYPES",
    "KTO_TYPES",
    "LOSSES",
    "SFT_TYPES",
    "CompletionLogps",
    "DPOLoss",
    "GRPOLoss",
    "GRPOType",
    "KTOLoss",
    "Kind",
    "Loss",
    "LossOutput",
    "Mean",
    "ORPOLoss",
    "PairLogps",
    "PairRatios",
    "SFTLoss",
    "TokenLogps",
    "Totals",
    "linear_logps",
    "register",
    "variant",
]
