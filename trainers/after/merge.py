"""`logratio merge RUN DIR`: an adapter added into its base, as one model.

The weights become W + (alpha / r) B A, rounded to the dtype in which they are saved. Of a run on nf4 weights W is what
these stand for, since that is what the adapter was trained on; not the weights that they were made from. What rounding
costs is measured on real text and said: the difference of log-probabilities before and after.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from logratio.losses import CompletionLogps

from ..checkpoints.folder import write_whole
from ..errors import UserError
from ..policy.checks import foreign
from .trained import Dtype, base_of, device_of, load_trained, was_quantized

TEXT = (
    "The sum of two and three is five. Water boils at one hundred degrees.\nQ: What is 12 + 7?\nA: 19",
    "def square(x):\n    return x * x\n\nprint(square(4))  # 16",
)
"""Of which log-probabilities are compared."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which adapter, and where to."""

    run: tyro.conf.Positional[str]
    """A run's output_dir, or any folder with an adapter of PEFT."""
    folder: tyro.conf.Positional[str | None] = None
    """Folder for the merged model; it must not exist, or be empty."""
    output_dir: str | None = None
    """The same by its name."""
    dtype: Dtype = "float32"
    """Of the merged weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda where there is one."""


def main(argv: list[str] | None = None) -> int:
    """Add an adapter into its base model, from nf4 too, and say what that changes."""
    options = tyro.cli(Options, args=argv, prog="logratio merge", use_underscores=True)
    if (options.folder is None) == (options.output_dir is None):
        raise UserError(f"name one folder for the merged model: logratio merge {options.run} FOLDER")
    options = dataclasses.replace(options, output_dir=options.folder or options.output_dir)
    answer = merged(options)
    print(
        f"merged into {options.output_dir} ({options.dtype}); over {answer['tokens']} tokens the log-probabilities "
        f"differ by {answer['mean_difference']:.2g} in the mean and {answer['largest_difference']:.2g} at most, "
        f"where the adapter changes them by {answer['mean_effect']:.2g}"
    )
    return 0


def merged(options: Options) -> dict[str, Any]:
    """Merge, save, and compare what is saved. UserError where there is no adapter, or the folder is used."""
    if base_of(options.run) is None:
        raise UserError(f"{options.run} holds no adapter (adapter_config.json), so there is nothing to merge")
    folder = Path(options.output_dir or "")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and not empty; name another")
    device = device_of(options.device)
    trained, tokenizer = load_trained(options.run, "float32", device)
    before = logps(trained, tokenizer)
    with trained.disable_adapter():
        base = logps(trained, tokenizer)
    model = load_trained(options.run, "float32", device, dequantize=True)[0] if was_quantized(options.run) else trained
    part_from_head(model.get_base_model())

    def fill(partial: Path) -> None:
        whole.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    with foreign(f"{options.run} could not be merged"):
        whole = model.merge_and_unload().to(getattr(torch, options.dtype))
        write_whole(folder, fill)
    again, _ = load_trained(str(folder), options.dtype, device)
    difference = (logps(again, tokenizer) - before).abs()
    answer = {
        "merged_from": options.run,
        "base": base_of(options.run),
        "dtype": options.dtype,
        "tokens": len(difference),
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
        "mean_effect": float((before - base).abs().mean()),
    }
    (folder / "merge.json").write_text(json.dumps(answer, indent=2) + "\n")
    return answer


def part_from_head(base: Any) -> None:
    """Give the LM head weights of its own where it has the embedding's and an adapter is on that: the adapter changes
    what is looked up, and not the head, and in one tensor both would be changed."""
    head, words = base.get_output_embeddings(), base.get_input_embeddings()
    if hasattr(words, "lora_embedding_A") and words.base_layer.weight is head.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False


@torch.no_grad()
def logps(model: Any, tokenizer: Any) -> Tensor:
    """[n] float64, nats, of `TEXT`'s tokens."""
    found = []
    for text in TEXT:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], device=model.device)
        found.append(CompletionLogps.from_logits(model(input_ids=ids).logits, ids).per_token_logps.flatten())
    return torch.cat(found).double().cpu()
