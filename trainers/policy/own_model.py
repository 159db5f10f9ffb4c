"""A model that a program has loaded itself, in the place of a name (`ground/given.py`)."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..errors import UserError
from .reach import loaded


class OwnModel:
    """model: trained as it is, in place; or the name of one, which a tokenizer of the program's own goes with.
    tokenizer: None is that of the files that the model came from."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.name = model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or "")
        self.model = None if isinstance(model, str) else model
        self._tokenizer = tokenizer
        self._waiting = [self.model]

    def keep_copy(self) -> None:
        """There will be asked for the model as it is now a second time, as the reference."""
        self._waiting.append(copy.deepcopy(self.model))

    @property
    def tokenizer(self) -> Any:
        """The one that was given, or that of the model's files."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            if not self.name:
                raise UserError("the model came from no files, so none says which tokenizer it has: processing_class=")
            missing = f"no tokenizer could be loaded from {self.name!r}; give processing_class="
            self._tokenizer = loaded(AutoTokenizer, self.name, missing)
        return self._tokenizer

    def take(self, device: torch.device) -> Any:
        """The model on the device, then its copy; None where there is a name alone."""
        model = self._waiting.pop(0)
        return model if model is None or getattr(model, "is_quantized", False) else model.to(device)
