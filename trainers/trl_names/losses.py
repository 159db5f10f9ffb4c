"""Options of the losses."""

from __future__ import annotations

from typing import Any

from .rules import rule
from .verdicts import Asked, Verdict

OLDER = {"chunked_nll": "nll", "aot_pair": "aot"}
"""Other names of a loss_type -> today's."""
OF_RLOO = {"loss_type": "rloo", "advantage_type": "rloo"}
"""TRL's RLOO trainer as options of ours."""


@rule("loss_type")
def loss_type(a: Asked) -> Verdict:
    """As here; chunked_nll is nll, aot_pair is aot. kto_pair is refused: take kto."""
    given = [a.value] if isinstance(a.value, str) else list(a.value)
    if not given:
        return a.refused("names no loss; leave it out for the default")
    if "kto_pair" in given:
        return a.refused("it left TRL long ago; train kto")
    if a.method == "rloo":
        return a.taken() if given == ["rloo"] else a.refused("RLOO has one loss; leave it out")
    today = [OLDER.get(name, name) for name in given]
    if a.says("rpo_alpha"):
        return a.no_effect("see rpo_alpha")
    value = today if a.method == "dpo" else today[0]
    if a.method != "dpo" and len(today) > 1:
        return a.refused("several at once are an option of dpo")
    return a.taken() if today == given else a.translated(loss_type=value)


@rule("rpo_alpha")
def rpo(a: Asked) -> Verdict:
    """A second loss_type sft of that weight, as TRL's own guide to migration has it."""
    given = a.says("loss_type", "sigmoid")
    names = [given] if isinstance(given, str) else list(given)
    weights = list(a.says("loss_weights", [1.0] * len(names)))
    return a.translated(loss_type=[*names, "sft"], loss_weights=[*weights, a.number()])


@rule("loss_weights")
def weights(a: Asked) -> Verdict:
    """As here."""
    return a.no_effect("see rpo_alpha") if a.says("rpo_alpha") else a.taken()


@rule("beta")
def beta(a: Asked) -> Verdict:
    """As here; RLOO: reward_kl_coef, since its divergence is taken off the reward."""
    if a.method != "rloo":
        return a.taken()
    return a.translated("RLOO takes the divergence off the reward", reward_kl_coef=a.number())


@rule("cpo_alpha")
def cpo_alpha(a: Asked) -> Verdict:
    """As here; 0 with loss_type alphapo, whatever is given, as in TRL."""
    if a.says("loss_type") == "alphapo":
        return a.no_effect("alphapo has none, in TRL neither")
    return a.taken()


@rule("epsilon")
def epsilon(a: Asked) -> Verdict:
    """As here; with loss_type cispo TRL caps the ratio at it, which is epsilon_high."""
    if a.says("loss_type") != "cispo":
        return a.taken()
    if a.says("epsilon_high") is not None:
        return a.no_effect("cispo has no lower bound, and epsilon_high is its cap")
    return a.translated("TRL caps cispo's ratio at it", epsilon_high=a.number())


@rule("importance_sampling_level")
def level(a: Asked) -> Verdict:
    """As here; sequence with loss_type vespo is refused: TRL corrects its divergence alone by the sequence's ratio."""
    if a.value == "sequence" and a.says("loss_type") == "vespo":
        return a.refused("vespo's ratios are of tokens; leave it out")
    return a.taken()


VLLM_CORRECTION = "vllm_importance_sampling_correction"
VLLM_MODE = "vllm_importance_sampling_mode"


@rule(VLLM_CORRECTION, VLLM_MODE, "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max")
def sampled(a: Asked) -> Verdict:
    """With use_vllm sampling_correction, sampling_clip_min and sampling_clip_max, whatever engine samples."""
    if not a.says("use_vllm"):
        return a.no_effect("read only with use_vllm: true")
    if not a.says(VLLM_CORRECTION, True):
        if a.key == VLLM_CORRECTION:
            return a.translated(sampling_correction="none")
        return a.no_effect(f"read only with {VLLM_CORRECTION}: true")
    mode = a.says(VLLM_MODE, "sequence_mask")
    if a.key in (VLLM_CORRECTION, VLLM_MODE):
        return a.translated(sampling_correction=mode)
    became: dict[str, Any] = {"sampling_correction": mode, a.key.removeprefix("vllm_importance_"): a.number()}
    return a.translated(**became)


@rule("ref_model_mixup_alpha", "ref_model_sync_steps")
def followed(a: Asked) -> Verdict:
    """As here with sync_ref_model, else without effect."""
    return a.taken() if a.says("sync_ref_model") else a.no_effect("read only with sync_ref_model: true")
