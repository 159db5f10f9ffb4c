"""Contestants of the suite `head` where a case is of the divergence from a teacher, `linear_jsd` and its like."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor
from torch.nn.functional import linear

from logratio.losses import linear_jsd

from .head import Contestant, Inputs, weighed


def contestants(beta: float) -> dict[str, Contestant]:
    """Of JSD(beta)."""

    def values(x: Inputs, impl: str) -> Tensor:
        assert x.teacher is not None
        return linear_jsd(x.hidden, x.weight, *x.teacher, beta=beta, impl=impl)

    def trl(x: Inputs) -> Tensor:
        """TRL's GKD loss, of both models' logits."""
        trainer = import_module("trl.experimental.gkd").GKDTrainer
        assert x.teacher is not None
        student, teacher = linear(x.hidden, x.weight)[None], linear(*x.teacher)[None]
        loss: Tensor = trainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
        return loss / len(x.hidden)

    def liger(x: Inputs) -> Tensor:
        """Liger's fused head and divergence."""
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        assert x.teacher is not None
        loss: Tensor = LigerFusedLinearJSD(jsd_beta=beta)(x.hidden, x.weight, *x.teacher, None)
        return loss

    return {
        "logratio (two_gemm)": weighed(lambda x: values(x, "two_gemm"), 1),
        "logratio (triton)": weighed(lambda x: values(x, "triton"), 1, gpu_only=True, package="triton"),
        "eager": weighed(lambda x: values(x, "eager"), 1),
        "trl": Contestant(trl, mean=True, package="trl"),
        "liger (jsd)": Contestant(liger, mean=True, gpu_only=True, package="liger-kernel"),
    }
