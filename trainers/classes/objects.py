"""What a trainer is given as objects, as options and as names under which the loop finds them (`ground/given.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError, shown
from ..ground.given import PREFIX
from ..ground.plugins import names_a_model
from ..policy.own_model import OwnModel
from ..rollout.reward_model import OwnReward

MODEL, REFERENCE = f"{PREFIX}model", f"{PREFIX}ref_model"
DATA, PEFT, REWARD = f"{PREFIX}dataset", f"{PREFIX}peft_config", f"{PREFIX}reward"
ROLLOUT = f"{PREFIX}rollout_func"
TABLES = {
    "pandas": "datasets.Dataset.from_pandas(...)",
    "polars": "datasets.Dataset.from_polars(...)",
    "pyarrow": "datasets.Dataset(...) of it",
}
"""Libraries whose tables are taken from by column -> how to make rows of them."""
NOT_TAKEN = {
    "data_collator": "micro-batches are packed by the trainer; what of a row is learned, its columns prompt and "
    "completion say, or messages with assistant_only_loss",
    "compute_metrics": "evaluations report the method's metrics",
    "compute_loss_func": "a loss of your own is a class (docs/laws.md): `logratio train --loss module:Class`",
    "optimizer_cls_and_kwargs": "the optimizer is AdamW, by the option optim",
    "optimizers": "the optimizer is AdamW, by the option optim, and the schedule lr_scheduler_type; a loop of your own "
    "calls `Step` (docs/start/python.md)",
    "preprocess_logits_for_metrics": "there are no logits beyond the scored tokens",
    "tools": "let a function of yours call them: rollout_func= (docs/rollouts.md)",
    "environment_factory": "let a function of yours make and ask the environments: rollout_func= (docs/rollouts.md)",
}
"""What TRL's trainers take and ours does not -> why, and what to do."""


class Objects:
    """options: ours, by name. found: the objects by the names that the options say."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.found: dict[str, Any] = {}

    def add_model(self, model: Any, ref_model: Any, tokenizer: Any) -> None:
        """Names, folders or models of transformers; a tokenizer that goes with them."""
        if model is None:
            raise UserError("model= is missing: a name, a folder, or a model of transformers")
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            instead = " (its .tokenizer, of a processor)" if hasattr(tokenizer, "tokenizer") else ""
            raise UserError(
                f"processing_class= must be a tokenizer of transformers{instead}, got {type(tokenizer).__name__}"
            )
        self.options["model_name_or_path"] = self._model(MODEL, model, tokenizer)
        if ref_model is not None:
            self.options["ref_model_name_or_path"] = self._model(REFERENCE, ref_model, tokenizer)

    def _model(self, name: str, model: Any, tokenizer: Any) -> str:
        if isinstance(model, str):
            if tokenizer is None:
                return model
            self.found[name] = OwnModel(model, tokenizer)
            return name
        if hasattr(model, "peft_config"):
            raise UserError(
                "the model has adapters already: give its base model with peft_config=, or, to go on training saved "
                "adapters, the base model and adapter_name_or_path="
            )
        if not hasattr(model, "get_input_embeddings"):
            raise UserError(f"model= must be a name or a model of transformers, got {type(model).__name__}")
        self.options["dtype"] = str(model.dtype).removeprefix("torch.")
        self.found[name] = OwnModel(model, tokenizer)
        return name

    def keep_start(self) -> None:
        """Copy the model as it is, if it is an object: full fine-tuning is compared with it."""
        if MODEL in self.found:
            self.found[MODEL].keep_copy()

    def add_data(self, train: Any, evaluation: Any, formatted: Any = None) -> None:
        """Data sets of `datasets`, lists of rows, or names. formatted: a function from a row to its text, which is what
        is learned."""
        if isinstance(train, str) or train is None:
            if formatted is not None:
                raise UserError("formatting_func= is of rows: give a train_dataset= of them, not a name")
            if evaluation is not None:
                raise UserError("eval_dataset= goes with a train_dataset= of its kind; name a dataset_test_split")
            self.options |= {} if train is None else {"dataset_name": [train]}
            return
        splits = {"train": rows_of(train, "train_dataset")}
        if evaluation is not None:
            splits["test"] = rows_of(evaluation, "eval_dataset")
            self.options["dataset_test_split"] = "test"
        self.found[DATA] = {split: texts_of(rows, formatted) if formatted else rows for split, rows in splits.items()}
        self.options["dataset_name"] = [DATA]

    def add_adapters(self, config: Any) -> None:
        """A LoraConfig of PEFT, whatever in it is set."""
        from peft import LoraConfig

        if config is None:
            return
        if not isinstance(config, LoraConfig):
            raise UserError(f"peft_config= must be a LoraConfig, got {type(config).__name__}")
        if config.task_type not in (None, "CAUSAL_LM"):
            raise UserError(f"peft_config= is for {config.task_type}, not for a causal language model")
        self.found[PEFT] = config
        self.options |= {"lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        self.options |= {"lora_target_modules": [PEFT], "use_dora": config.use_dora, "use_rslora": config.use_rslora}
        self.options["lora_modules_to_save"] = config.modules_to_save

    def add_quantization(self, config: Any) -> None:
        """A BitsAndBytesConfig of nf4 with double quantization, or of 8 bits."""
        if config is None:
            return
        if getattr(config, "load_in_8bit", False):
            self._refuse_other(config, {"llm_int8_threshold": 6.0, "llm_int8_skip_modules": None})
            self.options["load_in_8bit"] = True
            return
        if not getattr(config, "load_in_4bit", False):
            raise UserError("quantization_config= must say load_in_4bit=True or load_in_8bit=True")
        self._refuse_other(config, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True})
        self.options["load_in_4bit"] = True

    def _refuse_other(self, config: Any, ours: Mapping[str, Any]) -> None:
        """Raise UserError where weights would be quantized in another way than here."""
        for name, value in ours.items():
            if getattr(config, name) != value:
                raise UserError(
                    f"quantization_config= has {name}={getattr(config, name)!r}; the trainer quantizes with {value!r}: "
                    "say so, or load the model with yours and give the model"
                )

    def add_rewards(self, funcs: Any, tokenizers: Any) -> None:
        """Functions, classifiers of transformers, or names as on the command line; a tokenizer for each of them, which
        only a model reads, or None."""
        if funcs is None:
            return
        each: Sequence[Any] = funcs if isinstance(funcs, list | tuple) else [funcs]
        none = [None] * len(each) if tokenizers is None else [tokenizers]
        given: Sequence[Any] = tokenizers if isinstance(tokenizers, list | tuple) else none
        if len(given) != len(each):
            raise UserError(
                f"reward_processing_classes= has {len(given)} tokenizers for {len(each)} reward_funcs=: one each, None "
                "for what is a function"
            )
        self.options["reward_funcs"] = [self._reward(i, *one) for i, one in enumerate(zip(each, given, strict=True))]

    def add_rollout_func(self, function: Any) -> None:
        """A function, or module:function."""
        if function is None or isinstance(function, str):
            self.options |= {} if function is None else {"rollout_func": function}
            return
        name = f"{ROLLOUT}:{getattr(function, '__name__', type(function).__name__)}"
        self.found[name], self.options["rollout_func"] = function, name

    def _reward(self, i: int, reward: Any, tokenizer: Any) -> str:
        if isinstance(reward, str) and (tokenizer is None or not names_a_model(reward)):
            return reward
        name = f"{REWARD}{i}:{getattr(reward, '__name__', type(reward).__name__)}"
        self.found[name] = OwnReward(reward, tokenizer) if isinstance(reward, str | nn.Module) else reward
        return name


def texts_of(rows: Any, formatted: Callable[[Any], str]) -> Any:
    """The same rows as texts. UserError where the function, which sees one row, returns none."""

    def made(row: Any, index: int) -> dict[str, str]:
        text = formatted(row)
        if not isinstance(text, str):
            raise UserError(
                f"formatting_func= must return the text of the one row that it is given, and returned {shown(text)} "
                f"for row {index}"
            )
        return {"text": text}

    if isinstance(rows, Dataset):
        return rows.map(made, with_indices=True, remove_columns=rows.column_names, desc="formatting_func")
    return [made(row, index) for index, row in enumerate(rows)]


def rows_of(data: Any, what: str) -> Any:
    """Rows that can be taken by their number. UserError for others."""
    if isinstance(data, Mapping):
        raise UserError(f"{what}= must be one data set, got {len(data)} by name: {', '.join(map(str, data))}")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise UserError(
            f"{what}= must have a length, which {type(data).__name__} has not; to stream, give the name of the data as "
            f"{what}= and streaming=True"
        )
    if (library := type(data).__module__.partition(".")[0]) in TABLES:
        raise UserError(f"{what}= must be rows, got a {type(data).__name__} of {library}: give {TABLES[library]}")
    return data
