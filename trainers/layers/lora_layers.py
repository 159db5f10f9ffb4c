"""Which layers of a PEFT model compute by `lora_linear`, and how those that are given the same x find one another.

The layer decides in every call, because the active adapter and its weights change between calls (`part_of`); what
`lora_linear` was not written for goes to PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from torch import Tensor, nn

from .lora_linear import Part, dtypes_of, lora_linear
from .packed_weights import has_packed
from .swiglu import swiglu
from .switch import NO_ADAPTER, Switch, switch_of

# Children of one module that it calls with the same tensor. Where it does not, they compute alone.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def part_of(layer: Any, x: Tensor) -> Part | None:
    """What `lora_linear` computes for `layer`, or None where PEFT's own forward is to do it.

    None with adapters that are switched off or merged, with none or several active, with dropout, DoRA or another
    variant, with biases in adapters, base weights that train, hooks on the modules inside, and mixed dtypes.

    All of it is asked in every call of every layer, so it is read where nn.Module keeps it, past its `__getattr__`.
    """
    state = layer.__dict__
    modules = state["_modules"]
    if layer.disable_adapters or state["merged_adapters"]:
        return None
    adapters = modules["lora_A"]._modules
    active = layer.active_adapter
    names = [name for name in ((active,) if isinstance(active, str) else active) if name in adapters]
    if len(names) != 1 or not is_plain_adapter(layer, names[0]):
        return None
    (name,) = names
    base, a, b = modules["base_layer"], adapters[name], modules["lora_B"]._modules[name]
    weight, bias = _parameter(base, "weight"), _parameter(base, "bias")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if not ((_is_bare(base) or has_packed(base)) and _is_bare(a) and _is_bare(b)):
        return None
    dtypes = dtypes_of(base, x)
    if dtypes is None:
        return None
    return Part(base, _parameter(a, "weight"), _parameter(b, "weight"), state["scaling"][name], *dtypes)


def is_plain_adapter(layer: Any, name: str) -> bool:
    """Whether an adapter adds s B A x to what a linear layer gives, and no more."""
    modules = layer.__dict__["_modules"]
    b = modules["lora_B"]._modules[name]
    return (
        name not in layer.lora_variant
        and type(modules["lora_A"]._modules[name]) is nn.Linear  # neither wrapped nor parametrized
        and type(b) is nn.Linear
        and _parameter(b, "bias") is None
        and type(modules["lora_dropout"]._modules[name]) is nn.Identity
    )


def _parameter(module: Any, name: str) -> Any:
    """As `getattr`, and sooner. FSDP keeps a plain attribute in its place while a layer computes."""
    own = module.__dict__["_parameters"]
    return own[name] if name in own else getattr(module, name)


def _is_bare(module: nn.Module) -> bool:
    """Whether its forward is its class's and nothing is to be called before or after (offloading, ZeRO-3, hooks)."""
    state = module.__dict__
    return not (
        state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


class Siblings:
    """The outputs that the first of several layers has computed for the others, during one forward of their parent.

    They are handed to a call with the same tensor object, unchanged, in the same modes; any other call computes alone.
    What nobody took goes when the parent's forward ends or raises.
    """

    def __init__(self, members: Sequence[FusedLora]) -> None:
        self.members = members
        self.made: dict[FusedLora, tuple[Part, Tensor]] = {}
        self.x: Tensor | None = None
        self.version = -1
        self.grad = False

    def output(self, member: FusedLora, part: Part, x: Tensor) -> Tensor:
        """[..., out] of `member`."""
        if x.is_inference():  # has no version by which to see that it is unchanged
            return lora_linear(x, (part,))[0]
        if not self.made:
            self._make(member, part, x)
        mine, y = self.made.get(member, (None, None))
        unchanged = self.x is x and self.version == x._version and self.grad == torch.is_grad_enabled()
        if mine is None or y is None or not unchanged or not mine.same(part):
            return lora_linear(x, (part,))[0]
        del self.made[member]
        if not self.made:
            self.x = None
        return y

    def _make(self, member: FusedLora, part: Part, x: Tensor) -> None:
        found = [(m, part if m is member else part_of(m, x)) for m in self.members]
        parts = {m: p for m, p in found if p is not None and p.fits(part)}
        outputs = lora_linear(x, tuple(parts.values()))
        self.made = {m: (p, y) for (m, p), y in zip(parts.items(), outputs, strict=True)}
        self.x, self.version, self.grad = x, x._version, torch.is_grad_enabled()


class FusedLora:
    """What `fuse_lora` puts in front of a PEFT layer's class."""

    peft_class: type
    switch: Switch = Switch()  # the model's own, once it is fused
    siblings: Siblings | None = None  # while the parent's forward runs

    @property
    def disable_adapters(self) -> bool:
        return self.switch.adapter == NO_ADAPTER or self._disable_adapters  # type: ignore[attr-defined]

    @property
    def active_adapter(self) -> str | list[str]:
        return self.switch.adapter or self._active_adapter  # type: ignore[attr-defined]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if self.disable_adapters and not self.__dict__["merged_adapters"]:
            return self.__dict__["_modules"]["base_layer"](x)  # as PEFT would in the end
        part = part_of(self, x)
        if part is None:
            return super().forward(x)  # type: ignore[misc]
        return self.siblings.output(self, part, x) if self.siblings else lora_linear(x, (part,))[0]

    def of_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """`self(swiglu(gate, up))`, without keeping the product where only `lora_linear` needs it."""
        x = swiglu(gate, up)
        part = part_of(self, x) if torch.is_grad_enabled() and _is_bare(self) else None  # type: ignore[arg-type]
        return self(x) if part is None else lora_linear(x, (part,), (gate, up))[0]  # type: ignore[operator]


class FusedLinear(FusedLora, lora.Linear):
    peft_class = lora.Linear


FUSED: dict[tuple[type, type], type] = {(lora.Linear, nn.Linear): FusedLinear}
if is_bnb_4bit_available():
    from bitsandbytes.nn import Linear4bit

    class FusedLinear4bit(FusedLora, lora.Linear4bit):
        peft_class = lora.Linear4bit

    FUSED[lora.Linear4bit, Linear4bit] = FusedLinear4bit


def fuse_lora(model: nn.Module) -> int:
    """Let the LoRA layers of a PEFT model compute by `lora_linear`; how many there are for which it is written.

    Their class becomes a subclass of it, so that everything else of PEFT stays as it is.
    """
    count, switch = 0, switch_of(model)
    for layer in model.modules():
        fused = FUSED.get((type(layer), type(getattr(layer, "base_layer", None))))
        if fused is not None and all(is_plain_adapter(layer, name) for name in layer.lora_A):  # type: ignore[union-attr]
            layer.__class__ = fused
            layer.__dict__["switch"] = switch
        count += isinstance(layer, FusedLora)
    for parent in model.modules():
        if open_siblings not in parent._forward_pre_hooks.values() and any(siblings_of(parent)):
            parent.register_forward_pre_hook(open_siblings)
            parent.register_forward_hook(close_siblings, always_call=True)
    return count


def siblings_of(parent: nn.Module) -> list[list[Any]]:
    """Its layers that share an input, two or more each."""
    children = parent._modules
    groups = [[children[n] for n in names if isinstance(children.get(n), FusedLora)] for names in SHARED_INPUT]
    return [group for group in groups if len(group) > 1]


# Hooks of the parent, that its layers know of one another only while it runs: whatever is copied, unloaded or pickled
# between is free of it, and nothing computed outlives the call.


def open_siblings(parent: nn.Module, args: Any) -> None:
    for group in siblings_of(parent):
        shared = Siblings(group)
        for layer in group:
            layer.__dict__["siblings"] = shared  # past nn.Module's slow __setattr__


def close_siblings(parent: nn.Module, args: Any, output: Any) -> None:
    for group in siblings_of(parent):
        for layer in group:
            layer.__dict__.pop("siblings", None)
