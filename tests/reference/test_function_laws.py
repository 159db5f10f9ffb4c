"""Our advantages and heads keep the laws of theirs, and each law is broken by a mistake that is its own."""

import pytest
import torch

from logratio.benchmarks.projects.of_ours import CLAIMS, of_type
from logratio.losses import linear_logps
from logratio.losses.advantages import ADVANTAGES, advantages_of, differ
from logratio.reference.function_laws import advantage, check_advantage, check_kernel, kernel
from logratio.reference.laws import LawViolation

SKIPPED = {"passk": ["monotone"]}  # all but the best have 0


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "maxrl"])
def test_our_advantages_keep_them(name):
    skipped = SKIPPED.get(name, [])
    report = check_advantage(of_type(name), **CLAIMS[name], skip=skipped)
    assert {*report.held, *report.not_asked} == set(advantage.LAWS)
    assert len(report.not_asked) == sum(not value for value in CLAIMS[name].values()) + len(skipped)


@pytest.mark.parametrize("name", ["group", "rloo", "opo", "gpg"])
def test_our_advantages_keep_them_in_float32(name):
    report = check_advantage(of_type(name), **CLAIMS[name], dtype=torch.float32)
    assert "equal_rewards" in report.held


def test_float32_is_held_to_its_own_rounding():
    """A mean that is off by a rounding of float32 is a break in float64 and none in float32; 1e-3 is one in both."""
    for off, dtype in ((1e-7, torch.float64), (1e-3, torch.float32)):
        with pytest.raises(LawViolation, match="^sums_to_0"):
            check_advantage(
                lambda rewards, off=off: rewards - mean(rewards) * (1 + off), laws=["sums_to_0"], dtype=dtype
            )
    report = check_advantage(
        lambda rewards: rewards - mean(rewards) * (1 + 1e-7), laws=["sums_to_0"], dtype=torch.float32
    )
    assert report.held == ["sums_to_0"]


def test_one_that_refuses_negative_rewards_says_so():
    """MaxRL's (R - m) / m is of rewards from 0 on; the laws try others too."""
    with pytest.raises(ValueError, match="negative"):
        check_advantage(of_type("maxrl"), shift=None)


def test_our_other_scales_keep_them():
    check_advantage(of_type("group", scale="none"), scale="linear")
    check_advantage(of_type("group", scale="batch"), shift="step", independent=False)
    check_advantage(of_type("rloo", normalize_advantages=True), independent=False)


def mean(rewards):
    return rewards.nanmean(1, keepdim=True)


def drifting():
    calls = iter(range(10**6))
    return lambda rewards: advantages_of(rewards) * (1 + next(calls))


WRONG_ADVANTAGES = {
    "finite": lambda rewards: advantages_of(rewards) / (rewards - 1),
    "deterministic": drifting(),
    "equal_rewards": lambda rewards: advantages_of(rewards) + 1e-12,
    "within_a_group": lambda rewards: advantages_of(rewards) * torch.arange(1, rewards.shape[1] + 1),
    "of_groups": lambda rewards: advantages_of(rewards) * torch.arange(1, len(rewards) + 1)[:, None],
    "monotone": lambda rewards: advantages_of(rewards).abs(),
    "sums_to_0": lambda rewards: advantages_of(rewards) * (rewards > mean(rewards)),
    "shift_invariant": lambda rewards: advantages_of(rewards) * (1 + mean(rewards).abs()),
    "scaled": lambda rewards: advantages_of(rewards, scale="none"),
    "other_groups": lambda rewards: advantages_of(rewards, "reinforce_pp_baseline"),
    "missing": lambda rewards: advantages_of(rewards.nan_to_num(0.0)),
}


@pytest.mark.parametrize("law", advantage.LAWS)
def test_a_wrong_advantage_breaks_its_law(law):
    with pytest.raises(LawViolation, match="rewards ") as violation:
        skip = ["monotone"] if law == "sums_to_0" else []
        check_advantage(WRONG_ADVANTAGES[law], skip=skip)
    assert violation.value.law == law


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("monotone", lambda rewards: 0 * rewards),
        ("monotone", lambda rewards: rewards + 1e-6 * torch.arange(rewards.shape[1])),
        ("missing", lambda rewards: torch.where(rewards.isnan(), 1.0, advantages_of(rewards))),
        ("missing", lambda rewards: advantages_of(rewards.nan_to_num(0.0)) * ~rewards.isnan()),
    ],
    ids=["none is higher", "equals differ", "the missing one has some", "the others have other ones"],
)
def test_each_half_of_a_law_of_advantages(law, wrong):
    with pytest.raises(LawViolation, match=f"^{law}: "):
        check_advantage(wrong, laws=[law])


def test_one_that_a_run_takes_is_called_as_a_run_does():
    def above_the_mean(rewards, context):
        assert context.lengths.shape == rewards.shape and context.baseline.shape == (len(rewards), 1)
        return torch.where(differ(rewards), rewards - mean(rewards), 0.0)  # NaN where there is no reward

    def of_tokens(rewards, context):
        return above_the_mean(rewards, context)[..., None] * 0.99 ** torch.arange(int(context.lengths.max()))

    for fn in (above_the_mean, of_tokens, lambda r: advantages_of(r, scale="none")):
        assert "missing" in check_advantage(fn, scale="linear").held
    with pytest.raises(LawViolation, match="^sums_to_0: "):
        check_advantage(lambda rewards, context: above_the_mean(rewards, context) + context.lengths, laws=["sums_to_0"])


def test_the_message_of_an_advantage_shows_a_small_step():
    with pytest.raises(LawViolation) as violation:
        check_advantage(WRONG_ADVANTAGES["equal_rewards"])
    stated = "Where all rewards of a step are equal there is nothing to learn: exactly 0."
    assert str(violation.value) == f"equal_rewards: {stated}\n  rewards [[0.0, 0.0]] gives [[1e-12, 1e-12]]"
    with pytest.raises(LawViolation, match=r"^finite: .*\n  advantages \[1, 1\] for rewards \[1, 2\]"):
        check_advantage(lambda rewards: rewards[:, :1])
    with pytest.raises(ValueError, match="scaled cannot be asked: nothing is claimed of the scale"):
        check_advantage(of_type("group"), scale=None, laws=["scaled"])
    with pytest.raises(ValueError, match="typo: the laws are finite, "):
        check_advantage(of_type("group"), skip=["typo"])


def head_of(impl):
    def fn(hidden, weight, targets, chunk_tokens=4):
        return linear_logps(hidden, weight, targets, impl=impl, chunk_tokens=chunk_tokens)

    return fn


@pytest.mark.parametrize("impl", ["auto", "eager", "two_gemm"])
@pytest.mark.parametrize("trains_weight", [True, False])
def test_our_heads_keep_them(impl, trains_weight):
    report = check_kernel(head_of(impl), trains_weight=trains_weight)
    assert report.held == [name for name in kernel.LAWS if name != "ignored"]
    assert report.not_asked == {"ignored": "it has no ignore_index"}


def test_an_index_that_is_ignored():
    def masked(hidden, weight, targets):
        kept = targets != -100
        scored = linear_logps(hidden[kept], weight, targets[kept])
        return torch.zeros(len(targets), dtype=scored.dtype).masked_scatter(kept, scored)

    assert "ignored" in check_kernel(masked, ignore_index=-100).held
    with pytest.raises(LawViolation, match="^ignored: .*\n  .* row"):
        check_kernel(lambda h, w, y: kernel.plain(h, w, y.clamp(min=0)), ignore_index=-100)
    with pytest.raises(LawViolation, match="^ignored: .*\n  with rows that are ignored: log-probs is off by"):
        check_kernel(lambda h, w, y: 1.01 * masked(h, w, y), ignore_index=-100, laws=["ignored"])


def forgets(hidden, weight, targets, chunk_tokens=100):
    """The gradient of a last chunk that is smaller."""
    logps = kernel.plain(hidden, weight, targets)
    whole = len(logps) - len(logps) % chunk_tokens if len(logps) > chunk_tokens else len(logps)
    return torch.cat([logps[:whole], logps[whole:].detach()])


def overflows(hidden, weight, targets):
    logits = hidden @ weight.T
    return logits.gather(1, targets[:, None])[:, 0] - logits.exp().sum(1).log()


def cancels(hidden, weight, targets):
    """Its log-softmax in the dtype of the inputs."""
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def leaks(hidden, weight, targets):
    logps = kernel.plain(hidden, weight, targets)
    return logps + 0 * logps.sum()


WRONG_HEADS = {
    "definition": lambda h, w, y: 0.999 * kernel.plain(h, w, y),
    "chunks": forgets,
    "no_rows": lambda h, w, y: kernel.plain(h, w, y) if len(y) else kernel.plain(h, w, y).sum()[None],
    "rows_alone": leaks,
    "large_logits": overflows,
    "budget": cancels,
}


@pytest.mark.parametrize("law", WRONG_HEADS)
def test_a_wrong_head_breaks_its_law(law):
    with pytest.raises(LawViolation) as violation:
        check_kernel(WRONG_HEADS[law])
    assert violation.value.law == law


def five_times_the_error(hidden, weight, targets):
    exact = kernel.plain(hidden.double(), weight.double(), targets)
    return exact + 5 * (kernel.plain(hidden, weight, targets) - exact)


def adds_to_the_gradient(hidden, weight, targets):
    weight.register_hook(lambda grad: grad + 1)
    return kernel.plain(hidden, weight, targets)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("large_logits", lambda h, w, y: kernel.plain(h, w, y).abs()),
        ("large_logits", lambda h, w, y: kernel.plain(h, w, y) if h.dtype == torch.float64 else overflows(h, w, y)),
        ("no_rows", adds_to_the_gradient),
        ("budget", five_times_the_error),
    ],
    ids=["above 0", "in float32 alone", "a gradient of nothing", "five times the error"],
)
def test_each_half_of_a_law_of_heads(law, wrong):
    with pytest.raises(LawViolation, match=f"^{law}: "):
        check_kernel(wrong, laws=[law])


def test_what_cannot_be_asked_of_a_head_is_said():
    assert "float64 is not among" in check_kernel(head_of("eager"), dtypes=[torch.float32]).not_asked["definition"]
    assert "float64 is all" in check_kernel(head_of("eager"), dtypes=[torch.float64]).not_asked["budget"]
    with pytest.raises(LawViolation, match="no gradient of what trains"):
        check_kernel(lambda h, w, y: linear_logps(h, w.detach(), y))
