"""Identities between the oracle's pair losses, and their gradients against finite differences."""

import math

import pytest
import torch

from logratio.reference import oracle

Step = tuple[list[torch.Tensor], ...]
LENGTHS = ((3, 2), (1, 4), (2, 2), (0, 3))
E = 0.15


@pytest.fixture(scope="module")
def step() -> Step:
    """chosen, rejected, ref_chosen, ref_rejected of four pairs, one chosen answer empty."""
    generator = torch.Generator().manual_seed(5)

    def draw(which: int) -> list[torch.Tensor]:
        return [-3 * torch.rand(pair[which], dtype=torch.float64, generator=generator) for pair in LENGTHS]

    return draw(0), draw(1), draw(0), draw(1)


def dpo(step: Step, loss_type: str = "sigmoid", **options) -> float:
    return oracle.dpo(*step, loss_type=loss_type, **{"beta": 0.7, **options}).item()


def margins(step: Step) -> list[float]:
    return [0.7 * float(w.sum() - x.sum() - rw.sum() + rx.sum()) for w, x, rw, rx in zip(*step, strict=True)]


def swapped(step: Step) -> Step:
    return step[1], step[0], step[3], step[2]


def test_label_smoothing_adds_or_takes_a_multiple_of_the_margin(step: Step) -> None:
    x = sum(margins(step)) / 4
    sigmoid = dpo(step)
    assert dpo(step, "cdpo", label_smoothing=E) == pytest.approx(sigmoid + E * x)
    assert dpo(step, "robust", label_smoothing=E) == pytest.approx(sigmoid - E * x / (1 - 2 * E))
    flips = (1 - E) * dpo(step, "robust", label_smoothing=E) + E * dpo(swapped(step), "robust", label_smoothing=E)
    assert flips == pytest.approx(sigmoid)  # unbiased where labels are flipped with probability e


def test_swapping_the_answers_changes_the_loss_by_the_margin(step: Step) -> None:
    x = sum(margins(step)) / 4
    for name, factor, options in [
        ("sigmoid", 1, {}),
        ("bco_pair", 1, {}),
        ("cdpo", 1 - 2 * E, {"label_smoothing": E}),
        ("robust", 1 / (1 - 2 * E), {"label_smoothing": E}),
        ("sppo_hard", 2 / 0.7**2, {}),
    ]:
        difference = dpo(step, name, **options) - dpo(swapped(step), name, **options)
        assert difference == pytest.approx(-factor * x), name
    without = [float(oracle.cpo(*pair, beta=0.7, cpo_alpha=0).item()) for pair in (step[:2], swapped(step)[:2])]
    policy = sum(float(w.sum() - x.sum()) for w, x in zip(*step[:2], strict=True)) / 4
    assert without[0] - without[1] == pytest.approx(-0.7 * policy)


def test_losses_made_of_others(step: Step) -> None:
    # nca = bco/2 + (-log sigmoid(b r_w) - log sigmoid(-b r_w))/2
    rest = 0.0
    for w, rw in zip(step[0], step[2], strict=True):
        z = 0.7 * float(w.sum() - rw.sum())
        rest += (math.log1p(math.exp(-z)) + math.log1p(math.exp(z))) / 2
    assert dpo(step, "nca_pair") == pytest.approx(dpo(step, "bco_pair") / 2 + rest / 4)
    assert dpo(step, "cal_dpo", cal_dpo_coef=0.3) == pytest.approx(dpo(step, beta=1.0) + 0.3 * dpo(step, "sppo_hard"))
    single = tuple(part[:1] for part in step)
    both = oracle.dpo(*single, beta=0.7, loss_type=["sigmoid", "sft"]).item()
    assert dpo(single, "irpo") == pytest.approx(both)  # one pair: the mean over its tokens is that over the step's


@pytest.mark.parametrize(
    "name, options",
    [
        ("cdpo", {}),
        ("robust", {}),
        ("irpo", {"irpo_alpha": 0.0}),
        ("dpop", {"dpop_lambda": 0.0}),
        ("c2_dpo", {"c2_dpo_lambda": 0.0}),
        ("r_dpo", {"r_dpo_alpha": 0.0}),
        ("beta_dpo", {"beta_dpo_coef": 0.0}),
        ("sigmoid", {"ld_alpha": 1.0}),
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
    ],
)
def test_neutral_settings_are_dpo(name: str, options: dict, step: Step) -> None:
    assert dpo(step, name, **options) == pytest.approx(dpo(step))


def test_averages(step: Step) -> None:
    assert dpo(step, "rainbow", rainbow_mu=1.0) == pytest.approx(dpo(step, "sigmoid_norm"))
    simpo = oracle.cpo(*step[:2], beta=0.7, loss_type="simpo", simpo_gamma=0.7 * 0.3, cpo_alpha=0)
    assert dpo(step, "rainbow", rainbow_mu=0.0, rainbow_gamma=0.3) == pytest.approx(simpo.item())
    equal = tuple(part[2:3] for part in step)  # two tokens each
    assert dpo(equal, "sigmoid_norm") == pytest.approx(dpo(equal, beta=0.35))
    assert dpo(equal, ld_alpha=0.0) == pytest.approx(dpo(equal))
    assert dpo(equal, "r_dpo") == pytest.approx(dpo(equal))


def test_aot(step: Step) -> None:
    for name in ("aot", "aot_unpaired"):
        single = tuple(part[:1] for part in step)
        assert dpo(single, name, label_smoothing=E) == pytest.approx(dpo(single, "cdpo", label_smoothing=E))
        assert dpo(step, name) <= dpo(step)
    shuffled = ([*step[0][1:], step[0][0]], step[1], [*step[2][1:], step[2][0]], step[3])
    assert dpo(shuffled, "aot_unpaired") == pytest.approx(dpo(step, "aot_unpaired"))
    assert dpo(shuffled, "aot") != pytest.approx(dpo(step, "aot"))


def test_a_pair_is_two_answers_with_labels(step: Step) -> None:
    one = tuple(part[:1] for part in step)
    both = [*one[0], *one[1]], [*one[2], *one[3]], [True, False]
    r = [float(y.sum() - ref.sum()) for y, ref in zip(*both[:2], strict=True)]
    unpaired = oracle.kto(*both, beta=0.7, loss_type="apo_zero_unpaired").item()
    assert dpo(one, "apo_zero") == pytest.approx(2 * unpaired)
    opposite = (-0.7 * sum(r), 1)  # what has been seen before brings the running mean to 0
    assert dpo(one, "bco_pair") == pytest.approx(
        2 * oracle.kto(*both, beta=0.7, loss_type="bco", bco_state=opposite).item()
    )


def test_constants_of_a_sequence_cancel_between_policy_and_reference(step: Step) -> None:
    moved = tuple([y + c * (len(y) > 0) for y, c in zip(part, (0.3, -0.2, 0.5, 0.1), strict=True)] for part in step)
    for name in ("sigmoid", "hinge", "ipo", "nca_pair", "aot_unpaired", "apo_down", "chi_po", "dpop", "beta_dpo"):
        assert dpo(moved, name) == pytest.approx(dpo(step, name)), name
    assert dpo(moved, "rainbow") != pytest.approx(dpo(step, "rainbow"))


OPTIONS = {"exo_pair": {"label_smoothing": E}, "robust": {"label_smoothing": E}, "cdpo": {"label_smoothing": E}}
NAMES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm cdpo irpo dpop cal_dpo r_dpo chi_po rainbow ipo_sum dr_dpo cauchy focal_po h_dpo dpo_shift bpo "
    "minor_dpo c2_dpo sba"
).split()
CASES = [(name, OPTIONS.get(name, {})) for name in NAMES] + [
    ("sigmoid", {"f_divergence_type": kind}) for kind in ("forward_kl", "js_divergence", "alpha_divergence")
]
CASES += [
    ("sba", {"sba_lambda": 0.7}),
    ("sba", {"sba_lambda": 0.0}),
    ("sigmoid", {"ld_alpha": 0.4}),
    ("beta_dpo", {"beta_dpo_coef": 0.0}),
]


@pytest.mark.parametrize("name, options", CASES)
def test_gradients_agree_with_finite_differences(name: str, options: dict, step: Step) -> None:
    inputs = [y.clone().requires_grad_() for part in step[:2] for y in part[:2]]
    refs = [[y.clone().requires_grad_() for y in part[:2]] for part in step[2:]]

    def loss(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return oracle.dpo([a, b], [c, d], *refs, loss_type=name, beta=0.3, **options)

    assert torch.autograd.gradcheck(loss, inputs)
    loss(*inputs).backward()
    assert all(y.grad is None for part in refs for y in part)
