"""The mathematics: `linear_logps` and the losses. Imports torch only, and on a GPU triton."""

from . import dpo_types, grpo_types  # they fill the tables
from .advantages import ADVANTAGES, advantage
from .cpo import CPO_TYPES, TPO_TYPES, CPOLoss, CPOType, TPOLoss
from .divergences import F_DIVERGENCES
from .dpo import DPOLoss
from .dpo_types.base import DPO_TYPES, DPOType, PairRatios, dpo_type
from .grpo import GRPOLoss
from .grpo_sampling import SAMPLING_CORRECTIONS
from .grpo_types import GRPO_TYPES, KL_ESTIMATORS, LOSS_AGGREGATIONS, GRPOType
from .head import Support, TokenLogps, Transform, linear_jsd, linear_logps
from .hf import hf_compute_loss
from .kto import KTO_TYPES, KTOLoss, KTOType
from .listwise import LISTWISE_TYPES, Lists, ListwiseLoss
from .metrics import Largest, Mean, Smallest
from .options import Variants, variant
from .orpo import ORPOLoss
from .registry import LOSSES, register
from .sft import SFT_TYPES, SFTLoss
from .types import CompletionLogps, Divergence, Kind, Loss, LossOutput, PairLogps, Totals

__all__ = [
    "ADVANTAGES",
    "CPO_TYPES",
    "DPO_TYPES",
    "F_DIVERGENCES",
    "GRPO_TYPES",
    "KL_ESTIMATORS",
    "KTO_TYPES",
    "LISTWISE_TYPES",
    "LOSSES",
    "LOSS_AGGREGATIONS",
    "SAMPLING_CORRECTIONS",
    "SFT_TYPES",
    "TPO_TYPES",
    "CPOLoss",
    "CPOType",
    "CompletionLogps",
    "DPOLoss",
    "DPOType",
    "Divergence",
    "GRPOLoss",
    "GRPOType",
    "KTOLoss",
    "KTOType",
    "Kind",
    "Largest",
    "Lists",
    "ListwiseLoss",
    "Loss",
    "LossOutput",
    "Mean",
    "ORPOLoss",
    "PairLogps",
    "PairRatios",
    "SFTLoss",
    "Smallest",
    "Support",
    "TPOLoss",
    "TokenLogps",
    "Totals",
    "Transform",
    "Variants",
    "advantage",
    "dpo_type",
    "dpo_types",
    "grpo_types",
    "hf_compute_loss",
    "linear_jsd",
    "linear_logps",
    "register",
    "variant",
]
