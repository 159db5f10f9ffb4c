"""Weights that are sharded over processes (FSDP2, through accelerate).

Between steps every process holds a part of each parameter, as a DTensor. They are gathered unit by unit, a decoder
layer each and one for the rest, where the forward of `Policy` comes to them; whatever is computed past that forward
meets parts, unless it is inside `gathered`. Gathering is a collective: all processes do it, or all wait.

Mixed precision is autocast, as without sharding; but weights are gathered in 16 bits already, because the copies that
autocast makes of whole ones would stay until the backward pass. What differs from autocast alone is that norms, biases
and embeddings are rounded too. (accelerate's own policy rounds what leaves every unit as well, log-probabilities among
it.)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError, first_line
from .summing import start_alike
from .zero import engage, is_zero


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes hold parts of the weights."""
    return accelerator.distributed_type == DistributedType.FSDP


def meet_inside(accelerator: Accelerator) -> bool:
    """Whether processes wait for each other within a pass, so that none can step back in it."""
    return is_sharded(accelerator) or is_zero(accelerator)


def wrap(
    policy: Any, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_grad_norm: float
) -> tuple[Any, Any]:
    """The same policy, in the run's mixed precision, and its optimizer as accelerate wraps it. What trains is the same
    on all processes; a sharded policy has other parameters, and the optimizer's are those. max_grad_norm: the one thing
    that DeepSpeed has to know beforehand."""
    if is_zero(accelerator):
        return engage(policy, optimizer, accelerator, max_grad_norm)
    if not is_sharded(accelerator):
        start_alike([p for p in policy.parameters() if p.requires_grad], accelerator)
        # "evaluation" leaves out DistributedDataParallel, which would add up gradients in a backward pass
        policy = accelerator.prepare_model(policy, evaluation_mode=True)
        return policy, accelerator.prepare_optimizer(optimizer)
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise UserError("--optim: bitsandbytes' optimizers do not know sharded parameters; use adamw_torch")
    gather_in_16_bits(policy, accelerator)
    if accelerator.native_amp:
        policy.forward = accelerator.autocast()(policy.forward)
    policy.register_forward_hook(copied)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found .* Params4bit")  # `describe_whole` says it
            policy, optimizer = accelerator.prepare(policy, optimizer)
    except ValueError as error:
        raise UserError(f"FSDP: {first_line(error)}") from error
    # Whichever unit computes first is the root for good, and in a rollout that would be a layer.
    policy._get_fsdp_state()._lazy_init()
    return policy, optimizer


def copied(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Tensors of their own in place of views: what gathers the weights again hangs on them, and would be lost where
    something is added to a view in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(*(None if values is None else values.clone() for values in output))


def gather_in_16_bits(policy: Any, accelerator: Accelerator) -> None:
    """Where the run's mixed precision is 16 bits; what is added up over the layers stays in float32 if it was."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    own = MixedPrecisionPolicy()
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = own if dtype is None else narrow
    embeddings = policy.causal_lm.get_input_embeddings()
    if dtype is not None and embeddings.weight.dtype == torch.float32:
        embeddings.register_forward_hook(lambda module, inputs, output: output.float())


def shard_frozen(model: Any, accelerator: Accelerator) -> Any:
    """The same object, sharded as the policy is where that is: for a model that is only asked."""
    model.requires_grad_(False)
    if is_sharded(accelerator):
        gather_in_16_bits(model, accelerator)
        plugin: Any = accelerator.state.fsdp_plugin
        kept, plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap, None  # its own layers
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Found .* Params4bit")
                fsdp2_prepare_model(accelerator, model)
        finally:
            plugin.transformer_cls_names_to_wrap = kept
        model.set_reshard_after_forward(True, recurse=False)  # what is left over too: no backward pass will free it
    return model


def describe_whole(policy: nn.Module, accelerator: Accelerator) -> list[str]:
    """What to tell where a part of the weights is on every process all the same."""
    if not is_sharded(accelerator) or all(isinstance(p, DTensor) for p in policy.parameters()):
        return []
    return ["the 4-bit weights are whole on every process; what is sharded is the rest"]


@contextlib.contextmanager
def gathered(model: nn.Module, accelerator: Accelerator | None) -> Iterator[None]:
    """Inside, every process has the whole weights, so that the model's own methods can be called (`generate`), for as
    long on each as it takes; without gradient, in the run's mixed precision. Costs the memory of all weights."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units or accelerator is None:
        yield
        return
    plugin: Any = accelerator.state.fsdp_plugin
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        with accelerator.autocast():
            yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model and plugin.reshard_after_forward, recurse=False)
            unit.reshard()


def reshard(model: nn.Module) -> None:
    """Let the model's parameters be the parts again: a pass without gradient leaves some of them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Tensor) -> Tensor:
    """The tensor itself, or all of it where it is a part; then called on every process."""
    if not isinstance(value, DTensor):
        return value
    moved: Any = value.to(value.device_mesh.device_type)
    return moved.full_tensor()  # type: ignore[no-any-return]


def full_weights(policy: Any, accelerator: Accelerator) -> dict[str, Tensor] | None:
    """What is to be saved of a sharded policy, by the names of `policy.model`: on the CPU of the main process, nothing
    on the others. None where the model holds it itself. Called on every process.

    With adapters these alone. One parameter is gathered at a time; tied ones are one tensor, as in the model.
    """
    if not is_sharded(accelerator):
        return None
    reshard(policy)
    model = policy.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = saved_parameters(parameters) if policy.has_adapters else parameters.keys()
    gathered_once: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor):
            if name not in kept:
                continue
            same = id(parameters[name])
            if same not in gathered_once:
                full = whole(value.detach())
                gathered_once[same] = full.cpu() if accelerator.is_main_process else full.new_empty(0)
            value = gathered_once[same]
        if accelerator.is_main_process:
            weights[name] = value
    return weights


@torch.no_grad()
def load_full_weights(policy: Any, accelerator: Accelerator, weights: Mapping[str, Tensor]) -> None:
    """Give a sharded policy what `full_weights` returned, of which only the main process's is looked at. Called on
    every process. Raises KeyError for a parameter that `weights` lacks."""
    reshard(policy)
    parameters = dict(policy.model.named_parameters())
    kept = saved_parameters(parameters) if policy.has_adapters else parameters.keys()
    for name, p in parameters.items():  # in the same order on every process
        if name in kept and isinstance(p, DTensor):
            full = weights[name] if accelerator.is_main_process else torch.empty(p.shape)
            mesh = p.device_mesh
            p.copy_(distribute_tensor(full.to(mesh.device_type, p.dtype), mesh, p.placements))


def saved_parameters(parameters: Mapping[str, Tensor]) -> set[str]:
    """What PEFT saves beside its configuration, by name: what trains, and an embedding that has adapters itself."""
    from peft.utils.other import EMBEDDING_LAYER_NAMES

    trained = {name for name, p in parameters.items() if p.requires_grad}
    adapted = [layer for layer in EMBEDDING_LAYER_NAMES if any(layer in name for name in trained)]
    return trained | {name for name in parameters if any(layer in name for layer in adapted)}
