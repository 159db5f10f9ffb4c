"""Why a peer differs: one sentence and its equation for every row of the atlas that is not equal.

The command fails where a row measures different and has no reason here, and where it has one but measures equal.

Symbols: B examples and N tokens of the optimizer step, cut into k micro-batches of n_j tokens; sp = softplus, e label
smoothing, A advantage, rho = exp(log p - log p_old), |y| tokens of a completion, T width of a padded batch.
"""

from __future__ import annotations

Key = tuple[str, str]
"""(peer, name of the variant)"""

_LEVEL = "Refused: ValueError, the sequence level is not implemented for this loss type."
_WIDTH = (
    "terms are summed over padding too, and scaled by |y_i| / T: sum_i |y_i| sum_{t <= T} l_it / (B T) instead of "
    "sum_i sum_{t <= |y_i|} l_it / B."
)

_LUSPO_KL = "grpo luspo,importance_sampling_level=sequence,beta=0.04"
_SEQUENCE = tuple(f"grpo {name},importance_sampling_level=sequence" for name in ("cispo", "sapo"))
_KTO_WEIGHTED = "kto kto,desirable_weight=1.5,undesirable_weight=0.5"
_SMOOTHED = (
    "label_smoothing is taken with `sigmoid` and ignored: sp(-x), plain DPO, instead of (1 - e) sp(-x) + e sp(x). That "
    "is `cdpo` here, where `sigmoid` refuses the option."
)

_WHOLE: list[tuple[str, str, tuple[str, ...]]] = [
    (
        "trl",
        "Refused: RuntimeError, the sft term is one number expanded to the batch, which `loss *= w_w w_l` cannot write "
        "to.",
        ("dpo sigmoid+sft,use_weighting=True",),
    ),
    ("trl", _SMOOTHED, ("dpo sigmoid with e = 0.1",)),
    ("liger", _SMOOTHED, ("dpo sigmoid with e = 0.1",)),
    (
        "trl",
        "The configuration sets cpo_alpha to 0 whatever was asked for: L = mean l instead of mean l + cpo_alpha NLL.",
        ("cpo alphapo,alpha=0.25,cpo_alpha=1.0",),
    ),
    (
        "trl",
        "Another default, not another formula: epsilon_high is epsilon's 0.2 instead of 5, so that the weight is "
        "min(rho, 0.2).",
        ("grpo cispo (defaults)",),
    ),
    ("liger", "There are no class weights: 1 - sigmoid(+-beta (r - z)), not w times it.", (_KTO_WEIGHTED,)),
    (
        "liger",
        "The NLL is by default of the response alone, -sum_response log p / n_response, instead of prompt and response "
        "(which nll_target gives: `orpo orpo,beta=1.0`).",
        ("orpo orpo",),
    ),
    ("liger", f"Token-level {_WIDTH}", ("grpo luspo",)),
    ("liger", f"The KL makes the loss token-level, whose {_WIDTH}", (_LUSPO_KL,)),
    ("liger", _LEVEL, _SEQUENCE),
    (
        "liger",
        "Another default, not another formula: beta is 0.04 instead of 0, so that 0.04 (exp(-d) + d - 1) is added.",
        ("grpo (defaults)",),
    ),
]
REASONS: dict[Key, str] = {(peer, name): reason for peer, reason, names in _WHOLE for name in names}
"""Of the whole batch's loss and gradient."""

_NLL = "The NLL is the token mean of the micro-batch: (1/k) sum_j (NLL_j / n_j) instead of sum_j NLL_j / N."
_SORTED = "Sorted within the micro-batch: u_(i) is matched with v_(i) among B/k values instead of B."
_KL = "z = max(0, mean of mismatched log-ratios) is of the micro-batch, mismatched within itself."
_TOKENS = "Divides by the tokens of the micro-batch: (1/k) sum_j (sum_t l / n_j) instead of sum_t l / N."
_TOLD = f"{_TOKENS[:-1]}; num_items_in_batch repairs it."
_ENTROPY = "The bonus is the mean entropy of the micro-batch: (1/k) sum_j (sum_t H / n_j) instead of sum_t H / N."
_QUANTILE = "Keeps the tokens above the micro-batch's entropy quantile, not the step's."
_PADDED = "T is the padded width of the micro-batch (see above)."

_NLL_CPO = (
    *("cpo sigmoid", "cpo sigmoid,label_smoothing=0.1", "cpo hinge", "cpo ipo", "cpo simpo"),
    *("orpo orpo", "orpo orpo,beta=1.0"),
)
_SPLITS: list[tuple[str, str, tuple[str, ...]]] = [
    ("trl", _NLL, ("dpo sft", "dpo sigmoid+bco_pair+sft,loss_weights=0.8+0.2+1.0", *_NLL_CPO)),
    ("trl", _NLL, ("tpo sigmoid", "tpo hinge", "tpo ipo", "tpo tpo-l")),
    ("liger", _NLL, tuple(name for name in _NLL_CPO if name not in ("cpo hinge", "cpo ipo"))),
    ("trl", _SORTED, ("dpo aot", "dpo aot,label_smoothing=0.1", "dpo aot_unpaired")),
    ("trl", _KL, ("kto kto", _KTO_WEIGHTED)),
    ("liger", _KL, ("kto kto", _KTO_WEIGHTED)),
    ("trl", _TOKENS, ("grpo bnpo",)),
    ("liger", _TOKENS, ("grpo bnpo",)),
    ("liger", _TOLD, ("grpo dapo", "grpo cispo", "grpo vespo", "grpo dapo,importance_sampling_level=sequence")),
    ("liger", _TOLD, ("grpo dapo,beta=0.04", "grpo (defaults)")),
    ("liger", _PADDED, ("grpo luspo", _LUSPO_KL)),
    ("trl", _ENTROPY, ("grpo dapo,entropy_coef=0.1",)),
    ("trl", _QUANTILE, ("grpo dapo,top_entropy_quantile=0.4", "grpo dapo,entropy_coef=0.1,top_entropy_quantile=0.4")),
]
SPLIT_REASONS: dict[Key, str] = {(peer, name): reason for peer, reason, names in _SPLITS for name in names}
"""Of the change of the gradient when the batch is cut in micro-batches."""
