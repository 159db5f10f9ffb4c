"""The kit sees what is wrong: deliberately wrong losses, written as a stranger would, break the law that is theirs."""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from logratio.losses import DPOLoss, Kind, Loss, LossOutput, Mean, PairLogps, SFTLoss, Totals
from logratio.reference.laws import LAWS, LawViolation, check_loss, laws_of


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
    violation = violation_of(loss(), max_examples=10)
    assert violation.law == law
    assert str(violation).startswith(f"{law}: {LAWS[law].statement}\n")


def test_the_message_shows_the_smallest_batch():
    message = str(violation_of(MeanOfTheMicroBatch(), max_examples=10))
    assert message.splitlines()[1].startswith("  the loss is ")
    assert "MeanOfTheMicroBatch(beta=0.1)" in message and "deal=[[0], [1]]" in message
    assert "paired batch of 2 examples (`_` is masked):" in message
    assert "  chosen policy         [[" in message and "rejected ref" in message and "prompt" not in message
    message = str(violation_of(MaskDropped(), max_examples=10))
    assert "batch of 1 example " in message and "fill=" in message
    assert "  chosen policy         [[_]]" in message


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
