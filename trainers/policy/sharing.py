"""Which models may share a prompt between its completions: what the configuration says, then a trial.

Neither alone is enough. A configuration does not tell of convolutions, ALiBi or attention code that adds a boolean
mask as 0 and 1; a short trial does not reach a chunk boundary or the length from which a rope rescales itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..attention import varlen
from ..attention.stretches import STRETCHES, adopt_stretches
from ..attention.trial import softcap_of
from ..batches.packing import PackedBatch, pack
from ..batches.sequences import VARLEN
from ..data.examples import Completion, Example
from ..errors import UserError, first_line
from .policy import Policy

PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 5e-2
# Tokens of the prompt that is shared on trial.
PROBE_PROMPT = 6
# Attention implementations that take a mask of ours, boolean or of sequences.
MASKED_ATTENTION = ("sdpa", STRETCHES, VARLEN)
# Their angles depend on the longest row of the batch.
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def share_prompts(policy: Policy, asked: str | None = None, autocast: torch.dtype | None = None) -> list[str]:
    """Pack as suits the policy (`Policy.shared`), with what `choose_attention` finds; returns what to tell the user."""
    obstacle, notes = choose_attention(policy, asked, autocast)
    policy.shared = not obstacle
    return [*notes, f"prompts are not shared between completions: {obstacle}"] if obstacle else notes


def choose_attention(
    policy: Policy, asked: str | None = None, autocast: torch.dtype | None = None
) -> tuple[str, list[str]]:
    """Let the model take the attention that suits packed rows, and decide with it whether prompts may be shared.

    asked: `attn_implementation` of the user. autocast: the dtype of its mixed precision, in which a GPU's kernels are
    tried, which differ by dtype. Returns why prompts may not be shared (or ""), and what to tell the user.
    """
    model = policy.causal_lm
    if asked == "flex_attention":  # whose kernels are compiled anew for rows of other lengths
        raise UserError(f"--attn_implementation {asked} does not take packed rows; leave it out")
    keep_softcap(model, asked)
    with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
        refused = varlen.adopt(model) if asked is None else ""
    obstacle = why_not_shared(policy, autocast if policy.by_sequences else None)
    if obstacle and policy.by_sequences:
        model.set_attn_implementation("sdpa")  # a model that has no use for these masks may do with a dense one
        refused, obstacle = obstacle, why_not_shared(policy)
    notes = [] if obstacle or not refused else [f"rows are masked densely, not with FlashAttention: {refused}"]
    if asked is None and not obstacle and adopt_stretches(model) and probe(policy, always=True):
        model.set_attn_implementation("sdpa")
    return obstacle, notes


def keep_softcap(model: Any, asked: str | None) -> None:
    """Let a model whose attention scores are capped (Gemma 2) take "eager" in place of "sdpa", which has no soft-cap.

    Some releases of transformers take "sdpa" for it all the same, by default too, and leave the cap out without a word.
    """
    cap = softcap_of(model)
    if cap is None or model.config._attn_implementation != "sdpa":
        return
    if asked:
        raise UserError(
            f"--attn_implementation {asked}: it has no soft-cap, and the model's attn_logit_softcapping is {cap}; "
            "leave it out"
        )
    model.set_attn_implementation("eager")


def why_not_shared(policy: Policy, autocast: torch.dtype | None = None) -> str:
    """The reason why prompts may not be shared between completions, or "" where they may.

    Raises UserError where a token sees what follows it, or where the model's own logits are not what the LM head of
    `Policy` computes.
    """
    changed = probe(policy, autocast)
    return configured_obstacle(policy.causal_lm.config) or changed


def configured_obstacle(config: Any, masked: Sequence[str] = MASKED_ATTENTION) -> str:
    """Why the configuration rules out that a mask of ours says what is seen, or "". masked: the attention
    implementations that take it."""
    config = config.get_text_config()
    foreign = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if foreign:
        return f"it has layers of type {', '.join(sorted(foreign))}"
    if config._attn_implementation not in masked:
        return f"its attention implementation {config._attn_implementation!r} does not take the mask that this needs"
    rope = getattr(config, "rope_parameters", None) or {}
    # one set of parameters, or one for each type of layer
    kinds = [rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, dict))]
    varying = [kind for kind in kinds if kind in BATCH_DEPENDENT_ROPE]
    if varying:
        return f"its rope ({varying[0]}) depends on the length of the batch"
    return ""


@torch.no_grad()
def probe(policy: Policy, autocast: torch.dtype | None = None, **mask: Any) -> str:
    """Try it: 12 tokens, two completions behind one prompt against each behind its own. Returns the reason, or "".

    autocast: the dtype in which the two are computed, if another than the model's. mask: options of its masks.
    """
    model = policy.causal_lm
    head = model.get_output_embeddings().weight
    ids = ((torch.arange(12) * 37 + 11) % min(head.shape[0], 97)).tolist()
    example = Example(ids[:PROBE_PROMPT], [Completion(ids[PROBE_PROMPT:9]), Completion(ids[9:])])
    was_training = policy.training
    policy.eval()
    try:
        (apart,) = pack([example], 1000, shared=False)
        apart = apart.to(head.device)
        hidden = policy.scored_states(apart)
        if not hidden.isfinite().all():  # or it would be taken for a model whose tokens see what follows
            raise UserError(
                f"{type(model).__name__} computes hidden states that are not finite in {hidden.dtype}; "
                "use another --dtype (float16 overflows where bfloat16 does not) or another checkpoint"
            )
        _check_causal(policy, apart)
        _check_head(policy, apart, model(input_ids=apart.input_ids, use_cache=False).logits)
        (together,) = pack([example], 1000, sequences=policy.by_sequences)
        together = together.to(head.device)
        try:
            with torch.autocast(head.device.type, autocast, enabled=autocast is not None):
                if autocast is not None:
                    hidden = policy.scored_states(apart)
                shared = policy.scored_states(together, **mask)
        except torch.OutOfMemoryError:  # which says nothing of shared prompts
            raise
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
            return f"with a shared prompt it raises {type(error).__name__}: {first_line(error)}"
    finally:
        policy.train(was_training)
    change = ((shared - hidden).norm() / hidden.norm()).item()
    tolerance = PROBE_TOLERANCE.get(autocast or hidden.dtype, LOW_PRECISION_TOLERANCE)
    return "" if change < tolerance else f"a shared prompt changes its hidden states by {change:.0e}, relative"


def _check_causal(policy: Policy, batch: PackedBatch) -> None:
    """Raise UserError unless the prompt's hidden states are the same in front of both completions."""
    one, other = policy.hidden_states(batch)[:, :PROBE_PROMPT]
    tolerance = PROBE_TOLERANCE.get(one.dtype, LOW_PRECISION_TOLERANCE)
    if (one - other).norm() > tolerance * one.norm():
        raise UserError(
            f"{type(policy.causal_lm).__name__} lets tokens see what follows them, so that it would learn to copy; "
            "use a causal (decoder-only) model"
        )


def _check_head(policy: Policy, batch: PackedBatch, logits: torch.Tensor) -> None:
    """Raise UserError unless our log-probabilities are those of the model's own logits."""
    ours = policy(batch).logps
    z = (logits.float() / policy.temperature).flatten(0, 1)[batch.hidden_index]
    own = batch.unflatten(z.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0])
    # theirs are rounded to the dtype, of which an offset that all words have leaves little (GPT-2, BLOOM)
    rounding = torch.finfo(logits.dtype).eps * z.amax(-1).abs().max().item()
    atol = (1e-3 if logits.dtype == torch.float32 else 0.1) + rounding
    if not torch.allclose(ours.float(), own, rtol=1e-2, atol=atol):
        raise UserError(
            f"{type(policy.causal_lm).__name__} turns hidden states into logits in a way that is not supported "
            "(beyond bias, scale and soft-cap), so its log-probabilities would be wrong; use another model"
        )
