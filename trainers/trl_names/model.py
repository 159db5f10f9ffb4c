"""Options of the model: its weights, adapters and quantization."""

from __future__ import annotations

import re
from typing import Any

from ..errors import UserError
from .rules import rule
from .verdicts import Asked, Verdict

PEFT_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
"""TRL's, of its `ModelConfig`."""
DTYPES = ("float32", "bfloat16", "float16")


@rule("dtype")
def dtype(a: Asked) -> Verdict:
    """float32, bfloat16 and float16 as here; auto: that of the model's files, which are looked at."""
    name = str(a.value).removeprefix("torch.")
    if name in DTYPES:
        return a.taken() if name == a.value else a.translated(dtype=name)
    if name != "auto":
        return a.refused(f"must be auto or one of {', '.join(DTYPES)}")
    found = stored_dtype(str(a.says("model_name_or_path", "tiny")), a.says("model_revision"))
    if found is None:
        return a.refused("the model's configuration could not be read for it; name one of " + ", ".join(DTYPES))
    return a.translated("that of the model's files", dtype=found)


def stored_dtype(name: str, revision: str | None = None) -> str | None:
    """Of a model's weights, as its configuration says; None where it cannot be read."""
    from ..policy.tiny import TINY

    if name == TINY:
        return "float32"
    from transformers import AutoConfig

    from ..policy.reach import loaded

    try:
        stored = loaded(AutoConfig, name, "no configuration", revision=revision).get_text_config().dtype
    except UserError:
        return None
    found = str(stored or "float32").removeprefix("torch.")
    return found if found in DTYPES else None


@rule("model_revision")
def revision(a: Asked) -> Verdict:
    """As here; main is the default, of a folder too."""
    return a.no_effect("the default") if a.value == "main" else a.taken()


@rule("use_peft")
def adapters(a: Asked) -> Verdict:
    """true: LoRA, with TRL's defaults (lora_r 16, lora_alpha 32, lora_dropout 0.05) for what is not given."""
    if not a.value:
        return a.no_effect("the whole model is trained")
    if a.says("adapter_name_or_path"):
        return a.no_effect("adapter_name_or_path brings its adapter")
    return a.translated("with TRL's defaults for what the file leaves out", **lora(a))


def lora(a: Asked) -> dict[str, Any]:
    """The numbers of new adapters."""
    return {name: a.says(name, default) for name, default in PEFT_DEFAULTS.items()}


def trains_adapters(a: Asked) -> bool:
    return bool(a.says("use_peft")) or a.ours or "lora_r" in a.words


@rule("lora_r", "lora_alpha", "lora_dropout")
def adapter_number(a: Asked) -> Verdict:
    """As here, with use_peft: true; without it TRL trains the whole model, and so does this run, which says so."""
    return a.taken() if trains_adapters(a) else a.no_effect(WHOLE)


WHOLE = "without use_peft: true TRL trains the whole model, and so does this run; add it for adapters"


@rule("use_dora", "use_rslora")
def kind_of_adapter(a: Asked) -> Verdict:
    """As here, with use_peft: true; without it without effect, in TRL too."""
    return a.taken() if trains_adapters(a) or not a.value else a.no_effect(WHOLE)


@rule("lora_target_modules", "lora_modules_to_save")
def targets(a: Asked) -> Verdict:
    """Names of modules, or all-linear, with use_peft: true; a pattern is refused."""
    if not trains_adapters(a):
        return a.no_effect(WHOLE)
    names = [a.value] if isinstance(a.value, str) else list(a.value)
    odd = [name for name in names if not re.fullmatch(r"[\w.-]+", str(name))]
    if odd:
        return a.refused(f"{odd[0]} is a pattern; name the modules, as [q_proj, v_proj], or all-linear")
    return a.taken() if isinstance(a.value, list) else a.translated("", **{a.key: names})


@rule("load_in_4bit", "load_in_8bit")
def quantized(a: Asked) -> Verdict:
    """nf4 with double quantization, or LLM.int8(), under adapters."""
    if not a.value:
        return a.taken()
    if not trains_adapters(a):
        return a.refused("quantized weights are frozen, so adapters must train: add use_peft: true")
    if a.key == "load_in_8bit":
        return (
            a.refused("load_in_4bit is asked for too; leave one of them out") if a.says("load_in_4bit") else a.taken()
        )
    return a.taken("nf4 with double quantization; computed in bfloat16 on a GPU")


@rule("bnb_4bit_quant_type")
def quant_type(a: Asked) -> Verdict:
    """nf4, the only one."""
    if not a.says("load_in_4bit"):
        return a.no_effect("read only with load_in_4bit")
    return a.no_effect("nf4 in any case") if a.value == "nf4" else a.refused("4-bit weights are nf4; leave it out")


@rule("use_bnb_nested_quant", "bnb_4bit_use_double_quant")
def nested(a: Asked) -> Verdict:
    """Always on."""
    if not a.says("load_in_4bit"):
        return a.no_effect("read only with load_in_4bit")
    return a.no_effect("the scales of nf4 are quantized in any case")


@rule("tokenizer")
def tokenizer(a: Asked) -> Verdict:
    """The model's own, by its name."""
    if a.value == a.says("model_name_or_path"):
        return a.no_effect("the tokenizer is the model's own in any case")
    return a.refused("the tokenizer is the model's own; put another into the model's folder")


@rule("gradient_checkpointing_kwargs")
def recomputed(a: Asked) -> Verdict:
    """use_reentrant alone, which changes no number."""
    others = sorted(set(a.value) - {"use_reentrant"}) if isinstance(a.value, dict) else [str(a.value)]
    if others:
        return a.refused(f"{', '.join(others)}: every layer is recomputed, without options; leave it out")
    return a.no_effect("activations are recomputed without reentrance, to the same gradient")


@rule("use_cpu")
def on_cpu(a: Asked) -> Verdict:
    """true: the variable ACCELERATE_USE_CPU."""
    if not a.value:
        return a.no_effect("a GPU is taken where there is one")
    verdict = a.translated("as the variable ACCELERATE_USE_CPU")
    return Verdict(**{**vars(verdict), "env": {"ACCELERATE_USE_CPU": "true"}})
