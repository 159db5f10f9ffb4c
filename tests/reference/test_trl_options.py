"""Every option of TRL's losses takes effect, or is known to be ignored or refused; formulas by hand for some."""

import functools
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from logratio.benchmarks.peers.randoms import random_model
from logratio.reference import oracle, trl
from logratio.trainers.policy.tiny import tiny_tokenizer

RTOL = 1e-5

PAIRS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five?"},
    {"prompt": "Say hi.", "chosen": " Hello, you", "rejected": " no"},
    {"prompt": "abc", "chosen": "d", "rejected": "x"},
    {"prompt": "?", "chosen": "!", "rejected": "......"},
]


@functools.cache
def setting() -> tuple[Any, Any]:
    return random_model(LlamaConfig, 3), tiny_tokenizer()


@functools.cache
def rows_of(method: str) -> list[dict[str, Any]]:
    if method in ("dpo", "cpo"):
        return PAIRS
    if method == "tpo":
        return [dict(row, reference=PAIRS[i - 1]["chosen"]) for i, row in enumerate(PAIRS)]
    if method in ("sft", "kto"):
        return [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 != 1} for i, r in enumerate(PAIRS)]
    model, tokenizer = setting()
    generator = torch.Generator().manual_seed(1)
    rows = []
    # advantage and log-ratio of the whole answer: the first two are clipped, above and below
    for row, advantage, log_ratio in zip(PAIRS, (1.3, -0.4, -1.1, 0.6), (0.5, -0.5, 0.1, -0.1), strict=True):
        ids = [tokenizer(row[name]).input_ids for name in ("prompt", "rejected")]
        with torch.no_grad():
            logps = oracle.sequence_logps(model, *ids).completion
        noise = [0.4 * torch.randn(len(logps), generator=generator) for _ in range(2)]
        others = [(logps + x - x.mean() - log_ratio / len(logps)).tolist() for x in noise]
        names = ("prompt_ids", "completion_ids", "old_per_token_logps", "ref_per_token_logps")
        rows.append({"advantage": advantage, **dict(zip(names, [*ids, *others], strict=True))})
    return rows


@functools.cache
def cached(method: str, options: tuple[tuple[str, Any], ...] = ()) -> trl.Result:
    return trl.loss_and_grads(method, *setting(), rows_of(method), **dict(options))


def run(method: str, **options: Any) -> trl.Result:
    return cached(method, tuple(options.items()))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative, in norm, of two whole gradients."""
    x, y = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (a, b))
    return ((x - y).norm() / y.norm()).item()


EFFECTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dpo", {}, {"loss_type": ("sigmoid", "sft")}),
    ("dpo", {"loss_type": ("sigmoid", "sft")}, {"loss_weights": (0.5, 1.0)}),
    ("dpo", {"loss_type": "robust"}, {"label_smoothing": 0.1}),
    ("dpo", {"loss_type": "aot"}, {"label_smoothing": 0.1}),
    ("dpo", {"loss_type": "aot_unpaired"}, {"label_smoothing": 0.1}),
    ("dpo", {"loss_type": "exo_pair", "label_smoothing": 0.1}, {"label_smoothing": 0.01}),
    ("dpo", {}, {"f_divergence_type": "forward_kl"}),
    ("dpo", {}, {"f_divergence_type": "js_divergence"}),
    ("dpo", {"f_divergence_type": "alpha_divergence"}, {"f_alpha_divergence_coef": 0.2}),
    ("dpo", {}, {"ld_alpha": 0.5}),
    ("dpo", {}, {"use_weighting": True}),
    ("dpo", {"loss_type": "discopop"}, {"discopop_tau": 0.2}),
    ("kto", {}, {"loss_type": "apo_zero_unpaired"}),
    ("kto", {"loss_type": "apo_zero_unpaired"}, {"undesirable_weight": 0.5}),
    ("cpo", {}, {"cpo_alpha": 0.0}),
    ("cpo", {}, {"label_smoothing": 0.1}),
    ("cpo", {"loss_type": "simpo"}, {"simpo_gamma": 1.0}),
    ("cpo", {"loss_type": "simpo"}, {"loss_type": "alphapo"}),
    ("cpo", {"loss_type": "alphapo"}, {"alpha": 0.25}),
    ("tpo", {}, {"tpo_alpha": 0.0}),
    ("tpo", {}, {"label_smoothing": 0.1}),
    ("tpo", {"loss_type": "tpo-l"}, {"tpo_l_gamma": 1.0}),
    ("grpo", {}, {"delta": 1.1}),
    ("grpo", {}, {"epsilon_high": 0.3}),
    ("grpo", {}, {"importance_sampling_level": "sequence"}),
    ("grpo", {}, {"top_entropy_quantile": 0.3}),
    ("grpo", {}, {"off_policy_mask_threshold": 0.0}),
    ("grpo", {}, {"entropy_coef": 0.1}),
    ("grpo", {"entropy_coef": 0.1, "top_entropy_quantile": 0.3}, {"entropy_coef": 0.2}),
    ("grpo", {"beta": 0.4}, {"use_bias_correction_kl": False}),
    ("grpo", {"loss_type": "cispo"}, {"epsilon_high": 5.0}),
    ("grpo", {"loss_type": "sapo"}, {"sapo_temperature_pos": 2.0}),
    ("grpo", {"loss_type": "sapo"}, {"sapo_temperature_neg": 2.0}),
    ("grpo", {"loss_type": "vespo"}, {"vespo_k_pos": 1.0}),
    ("grpo", {"loss_type": "vespo"}, {"vespo_lambda_pos": 1.0}),
    ("grpo", {"loss_type": "vespo"}, {"vespo_k_neg": 1.0}),
    ("grpo", {"loss_type": "vespo"}, {"vespo_lambda_neg": 1.0}),
    ("grpo", {"loss_type": "luspo"}, {"importance_sampling_level": "sequence"}),
    ("rloo", {}, {"epsilon": 0.05}),
    ("rloo", {}, {"epsilon_high": 0.5}),
    ("gmpo", {}, {"epsilon": 0.1}),
    ("gmpo", {"epsilon": 0.1}, {"epsilon_high": 0.6}),
    ("gmpo", {}, {"beta": 0.4}),
    ("gmpo", {}, {"top_entropy_quantile": 0.3}),
]


@pytest.mark.slow  # one that went astray would also set TRL apart from the oracle and from ours
@pytest.mark.parametrize("method, base, change", EFFECTS, ids=str)
def test_an_option_changes_the_loss(method: str, base: dict, change: dict) -> None:
    before, after = run(method, **base), run(method, **base | change)
    assert abs(after.loss - before.loss) > 1e-4 * max(abs(before.loss), before.scale)


@pytest.mark.parametrize(
    "method, base, change",
    [
        ("dpo", {}, {"label_smoothing": 0.1}),  # sigmoid without a word, hinge too
        ("cpo", {"loss_type": "alphapo"}, {"cpo_alpha": 1.0}),  # the configuration sets it to 0
        ("cpo", {}, {"cpo_alpha": None}),  # None is TRL's default
        ("gmpo", {}, {"delta": 1.1, "entropy_coef": 0.1, "off_policy_mask_threshold": 0.0}),
        ("gmpo", {}, {"importance_sampling_level": "sequence"}),
        ("gmpo", {"beta": 0.4}, {"use_bias_correction_kl": False}),
    ],
    ids=str,
)
def test_what_trl_ignores(method: str, base: dict, change: dict) -> None:
    assert run(method, **base | change).loss == run(method, **base).loss


@pytest.mark.parametrize(
    "method, options, error, message",
    [
        ("dpo", {"loss_type": "exo_pair"}, ValueError, "Label smoothing must be greater than 0"),
        ("dpo", {"loss_type": "aot", "f_divergence_type": "js_divergence"}, ValueError, "only supported for the"),
        ("dpo", {"loss_type": "aot", "use_weighting": True}, NotImplementedError, "WPO"),
        ("dpo", {"loss_type": ("sigmoid", "sft"), "use_weighting": True}, RuntimeError, "single memory location"),
        ("rloo", {"beta": 0.1}, ValueError, "none is in its loss"),
    ],
    ids=str,
)
def test_what_is_refused(method: str, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(method, **options)


# ---------------------------------------------------------------------------------------------- formulas by hand
def logps(result: trl.Result, kind: str, reference: bool = False) -> list[torch.Tensor]:
    """Of the very tokens that TRL fed its model, each sequence forwarded alone."""
    model, _ = setting()
    with torch.no_grad():
        if reference:
            with model.disable_adapter():
                return [oracle.sequence_logps(model, *s.split()).completion for s in result.sequences[kind]]
        return [oracle.sequence_logps(model, *s.split()).completion for s in result.sequences[kind]]


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(x)


def test_dpo_terms_are_added_with_their_weights_and_long_answers_count_less() -> None:
    """0.5 softplus(-beta Delta) - 2 mean of the chosen's log-probs; tokens past the shorter answer count ld_alpha."""
    result = run("dpo", loss_type=("sigmoid", "sft"), loss_weights=(0.5, 2.0), ld_alpha=0.25)
    chosen, rejected = logps(result, "chosen"), logps(result, "rejected")
    ratios = []
    for side, ref in ((chosen, logps(result, "chosen", True)), (rejected, logps(result, "rejected", True))):
        shared = [min(len(w), len(v)) for w, v in zip(chosen, rejected, strict=True)]
        both = [p - r for p, r in zip(side, ref, strict=True)]
        ratios.append(torch.stack([d[:n].sum() + 0.25 * d[n:].sum() for d, n in zip(both, shared, strict=True)]))
    expected = 0.5 * softplus(-0.1 * (ratios[0] - ratios[1])).mean() - 2 * torch.cat(chosen).mean()
    assert result.loss == pytest.approx(expected.item(), rel=RTOL)


def test_cpo_sums_and_simpo_averages_with_the_token_mean_of_the_chosen() -> None:
    for loss_type, gamma in (("sigmoid", 0.0), ("simpo", 0.5)):
        result = run("cpo", loss_type=loss_type, label_smoothing=0.2, beta=0.3)
        reduce = torch.Tensor.sum if loss_type == "sigmoid" else torch.Tensor.mean
        chosen = logps(result, "chosen")
        s = [torch.stack([reduce(x) for x in side]) for side in (chosen, logps(result, "rejected"))]
        x = 0.3 * (s[0] - s[1]) - gamma
        expected = (0.8 * softplus(-x) + 0.2 * softplus(x)).mean() - torch.cat(chosen).mean()
        assert result.loss == pytest.approx(expected.item(), rel=RTOL)


def test_tpo_adds_the_token_mean_of_the_gold_answers() -> None:
    result = run("tpo", loss_type="tpo-l", tpo_alpha=0.7, tpo_l_gamma=0.2, beta=0.4)
    a = [torch.stack([x.mean() for x in logps(result, side)]) for side in ("chosen", "rejected")]
    expected = softplus(0.2 - 0.4 * (a[0] - a[1])).mean() - 0.7 * torch.cat(logps(result, "reference")).mean()
    assert result.loss == pytest.approx(expected.item(), rel=RTOL)
    gold = [setting()[1].decode(s.split()[1]) for s in result.sequences["reference"]]
    assert gold == [row["reference"] + setting()[1].eos_token for row in rows_of("tpo")]


def test_kto_without_a_kl_estimate() -> None:
    result = run("kto", loss_type="apo_zero_unpaired", desirable_weight=1.5)
    assert set(result.sequences) == {"completion"}
    both = zip(logps(result, "completion"), logps(result, "completion", True), strict=True)
    r = torch.stack([(p - ref).sum() for p, ref in both])
    sign = torch.tensor([1.0 if row["label"] else -1.0 for row in rows_of("kto")])
    expected = (torch.where(sign > 0, 1.5, 1.0) * torch.sigmoid(-sign * 0.1 * r)).mean()
    assert result.loss == pytest.approx(expected.item(), rel=RTOL)


def test_rloo_clips_the_ratio_of_the_sequence_and_gmpo_the_logarithms_of_the_tokens() -> None:
    rows = rows_of("rloo")
    advantages = torch.tensor([row["advantage"] for row in rows])
    old = [torch.tensor(row["old_per_token_logps"]) for row in rows]
    result = run("rloo")
    log_ratios = [p - o for p, o in zip(logps(result, "completion"), old, strict=True)]
    w = torch.stack([x.sum() for x in log_ratios]).exp()
    expected = -torch.min(w * advantages, w.clamp(0.8, 1.2) * advantages).mean()
    assert abs(result.loss - expected) <= RTOL * result.scale
    result = run("gmpo", epsilon=0.1)
    held = [x.clamp(max=0.1) if a > 0 else x.clamp(min=-0.1) for x, a in zip(log_ratios, advantages, strict=True)]
    expected = -(torch.stack([x.mean() for x in held]).exp() * advantages).mean()
    assert abs(result.loss - expected) <= RTOL * result.scale


# ---------------------------------------------------------------------------------------------- micro-batches
@pytest.mark.parametrize("method", trl.METHODS)
def test_one_micro_batch_is_the_batch(method: str) -> None:
    rows = PAIRS if method == "orpo" else rows_of(method)
    result = trl.loss_and_grads(method, *setting(), rows)
    loss, grads = trl.micro_batched(method, *setting(), rows, 1)
    assert abs(loss - result.loss) <= RTOL * max(abs(loss), result.scale)
    assert distance(grads, result.grads) < RTOL


@pytest.mark.parametrize(
    "method, exact", [("sft", True), ("dpo", True), ("grpo", True), ("kto", False), ("tpo", False)]
)
def test_a_split_is_the_mean_of_its_parts_and_the_batch_only_for_some(method: str, exact: bool) -> None:
    rows = rows_of(method)
    loss, grads = trl.micro_batched(method, *setting(), rows, 2)
    assert (distance(grads, run(method).grads) < RTOL) == exact
    if method in ("kto", "tpo"):
        parts = [trl.loss_and_grads(method, *setting(), part) for part in (rows[:2], rows[2:])]
        assert loss == pytest.approx(sum(p.loss for p in parts) / 2, rel=RTOL)
        mean = {name: (parts[0].grads[name] + parts[1].grads[name]) / 2 for name in grads}
        assert distance(grads, mean) < RTOL


def test_a_split_into_unequal_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="4 rows cannot be cut into 3 equal parts"):
        trl.micro_batched("dpo", *setting(), PAIRS, 3)


# ---------------------------------------------------------------------------------------------- advantages
REWARDS = [[1.0, 2.0], [0.5, None], [None, None], [3.0, 1.0]]


def advantages(method: str, **options: Any) -> list[float]:
    return trl.advantages(method, *setting(), REWARDS, num_generations=2, **options)


def test_group_advantages() -> None:
    """Sums 3, 0.5 | none, 4: the group of one scored answer has no advantage."""
    d = 1.25 / (2.5 / 2**0.5 + 1e-4)
    assert advantages("grpo") == pytest.approx([d, -d, 0, 0])
    assert advantages("gmpo", scale_rewards="none") == pytest.approx([1.25, -1.25, 0, 0])
    std = torch.tensor([3.0, 0.5, 4.0]).std().item() + 1e-4
    assert advantages("grpo", scale_rewards="batch") == pytest.approx([1.25 / std, -1.25 / std, 0, 0])
    d = 0.75 / (1.5 / 2**0.5 + 1e-4)  # sums 1 + 2/2, 0.5
    assert advantages("grpo", reward_weights=[1.0, 0.5]) == pytest.approx([d, -d, 0, 0])


def test_rewards_normalized_one_by_one() -> None:
    """Only the first function scores both answers of the first group; then whitened over the scored ones."""
    d = 0.25 / (0.5 / 2**0.5 + 1e-4)
    whitened = torch.tensor([d, -d, 0.0])
    d = (whitened[0] / (whitened.std() + 1e-4)).item()
    found = advantages("grpo", multi_objective_aggregation="normalize_then_sum")
    assert found == pytest.approx([d, -d, 0, 0], rel=1e-5, abs=1e-6)


def test_leave_one_out_advantages() -> None:
    assert advantages("rloo") == pytest.approx([2.5, -2.5, 0, 0])
    # beta 0.5 times the KL 1 of the first answer comes off its reward
    assert advantages("rloo", beta=0.5, kl=[1.0, 0.0, 0.0, 0.0]) == pytest.approx([2.0, -2.0, 0, 0])
    d = 2.5 / (2.5 * 2**0.5 + 1e-4)
    assert advantages("rloo", normalize_advantages=True) == pytest.approx([d, -d, 0, 0])
