"""One batch under three implementations: ours as a training step takes it, TRL's trainer, Liger's chunked losses.

All three see the same tiny model and tokens, in float32, and give a loss and the gradient of every LoRA parameter, for
the batch as a whole or cut in micro-batches as the implementation's user would accumulate them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig

from logratio.losses import LOSSES, Kind
from logratio.reference import oracle, trl
from logratio.reference._trl_batches import rollouts
from logratio.trainers.data.examples import Example, prepare
from logratio.trainers.data.rows import Rows
from logratio.trainers.ground.provenance import installed
from logratio.trainers.policy.mismatch import mismatched
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference
from logratio.trainers.policy.sharing import why_not_shared
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.setup import start_accelerator
from logratio.trainers.step import Step

from .randoms import old_logps, plain_logps, random_groups, random_model, random_rows, rollout_rows, sampled_by_another
from .sides import fill_old
from .truths import MAX_LENGTH, Gradient

LIGER_VERSION = "0.8.5"
BATCH = 8
PARTS = 4
GROUP = 2


class Data(NamedTuple):
    """rows: in TRL's format. examples: the same tokens; rollouts by group. old, behavior: of rollouts, by `tokens_key`.

    Rows have the sampler's log-probs too, which are given where a correction is asked for.
    """

    rows: list[dict[str, Any]]
    examples: list[Example]
    old: dict[str, list[Tensor]]
    behavior: dict[str, list[Tensor]]


@functools.cache
def the_model() -> Any:
    """A tiny Llama whose adapters are small enough that log-ratios to the reference are a few nats."""
    return random_model(LlamaConfig, 0, adapters=0.15)


@functools.cache
def data_of(method: str, seed: int = 1) -> Data:
    """`BATCH` ragged examples of a method, or as many rollouts in groups of `GROUP`, off policy."""
    if LOSSES[method].kind is Kind.GROUPED:
        return _rollouts(seed)
    rows = random_rows(method, seed, BATCH)
    examples, _ = prepare(
        Rows("random", rows), LOSSES[method].kind, tiny_tokenizer(), max_length=MAX_LENGTH, gold=method == "tpo"
    )
    return Data(rows, examples, {}, {})


def _rollouts(seed: int) -> Data:
    model = the_model()
    examples = random_groups(seed, BATCH // GROUP, GROUP)
    old = old_logps(model, examples, seed)
    behavior = sampled_by_another(old, seed + 1)
    with model.disable_adapter():
        ref = plain_logps(model, examples)
    return Data(rollout_rows(examples, old, ref, behavior), examples, old, behavior)


def chunks(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Consecutive parts of equal size."""
    size = len(items) // parts
    return [items[i : i + size] for i in range(0, len(items), size)]


def ours(method: str, options: Mapping[str, Any], parts: int = 1) -> Gradient:
    """Our loss of one optimizer step: no micro-batch has examples of two `parts`; uneven lengths are cut finer."""
    data, loss = data_of(method), LOSSES[method](**options)
    examples = data.examples
    if loss.kind is Kind.PAIRED and not loss.scores_gold:
        examples = [example.take([0, 1]) for example in examples]
    policy = Policy(copy.deepcopy(the_model()), stats=(*loss.stats, *loss.ref_stats))
    policy.shared = not why_not_shared(policy)
    reference = AdapterReference(policy, loss.ref_stats) if loss.wants_reference else None
    step = Step(
        start_accelerator("no"),
        policy,
        loss,
        reference,
        micro_batch_tokens=1 << 20,
        max_length=MAX_LENGTH,
    )
    micros = [micro for part in chunks(examples, parts) for micro in step.micro_batches(part)]
    if data.old:
        fill_old(micros, reference, data.old, data.behavior if "sampling_correction" in options else None)
    return Gradient.of(policy.model, step(micros, step.totals(examples, micros)).loss.item())


def trls(method: str, options: Mapping[str, Any], parts: int = 1) -> Gradient:
    """TRL's. Raises what its trainer raises for options that it refuses."""
    mine = "grpo" if method in ("rloo", "gmpo") else method  # they are loss types here
    rows, model, tokenizer = data_of(mine).rows, the_model(), tiny_tokenizer()
    if not any(name.startswith("vllm_") for name in options):
        rows = [{name: value for name, value in row.items() if name != "sampling_per_token_logps"} for row in rows]
    if parts == 1:
        result = trl.loss_and_grads(method, model, tokenizer, rows, max_length=MAX_LENGTH, **options)
        return Gradient(result.loss, result.scale, result.grads)
    loss, grads = trl.micro_batched(method, model, tokenizer, rows, parts, max_length=MAX_LENGTH, **options)
    return Gradient(loss, abs(loss), grads)


# ---------------------------------------------------------------------------------------------- Liger
def ligers(name: str, options: Mapping[str, Any], parts: int = 1) -> Gradient:
    """Liger's chunked loss `name` (DPO, KTO, ORPO, CPO, SimPO, GRPO) on the last hidden states, eager.

    options: of its class, and three for its call. nll_target: ORPO's NLL covers the prompt too. kl: KTO gets TRL's
    estimate. num_items_in_batch: GRPO is told the tokens of the step, and its micro-batches are added up; otherwise
    their mean is taken.
    """
    import liger_kernel.chunked_loss as liger

    options = dict(options)
    call = {key: options.pop(key) for key in ("nll_target", "num_items_in_batch", "kl") if key in options}
    loss_function = getattr(liger, f"LigerFusedLinear{name}Loss")(compiled=False, **options)
    model = copy.deepcopy(the_model())
    run: Any = {"KTO": _liger_kto, "GRPO": _liger_grpo}.get(name, _liger_pairs)
    data = data_of({"SimPO": "cpo"}.get(name, name.lower()))
    items = chunks(data.rows if name == "GRPO" else data.examples, parts)
    if "num_items_in_batch" in call:
        call["num_items_in_batch"] = sum(len(row["completion_ids"]) for row in data.rows)
    total = 0.0
    for part in items:
        loss = run(loss_function, model, part, call) / (1 if "num_items_in_batch" in call else parts)
        loss.backward()
        total += loss.item()
    return Gradient.of(model, total, abs(total))


def _padded(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> SimpleNamespace:
    """(prompt, completion) pairs as ids, mask and shifted targets [B, T], -100 on prompt and padding."""
    ids = pad_sequence([torch.tensor([*p, *c]) for p, c in sequences], True, 0)
    mask = pad_sequence([torch.ones(len(p) + len(c), dtype=torch.long) for p, c in sequences], True, 0)
    labels = pad_sequence([torch.tensor([-100] * len(p) + list(c)) for p, c in sequences], True, -100)
    everything = ids.masked_fill(mask == 0, -100)
    return SimpleNamespace(ids=ids, mask=mask, target=labels[:, 1:], everything=everything[:, 1:])


def _hidden(model: Any, batch: SimpleNamespace) -> Tensor:
    return model.base_model.model.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state[:, :-1]


def _reference_hidden(model: Any, batch: SimpleNamespace) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        return _hidden(model, batch)


def _head(model: Any) -> Tensor:
    return model.get_output_embeddings().weight


def _liger_pairs(loss_function: Any, model: Any, part: Sequence[Example], call: dict[str, Any]) -> Tensor:
    batch = _padded([(e.prompt_ids, e.completions[k].ids) for k in (0, 1) for e in part])
    arguments = {}
    if getattr(loss_function, "use_ref_model", False):
        arguments = {"ref_input": _reference_hidden(model, batch), "ref_weight": _head(model)}
    if call.get("nll_target"):
        arguments["nll_target"] = batch.everything
    return loss_function(_head(model), _hidden(model, batch), batch.target, **arguments)[0]


def _liger_kto(loss_function: Any, model: Any, part: Sequence[Example], call: dict[str, Any]) -> Tensor:
    """With the KL estimate that TRL makes of the micro-batch, if the options ask for any: Liger takes it as given."""
    batch = _padded([(e.prompt_ids, e.completions[0].ids) for e in part])
    arguments = {"ref_input": _reference_hidden(model, batch), "ref_weight": _head(model)}
    arguments["preference_labels"] = torch.tensor([bool(e.label) for e in part])
    if call.get("kl"):
        arguments["kl"] = kl_of(model, part).clamp(min=0)
    return loss_function(_hidden(model, batch), _head(model), batch.target, **arguments)[0]


def kl_of(model: Any, part: Sequence[Example]) -> Tensor:
    """The mean log-ratio of mismatched completions, not clamped."""
    pairs = [(e.prompt_ids, e.completions[0].ids) for e in mismatched(part, MAX_LENGTH)]

    def total() -> Tensor:
        with torch.no_grad():
            return torch.stack([oracle.sequence_logps(model, *pair).completion.sum() for pair in pairs])

    policy = total()
    with model.disable_adapter():
        return (policy - total()).mean()


def _liger_grpo(loss_function: Any, model: Any, part: Sequence[Mapping[str, Any]], call: dict[str, Any]) -> Tensor:
    """Prompts padded left, completions right, as TRL makes them."""
    batch = rollouts("grpo", part, 0)
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    hidden = _hidden(model, SimpleNamespace(ids=ids, mask=mask))[:, -batch["completion_ids"].shape[1] :]
    given = [batch[name] for name in ("completion_ids", "completion_mask", "advantages")]
    call = call | {name: batch[name] for name in ("ref_per_token_logps", "old_per_token_logps")}
    return loss_function(hidden, _head(model), *given, **call)[0]


def versions() -> dict[str, str | None]:
    """Of everything that the numbers depend on."""
    return {name: installed(name) for name in ("torch", "transformers", "peft", "trl", "liger-kernel")}
