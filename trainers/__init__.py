"""The data, the policy and the loop. Imports losses.

Three layers of one story: `logratio.losses` (functions of log-probabilities), `Step` (a batch in, a gradient out), and
`train` (the whole). TRL's classes (`SFTTrainer`, `DPOTrainer`, ... and their `SFTConfig`, `DPOConfig`, ...) are a thin
layer over `train`. What is named in `__all__` is imported when it is asked for.
"""

import importlib
import logging
from typing import Any

_METHODS = ("SFT", "DPO", "KTO", "ORPO", "CPO", "TPO", "Listwise", "GRPO", "RLOO")
_WHERE = {
    **{f"{method}Trainer": "classes.trainer" for method in _METHODS},
    **{f"{method}Config": "classes.arguments" for method in _METHODS},
    "RunConfig": "config",
    "Step": "step",
    "UserError": "errors",
    "train": "loop",
}
__all__ = sorted(_WHERE)  # noqa: PLE0605
_TRLS = ("get_peft_config", "get_quantization_config", "get_kbit_device_map", "get_dataset", "setup_chat_format")
"""Functions of TRL that scripts import in one line with its classes."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        said = f"{__name__} has no {name}; it has {', '.join(__all__)}"
        if name[:1].isupper() or name in _TRLS:  # `from` says nothing of an AttributeError
            raise ImportError(f"{said}. What else a script takes from trl goes on to come from there")
        raise AttributeError(said)
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


def _no_kernel_of_theirs(record: logging.LogRecord) -> bool:
    """Whether to let through what bitsandbytes logs when it is imported, as PEFT does for every model, and when it
    multiplies.

    On a CPU with AVX512-BF16 it asks for the package `kernels`, whose product nothing here uses. Of 8-bit weights it
    says in every layer of every pass that it multiplies in float16, which a run says once.
    """
    return not any(text in record.getMessage() for text in ("gemm_4bit_forward", "will be cast from"))


for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).addFilter(_no_kernel_of_theirs)
