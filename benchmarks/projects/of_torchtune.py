"""torchtune's preference losses, `rlhf/loss/dpo.py`; its recipe takes their mean."""

from __future__ import annotations

from .installed import module_of
from .subjects import GIVEN_SUMS, Subject, of, pairs


def subjects() -> list[Subject]:
    losses = module_of("torchtune.rlhf.loss.dpo")
    out = []
    for name, asked in (("DPOLoss", losses.DPOLoss()), ("RSOLoss", losses.RSOLoss())):
        fn = pairs(lambda *logps, asked=asked: asked(*logps)[0].mean())
        out.append(of("torchtune", "loss", name, fn, not_asked=GIVEN_SUMS))
    return out
