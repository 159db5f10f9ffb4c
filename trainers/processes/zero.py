"""DeepSpeed's ZeRO-2: weights are whole on every process, gradients and the optimizer's state are sharded.

By itself the engine clips and updates within a step's last backward pass. Here backward passes only add up, and the
update comes where the loop asks for the gradient's norm: one that is not finite changes nothing, as elsewhere.

DeepSpeed keeps a float32 copy of this process's share of the weights, flat, which is what the optimizer steps on.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from ..errors import UserError

INSTALL = "pip install 'deepspeed>=0.19.8'"
MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # elements of the buffer in which gradients wait to be summed; by itself ten times as many


def is_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shards."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


class Engine:
    """What accelerate asks for, of DeepSpeed's engine."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: Tensor, **_: Any) -> None:
        self.engine.backward(loss)

    def get_global_grad_norm(self) -> Any:
        """Clips and updates as well."""
        self.engine.step()
        return self.engine.get_global_grad_norm()


class Optimizer:
    """What the loop asks for. optimizer: torch's, over this process's share, which `Engine` lets step."""

    def __init__(self, zero: Any) -> None:
        self.zero, self.optimizer = zero, zero.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    def step(self) -> None:
        """It has been done."""

    def zero_grad(self) -> None:
        """It has been done."""


def engage(
    policy: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_grad_norm: float
) -> tuple[Any, Optimizer]:
    """The same policy, and its optimizer as DeepSpeed wraps it. max_grad_norm: 0 for none."""
    import deepspeed

    # without it every micro-batch would take the place of those before it
    if not hasattr(deepspeed.DeepSpeedEngine, "managed_gradient_accumulation"):
        raise UserError(f"DeepSpeed {deepspeed.__version__} is too old: {INSTALL}")
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise UserError("--optim: bitsandbytes' optimizers have not been tried with DeepSpeed; use adamw_torch")
    if accelerator.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 has not been tried with DeepSpeed; use bf16")
    if any(p.dtype != torch.float32 for group in optimizer.param_groups for p in group["params"]):
        raise UserError(
            "DeepSpeed would train float32 copies of 16-bit weights, and a checkpoint would lack them: use "
            "--dtype float32 --mixed_precision bf16"
        )
    if accelerator.mixed_precision == "bf16":  # inside: the engine ends what is around it
        policy.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(policy.forward)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # of which nothing depends
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": BUCKET},
    }
    engine, zero, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    for group in optimizer.param_groups:  # the optimizer's state as AdamW begins with it
        (flat,) = group["params"]
        optimizer.state[flat] = {"step": torch.zeros((), device=flat.device)}
        optimizer.state[flat] |= {key: torch.zeros_like(flat) for key in MOMENTS}
    zero._lazy_init_hp_params_optimizer_state()  # which by itself comes before all groups have one
    accelerator.deepspeed_engine_wrapped = Engine(engine)
    return policy, Optimizer(zero)


def gathered_state(policy: Any, optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """As `optimizer_state`; one moment of one parameter is gathered at a time. keep: on this process."""
    from deepspeed.utils import safe_get_full_optimizer_state

    names = {id(p): name for name, p in policy.named_parameters()}
    state: dict[str, Any] = {}
    groups = []
    for group, parameters in zip(optimizer.param_groups, optimizer.zero.bit16_groups, strict=True):
        step = optimizer.optimizer.state[group["params"][0]]["step"].cpu()
        for p in parameters:
            moments = {key: safe_get_full_optimizer_state(p, key) for key in MOMENTS}
            if keep:
                state[names[id(p)]] = {"step": step.clone(), **{key: m.cpu() for key, m in moments.items()}}
        groups.append({**group, "params": [names[id(p)] for p in parameters]})
    return {"state": state, "param_groups": groups} if keep else {}


def load_gathered_state(policy: Any, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """The inverse, for an optimizer that has not stepped; the weights are those of the policy as it is now.

    A parameter that has had no gradient yet has no state, here of zeros.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    optimizer.zero.refresh_fp32_params()
    moments = state["state"]
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        steps = [moments[name]["step"] for name in saved["params"] if name in moments]
        optimizer.optimizer.state[group["params"][0]]["step"].fill_(max(steps))
        group |= {key: value for key, value in saved.items() if key != "params"}
    for name, p in policy.named_parameters():
        for key in MOMENTS if name in moments else ():
            safe_set_full_optimizer_state(p, moments[name][key].to(p.device), key)
