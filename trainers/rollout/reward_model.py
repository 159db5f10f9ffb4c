"""A model as a reward: a sequence classifier with one label, which scores a prompt with its completion.

As in TRL: the text of both, a conversation by the chat template of the reward model's own tokenizer, without further
special tokens and padded on the right; its reward is the one logit.

Differs from TRL 1.16:
1. It is scored in batches of at most `TOKENS` tokens, of texts of like length; there all at once.
2. A classifier with other labels, or whose head is not in its files and would be random, is refused; so is a text that
   is longer than the model has positions, which there ends in an IndexError or is scored all the same.
3. A model that is given as an object is put into eval mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from ..data.chat.templates import ChatTemplate
from ..data.tokenization import Text
from ..errors import UserError
from ..policy.checks import check_finite, check_folder, learned_positions
from ..policy.reach import loaded
from .calling.asked import CompletionError

TOKENS = 16_384
"""In a forward pass, with padding."""
OPTION = "--reward_funcs"


@dataclass(frozen=True)
class OwnReward:
    """A classifier that a program gives, or the name of one, with a tokenizer of the program's own or None."""

    model: Any
    tokenizer: Any = None


class RewardModel:
    """A reward in the signature of all (`rewards.py`). name: of the model, for messages; metrics have its last part."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name, self.tokens = model.eval(), tokenizer, name, TOKENS
        self.__name__ = Path(name).name or type(model).__name__
        check_labels(model.config, name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer of the reward model {name!r} has neither a padding token nor one that ends")
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # it scores the last token that is another
        self.template = ChatTemplate(tokenizer)
        self.longest = min(
            getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31,
            learned_positions(model) or 2**31,
            tokenizer.model_max_length,
        )
        takes = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in takes else {}

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
        texts = [self.text(i, *both) for i, both in enumerate(zip(prompts, completions, strict=True))]
        rows = self.tokenizer(text=texts, add_special_tokens=False, verbose=False)
        for i, ids in enumerate(rows["input_ids"]):
            if not ids:
                raise CompletionError(i, "with its prompt it has no token to score")
            if len(ids) > self.longest:
                raise CompletionError(
                    i,
                    f"with its prompt it has {len(ids)} tokens, and this reward model takes up to {self.longest}: "
                    "lower --max_length and --max_completion_length, or take another reward model",
                )
        scores = [0.0] * len(texts)
        for batch in batches([len(ids) for ids in rows["input_ids"]], self.tokens):
            for i, score in zip(batch, self.scored(rows, batch), strict=True):
                scores[i] = score
        return scores

    def text(self, index: int, prompt: Text, completion: Text) -> str:
        """What is scored."""
        if isinstance(prompt, str):
            assert isinstance(completion, str)
            return prompt + completion
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                "prompts are conversations, and its tokenizer has no chat template to write them with: put one into "
                "its folder as chat_template.jinja"
            )
        try:
            return self.template.text(self.template.normal([*prompt, *completion], "it"), {}, "it")
        except UserError as error:
            raise CompletionError(index, str(error)) from error

    @torch.inference_mode()
    def scored(self, rows: Any, batch: Sequence[int]) -> list[float]:
        """The logits of these texts."""
        given = {}
        for name, values in rows.items():
            filling = self.tokenizer.pad_token_id if name == "input_ids" else 0  # of a mask, or of types
            padded = pad_sequence([torch.tensor(values[i]) for i in batch], batch_first=True, padding_value=filling)
            given[name] = padded.to(self.model.device)
        scores: list[float] = self.model(**given, **self.options).logits[:, 0].tolist()
        return scores


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of at most so many tokens with padding, longest first; one alone may have more."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def check_labels(config: Any, name: str) -> None:
    """UserError unless the classifier says one number of a text."""
    if config.num_labels != 1:
        raise UserError(
            f"the reward model {name!r} has {config.num_labels} labels, and a reward is one number: take one with a "
            "single label (num_labels=1), or write a function that makes a number of its labels"
        )


def reward_model(given: Any, device: torch.device, dtype: str) -> RewardModel:
    """The reward of a name, a classifier of transformers, or an `OwnReward`. dtype: of one that is loaded here."""
    own = given if isinstance(given, OwnReward) else OwnReward(given)
    model, tokenizer = own.model, own.tokenizer
    name = model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or "")
    if isinstance(model, str):
        model = load_classifier(model, dtype)
    elif not hasattr(getattr(model, "config", None), "num_labels"):
        raise UserError(
            f"the reward {type(model).__name__} is no classifier of transformers: write a function of completions that "
            "calls it"
        )
    if tokenizer is None:
        if not name:
            raise UserError(
                "a reward model came from no files, so none says which tokenizer it has: reward_processing_classes="
            )
        missing = f"no tokenizer could be loaded from the reward model {name!r}, whose files should have one"
        tokenizer = loaded(AutoTokenizer, name, missing)
    return RewardModel(model.to(device), tokenizer, name)


def load_classifier(name: str, dtype: str) -> Any:
    """UserError where there is none, or one whose score would be random."""
    check_folder(name, OPTION)
    nowhere = "" if Path(name).is_dir() else f", which is no folder here (looked in {Path.cwd()})"
    config = loaded(AutoConfig, name, f"no reward model could be loaded from {name!r}{nowhere}")
    classifies = any("ForSequenceClassification" in one for one in getattr(config, "architectures", None) or ())
    if classifies:
        check_labels(config, name)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"num_labels": 1, "dtype": getattr(torch, dtype)}
    kind, missing = AutoModelForSequenceClassification, f"no reward model could be loaded from {name!r}"
    try:
        model, info = loaded(kind, name, missing, **options)
    finally:
        logging.set_verbosity(verbosity)
    lacking = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if lacking:
        raise UserError(
            f"{name!r} is no reward model: its files have no {lacking[0]} for one label, which would be random; name a "
            "classifier with a single label, trained to score"
        )
    check_finite(model, repr(name))
    return model
