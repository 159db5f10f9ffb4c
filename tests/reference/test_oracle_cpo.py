"""The oracle's losses of pairs without a reference, CPO, TPO and ORPO, against numbers worked out by hand."""

from math import exp, log, sqrt

import pytest
import torch
from torch import tensor

from logratio.reference import oracle

LN2, LN3 = log(2), log(3)


def steps(*sequences: list[float]) -> list[torch.Tensor]:
    return [tensor(sequence, dtype=torch.float64) for sequence in sequences]


# chosen: sum -ln 4, average -ln 2; rejected: sum and average -ln 8
CHOSEN, REJECTED = steps([0.0, -2 * LN2]), steps([-3 * LN2])
CPO = [
    ("sigmoid", {}, log(3 / 2)),  # x = ln 2
    ("sigmoid", {"beta": 2.0}, log(5 / 4)),
    ("sigmoid", {"label_smoothing": 0.25}, 0.75 * log(3 / 2) + 0.25 * LN3),
    ("sigmoid", {"alpha": 0.5}, log(1 + exp(4 - 4 * sqrt(2)))),  # (1 - 2)/.5 and (1 - 2 sqrt 2)/.5
    ("hinge", {}, 1 - LN2),
    ("hinge", {"beta": 2.0}, 0.0),
    ("hinge", {"label_smoothing": 0.25}, 1 - LN2),  # has none
    ("ipo", {}, (2 * LN2 - 1 / 2) ** 2),
    ("simpo", {}, log(1 + exp(0.5) / 4)),
    ("simpo", {"beta": 0.5, "simpo_gamma": 0.0}, log(3 / 2)),
    ("simpo", {"label_smoothing": 0.25}, 0.75 * log(1 + exp(0.5) / 4) + 0.25 * log(1 + 4 * exp(-0.5))),
    ("simpo", {"alpha": 1.0}, log(1 + exp(-5.5))),  # 1 - 2 = -1 and 1 - 8 = -7, less gamma
    ("alphapo", {"alpha": 1.0}, log(1 + exp(-5.5))),
    ("alphapo", {}, log(1 + exp(0.5) / 4)),
    ("simper", {}, 1 / 8 - 1 / 2),
]


@pytest.mark.parametrize("name, options, expected", CPO)
def test_cpo(name: str, options: dict, expected: float) -> None:
    options = {"loss_type": name, "beta": 1.0, **options}
    assert oracle.cpo(CHOSEN, REJECTED, cpo_alpha=0.0, **options).item() == pytest.approx(expected, abs=1e-14)
    assert oracle.cpo(CHOSEN, REJECTED, cpo_alpha=0.5, **options).item() == pytest.approx(expected + LN2 / 2)
    default = 0 if name in ("alphapo", "simper") else LN2
    assert oracle.cpo(CHOSEN, REJECTED, **options).item() == pytest.approx(expected + default, abs=1e-14)
    nothing = steps([])
    half = oracle.cpo(CHOSEN + nothing, REJECTED + nothing, cpo_alpha=0.0, **options)
    assert half.item() == pytest.approx(expected / 2, abs=1e-14)


def test_the_likelihood_of_the_chosen_is_a_mean_over_the_steps_tokens() -> None:
    chosen, rejected = steps([-1.0, -2.0, -3.0], [-10.0]), steps([-1.0], [-1.0])
    pairs = oracle.cpo(chosen, rejected, cpo_alpha=0.0)
    assert (oracle.cpo(chosen, rejected) - pairs).item() == pytest.approx(16 / 4)


def test_alpha_near_zero_is_simpo_and_its_slope_is_a_power_of_the_probability() -> None:
    options = dict(loss_type="alphapo", beta=1.0, cpo_alpha=0.0)
    simpo = oracle.cpo(CHOSEN, REJECTED, **options).item()
    assert oracle.cpo(CHOSEN, REJECTED, alpha=1e-9, **options).item() == pytest.approx(simpo, abs=1e-7)
    a = steps([-3 * LN2])[0].requires_grad_()
    oracle.cpo([a], steps([-3 * LN2]), alpha=2.0, simpo_gamma=0.0, **options).backward()
    assert a.grad.item() == pytest.approx(-64 / 2)  # -sigmoid(0) P^-alpha, P = 1/8
    assert oracle.cpo(steps([-300.0]), steps([-301.0]), alpha=0.25, **options).isfinite()


def test_simper_moves_each_answer_by_its_own_probability() -> None:
    a, b = (y.clone().requires_grad_() for y in (CHOSEN[0], REJECTED[0]))
    oracle.cpo([a], [b], loss_type="simper").backward()
    assert a.grad.tolist() == pytest.approx([-1 / 4] * 2) and b.grad.tolist() == pytest.approx([1 / 8])


TPO = [
    ("sigmoid", {}, log(3 / 2)),
    ("sigmoid", {"label_smoothing": 0.25}, 0.75 * log(3 / 2) + 0.25 * LN3),
    ("hinge", {}, 1 - LN2),
    ("ipo", {}, (2 * LN2 - 1 / 2) ** 2),
    ("tpo-l", {}, log(1 + exp(0.5) / 4)),
    ("tpo-l", {"tpo_l_gamma": 0.0, "beta": 0.5}, log(3 / 2)),
]


@pytest.mark.parametrize("name, options, expected", TPO)
def test_tpo(name: str, options: dict, expected: float) -> None:
    options = {"loss_type": name, "beta": 1.0, **options}
    nothing, gold = steps([]), steps([-1.0, -3.0], [-5.0])  # its token mean is 3
    sides = CHOSEN + nothing, REJECTED + nothing
    assert oracle.tpo(*sides, gold, **options).item() == pytest.approx(expected / 2 + 3)
    assert oracle.tpo(*sides, gold, tpo_alpha=0.5, **options).item() == pytest.approx(expected / 2 + 1.5)
    assert oracle.tpo(*sides, gold, tpo_alpha=0.0, **options).item() == pytest.approx(expected / 2)
    names = {"tpo-l": "simpo"}
    same = {"simpo_gamma" if key == "tpo_l_gamma" else key: value for key, value in options.items()}
    same["loss_type"] = names.get(name, name)
    assert oracle.tpo(CHOSEN, REJECTED, CHOSEN, **options).item() == oracle.cpo(CHOSEN, REJECTED, **same).item()


def test_orpo() -> None:
    # odds 3 against 1/3, by token means: log odds ratio ln 9, -ln sigmoid(ln 9) = ln(10/9).
    # NLL over prompt (ln 2, 1 token) and chosen (2 ln 4/3, 2 tokens): (ln 2 + 2 ln 4/3) / 3
    prompt, chosen, rejected = steps([-LN2]), steps([log(3 / 4)] * 2), steps([log(1 / 4)])
    nll = (LN2 + 2 * log(4 / 3)) / 3
    assert oracle.orpo(prompt, chosen, rejected, beta=0.5).item() == pytest.approx(nll + 0.5 * log(10 / 9))
    assert oracle.orpo(prompt, chosen, chosen, beta=1.0).item() == pytest.approx(nll + LN2)  # equal odds
    with pytest.raises(ValueError, match="empty completion"):
        oracle.orpo(prompt, chosen, steps([]))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "simpo", "alphapo", "simper"])
def test_gradients_agree_with_finite_differences(name: str, alpha: float) -> None:
    inputs = [y.requires_grad_() for y in steps([-1.0, -0.5], [-2.0], [-0.3], [-1.5, -0.1])]
    options = dict(loss_type=name, beta=0.3, cpo_alpha=0.7, alpha=alpha)
    assert torch.autograd.gradcheck(lambda a, b, c, d: oracle.cpo([a, b], [c, d], **options), inputs)


def test_unknown_losses() -> None:
    with pytest.raises(ValueError, match="no formula"):
        oracle.cpo(CHOSEN, REJECTED, loss_type="tpo-l")
    with pytest.raises(ValueError, match="no formula"):
        oracle.tpo(CHOSEN, REJECTED, CHOSEN, loss_type="simpo")
