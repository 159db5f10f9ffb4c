"""The kit sees what is wrong: deliberately wrong losses, written as a stranger would, break the law that is theirs."""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from logratio.losses import CompletionLogps, DPOLoss, Kind, Loss, LossOutput, Mean, PairLogps, SFTLoss, Totals
from logratio.reference._law_runs import same_gradient, same_value
from logratio.reference.laws import LAWS, LawViolation, check_loss, for_every_batch, laws_of


@dataclass(frozen=True, kw_only=True)
class Right(Loss):
    """-log sigmoid(beta (r_w - r_l)); the others are this with one mistake each."""

    kind: ClassVar[Kind] = Kind.PAIRED
    wants_reference: ClassVar[bool] = True
    beta: float = 0.1

    def margins(self, policy: PairLogps, ref: PairLogps) -> Tensor:
        policy.chosen.check_like(tokens=False, ref=ref.chosen)
        return policy.chosen.sums - policy.rejected.sums - (ref.chosen.sums - ref.rejected.sums).detach()

    def value(self, per_pair: Tensor, policy: PairLogps, totals: Totals) -> Tensor:
        return torch.where(policy.scored, per_pair, per_pair * 0).sum() / totals.num_sequences

    def __call__(self, policy: PairLogps, ref: PairLogps, *, totals: Totals) -> LossOutput:
        margins = self.margins(policy, ref)
        value = self.value(softplus(-self.beta * margins), policy, totals)
        return LossOutput(value, {"margin": Mean.of(margins, policy.scored)})


@dataclass(frozen=True, kw_only=True)
class WrongSign(Right):
    def margins(self, policy, ref):
        return -super().margins(policy, ref)


@dataclass(frozen=True, kw_only=True)
class MaskDropped(Right):
    def margins(self, policy, ref):
        everything = policy.chosen.per_token_logps.sum(-1)
        return super().margins(policy, ref) + everything - policy.chosen.sums


@dataclass(frozen=True, kw_only=True)
class MeanOfTheMicroBatch(Right):
    def value(self, per_pair, policy, totals):
        return torch.where(policy.scored, per_pair, per_pair * 0).mean()


@dataclass(frozen=True, kw_only=True)
class ChangesItsInputs(Right):
    def margins(self, policy, ref):
        ref.chosen.per_token_logps[~ref.chosen.completion_mask] = 0.0
        return super().margins(policy, ref)


@dataclass(frozen=True, kw_only=True)
class AverageOverThePaddedWidth(Right):
    def margins(self, policy, ref):
        width = policy.chosen.completion_mask.shape[1]
        return super().margins(policy, ref) / width


@dataclass(frozen=True, kw_only=True)
class ReferenceLearns(Right):
    def margins(self, policy, ref):
        return policy.chosen.sums - ref.chosen.sums - policy.rejected.sums + ref.rejected.sums


@dataclass(frozen=True, kw_only=True)
class Broadcasts(Right):
    def margins(self, policy, ref):
        return policy.chosen.sums - policy.rejected.sums + (ref.rejected.sums - ref.chosen.sums).detach()


@dataclass(frozen=True, kw_only=True)
class Overflows(Right):
    def __call__(self, policy, ref, *, totals):
        margins = self.margins(policy, ref)
        value = self.value(torch.log1p(torch.exp(-self.beta * margins)), policy, totals)
        return LossOutput(value, {})


@dataclass(frozen=True, kw_only=True)
class HalfTheGradient(Right):
    def value(self, per_pair, policy, totals):
        return super().value(0.5 * per_pair + 0.5 * per_pair.detach(), policy, totals)


@dataclass(frozen=True, kw_only=True)
class Noisy(Right):
    def margins(self, policy, ref):
        margins = super().margins(policy, ref)
        return margins + torch.rand_like(margins)


@dataclass(frozen=True, kw_only=True)
class EmptyPairsCost(Right):
    def value(self, per_pair, policy, totals):
        return per_pair.sum() / totals.num_sequences


@dataclass(frozen=True, kw_only=True)
class EmptyPairsDilute(Right):
    """The margin is to beat the step's mean margin, in which pairs with nothing scored are 0."""

    window_pass: ClassVar[str] = "own"

    def collect(self, policy, ref):
        return self.margins(policy, ref)

    def __call__(self, policy, ref, *, totals):
        above = self.margins(policy, ref) - totals.collected.mean()
        return LossOutput(self.value(softplus(-self.beta * above), policy, totals), {})


@dataclass(frozen=True, kw_only=True)
class NoGraph(Right):
    def value(self, per_pair, policy, totals):
        return super().value(per_pair, policy, totals).detach()


@dataclass(frozen=True, kw_only=True)
class ReturnsTheValueAlone(Right):
    def __call__(self, policy, ref, *, totals):
        return super().__call__(policy, ref, totals=totals).loss


@dataclass(frozen=True, kw_only=True)
class LogsNumbers(Right):
    def __call__(self, policy, ref, *, totals):
        loss, _ = super().__call__(policy, ref, totals=totals)
        return LossOutput(loss, {"margin": loss.detach()})


@dataclass(frozen=True, kw_only=True)
class CarriesATensor(Right):
    def advance(self, totals):
        return {"steps": torch.tensor(totals.state.get("steps", 0) + 1)}


@dataclass(frozen=True, kw_only=True)
class Brier(Loss):
    """1 - 2 p + sum_v p_v^2 of a token: the last has no gradient in any model."""

    kind: ClassVar[Kind] = Kind.SEQUENCE
    stats: ClassVar[tuple[str, ...]] = ("log_sum_p2",)

    def __call__(self, policy: CompletionLogps, *, totals: Totals) -> LossOutput:
        score = 1 - 2 * policy.logps.exp() + policy.needed("log_sum_p2").exp()
        return LossOutput(policy.masked(score).sum() / max(totals.num_tokens, 1), {})


@dataclass(frozen=True, kw_only=True)
class AboveThePromptsMean(Loss):
    """-(A - mean of the prompt) log p(y), whose step is collected in float32, where there are fewer prompts."""

    kind: ClassVar[Kind] = Kind.GROUPED
    window_pass: ClassVar[str] = "own"
    wants_prompts: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.float32

    def collect(self, policy, advantages, old, prompts):
        there = policy.completion_mask.any(-1)
        return torch.stack([prompts.to(self.dtype), advantages.to(self.dtype), there.to(self.dtype)], 1)

    def __call__(self, policy, advantages, old, prompts, *, totals):
        if not len(prompts) == len(advantages) == len(policy.sums) == len((policy if old is None else old).sums):
            raise ValueError("a row each")
        number, a, there = totals.collected.unbind(1)
        advantages = advantages.to(policy.sums)
        same = (number == prompts[:, None].to(self.dtype)).to(a) * there
        above = advantages - ((same * a).sum(1) / same.sum(1).clamp(min=1)).to(advantages)
        ratio = policy.sums - (policy if old is None else old).sums.detach()
        per_row = torch.where(policy.completion_mask.any(-1), -above * ratio, 0.0)
        return LossOutput(per_row.sum() / totals.num_sequences, {})


@dataclass(frozen=True, kw_only=True)
class AboveThePromptsMeanInFloat64(AboveThePromptsMean):
    dtype: ClassVar[torch.dtype] = torch.float64


WRONG = {
    WrongSign: "direction",
    MaskDropped: "mask",
    MeanOfTheMicroBatch: "split",
    ChangesItsInputs: "nothing_in_place",
    AverageOverThePaddedWidth: "padding",
    ReferenceLearns: "only_the_policy_learns",
    Broadcasts: "no_broadcast",
    Overflows: "finite",
    HalfTheGradient: "gradient",
    Noisy: "deterministic",
    EmptyPairsCost: "nothing_scored",
    EmptyPairsDilute: "empty_example",
    NoGraph: "contract",
    ReturnsTheValueAlone: "contract",
    LogsNumbers: "contract",
    CarriesATensor: "contract",
    Brier: "gradient",
    AboveThePromptsMean: "renumbered",
}


def violation_of(loss: Loss, **options) -> LawViolation:
    with pytest.raises(LawViolation) as violation:
        check_loss(loss, **options)
    return violation.value


def test_a_right_loss_passes():
    check_loss(Right(), max_examples=10)
    check_loss(Right(beta=2.0), max_examples=10, seed=1)


@pytest.mark.parametrize(("loss", "law"), WRONG.items(), ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_loss_breaks_its_law(loss, law):
    violation = violation_of(loss(), max_examples=100 if loss is Overflows else 10)  # whose numbers are rare
    assert violation.law == law
    assert str(violation).startswith(f"{law}: {LAWS[law].statement}\n")


def test_what_overflows_on_both_sides_is_no_other_law_s_fault():
    """As long as it does so alike."""
    check_loss(Overflows(), laws=["padding", "permutation"], max_examples=40)
    infinite, nan, one = torch.tensor([math.inf, 1.0]), torch.tensor([math.nan, 1.0]), torch.ones(2)
    for a, b in ((infinite, infinite), (nan, nan)):
        same_gradient({"logps": a}, {"logps": b.clone()})
        same_value(a[0], b[0])
    for a, b in ((infinite, one), (infinite, -infinite), (nan, infinite), (one, nan)):
        with pytest.raises(AssertionError):
            same_gradient({"logps": a}, {"logps": b})
        with pytest.raises(AssertionError):
            same_value(a[0], b[0])


def test_the_message_shows_the_smallest_batch():
    message = str(violation_of(MeanOfTheMicroBatch(), max_examples=10))
    assert message.splitlines()[1].startswith("  the loss is ")
    assert "MeanOfTheMicroBatch(beta=0.1)" in message and "deal=[[0], [1]]" in message
    assert "paired batch of 2 examples (`_` is masked):" in message
    assert "  chosen policy         [[" in message and "rejected ref" in message and "prompt" not in message
    message = str(violation_of(MaskDropped(), max_examples=10))
    assert "batch of 1 example " in message and "fill=" in message
    assert "  chosen policy         [[_]]" in message


def test_what_is_returned_wrongly_is_told_in_words():
    told = {
        ReturnsTheValueAlone: "it must return LossOutput(loss, metrics), not Tensor",
        LogsNumbers: "its metric margin must be a Mean, such as Mean.of(values, where), not Tensor",
        CarriesATensor: "advance() gives steps as Tensor, not as a number",
    }
    for loss, words in told.items():
        assert str(violation_of(loss(), max_examples=1)).splitlines()[1] == f"  {words}"
    of_script = "check_loss holds an object of a class of logratio.losses.Loss with a `kind`, not "
    for given, words in {Right: "the class Right", 3: "a int", Loss(): "a Loss"}.items():
        with pytest.raises(TypeError, match=of_script + words):
            check_loss(given)


def test_a_number_without_gradient_may_be_a_weight_and_no_term():
    assert "(without gradient: log_sum_p2)" in str(violation_of(Brier(), max_examples=10))
    check_loss(Brier(), stops_gradients=True, max_examples=5)


def test_what_is_collected_is_held_before_what_is_made_of_it():
    assert list(LAWS).index("collected") < list(LAWS).index("split")


def test_direction_shows_the_batch_that_it_is_about():
    message = str(violation_of(WrongSign(), max_examples=10))
    assert "  chosen policy         [[-1]]" in message and "rejected ref          [[-1]]" in message


def test_what_a_list_does_not_have_is_not_shown():
    @dataclass(frozen=True, kw_only=True)
    class Nothing(Loss):
        kind: ClassVar[Kind] = Kind.LISTED

        def __call__(self, policy, rewards, sizes, *, totals):
            return LossOutput(policy.sums.sum().detach(), {})

    message = str(violation_of(Nothing(), max_examples=5))
    assert "third policy          [[]]" in message and re.search(r"rewards +\[\[0, 0, _\]\]", message)


def test_tokens_that_are_the_likeliest_are_told_apart():
    @dataclass(frozen=True, kw_only=True)
    class Misses(Loss):
        """-log p of the tokens that the model would not say itself."""

        kind: ClassVar[Kind] = Kind.SEQUENCE
        stats: ClassVar[tuple[str, ...]] = ("is_top1",)

        def __call__(self, policy, *, totals):
            missed = policy.completion_mask & ~policy.is_top1
            loss = torch.where(missed, -policy.logps, 0.0).sum() / max(totals.num_tokens, 1)
            return LossOutput(loss, {"missed": Mean.of(missed.float(), policy.completion_mask)})

    check_loss(Misses(), skip=["direction"], max_examples=4)
    shares = []
    for_every_batch("sequence", lambda batch: shares.append(batch.tokens["is_top1"]["completion"].double().mean()))
    assert 0 < sum(shares) < len(shares)


def test_numbers_of_prompts_that_are_kept_whole_pass():
    check_loss(AboveThePromptsMeanInFloat64(), skip=["direction"], max_examples=4)


def test_rows_may_be_refused_by_torch_itself():
    @dataclass(frozen=True, kw_only=True)
    class Split(Loss):
        kind: ClassVar[Kind] = Kind.LISTED

        def __call__(self, policy, rewards, sizes, *, totals):
            best = [x[r.argmax()] for x, r in zip(policy.sums.split(sizes), rewards.split(sizes), strict=True)]
            return LossOutput(-torch.stack(best).sum() / totals.num_sequences, {})

    check_loss(Split(), laws=["no_broadcast"], max_examples=4)


def test_what_is_declared_otherwise_than_it_can_be_is_refused():
    class Undecorated(Right):
        tau: float = 1.0

    def declaring(**names):
        return dataclass(frozen=True, kw_only=True)(type("Own", (Right,), names))

    for cls, words in {
        Undecorated: "Undecorated.tau is no option without @dataclass(frozen=True, kw_only=True)",
        declaring(kind="paired"): "Own.kind must be one of Kind.SEQUENCE, Kind.LABELED, .*, not 'paired'",
        declaring(stats="entropy"): "Own.stats must be a tuple of names, such as ('entropy',), not 'entropy'",
        declaring(stats=("entropy", "topk_mass")): "Own.stats='topk_mass' is unknown, expected one of: entropy, log_z",
        declaring(ref_stats=("entropie",)): "Own.ref_stats='entropie' is unknown, .* did you mean entropy?",
        declaring(window_pass="all"): "Own.window_pass='all' is unknown, expected one of: own, mismatched",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words).replace(r"\.\*", ".*")):
            cls()


def test_the_same_seed_finds_the_same_batch():
    assert str(violation_of(MaskDropped(), max_examples=10)) == str(violation_of(MaskDropped(), max_examples=10))


def test_laws_can_be_chosen_and_skipped():
    check_loss(WrongSign(), skip=["direction"], max_examples=5)
    check_loss(WrongSign(), laws=["padding", "split"], max_examples=5)
    check_loss(HalfTheGradient(), stops_gradients=True, max_examples=5)
    with pytest.raises(ValueError, match="typo: Right has the laws .*'padding'"):
        check_loss(Right(), laws=["typo"])
    with pytest.raises(ValueError, match="has the laws"):
        check_loss(Right(), laws=["without_old"])
    assert "without_old" not in laws_of(Right()) and "no_broadcast" not in laws_of(SFTLoss())


def test_a_law_can_be_called_by_itself():
    from logratio.reference import generic_laws as laws
    from logratio.reference.strategies import Batch

    one = torch.full((2, 1), -1.0, dtype=torch.float64)
    masks = {part: torch.ones(2, 1, dtype=torch.bool) for part in ("chosen", "rejected")}
    tokens = {role: {"chosen": one, "rejected": 2 * one} for role in ("policy", "ref")}
    batch = Batch("paired", masks, tokens, {}, torch.zeros(0))
    laws.padding(DPOLoss(), batch, left=1, right=2)
    with pytest.raises(AssertionError, match="^split: the loss is 1.386.*, expected 0.693"):
        laws.split(MeanOfTheMicroBatch(), batch, deal=[[0], [1]])


def test_it_works_in_a_plain_script_and_leaves_nothing_behind(tmp_path):
    script = "from logratio.losses import DPOLoss\nfrom logratio.reference.laws import check_loss\n"
    script += "check_loss(DPOLoss(), max_examples=5)\ncheck_loss(DPOLoss(loss_type='discopop'), max_examples=5)\n"
    (tmp_path / "script.py").write_text(script)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HYPOTHESIS")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "script.py"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "LawViolation: direction: At policy = reference = old" in done.stderr
    assert "Falsifying" not in done.stderr and "hypothesis" not in done.stderr.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
