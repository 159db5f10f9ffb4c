"""The oracle's SFT and KTO families against numbers worked out by hand."""

from math import exp, log

import pytest
import torch
from torch import tensor

from logratio.reference import oracle

LN2, LN3 = log(2), log(3)


def steps(*sequences: list[float]) -> list[torch.Tensor]:
    return [tensor(sequence, dtype=torch.float64) for sequence in sequences]


# ---------------------------------------------------------------------------------------------- SFT
def test_sft() -> None:
    logps = steps([-1.0, -2.0], [-6.0])
    assert oracle.sft(logps).item() == 3.0  # (1 + 2 + 6) / 3, not the mean of 1.5 and 6
    halves = steps([log(1 / 2)], [log(1 / 4)])
    # (1/2 ln 2 + 1/4 ln 4) / 2 = ln 2 / 2
    assert oracle.sft(halves, loss_type="dft").item() == pytest.approx(LN2 / 2)
    p = halves[1].requires_grad_()
    oracle.sft(halves, loss_type="dft").backward()
    assert p.grad.tolist() == pytest.approx([-1 / 8])  # -p / N, p = 1/4: p itself is not differentiated
    entropy = steps([log(20)], [2 * log(20)])  # weights 1 and 2, their squares 1 and 4
    assert oracle.sft(halves, loss_type="eaft", entropy=entropy).item() == pytest.approx((LN2 + 4 * LN2) / 2)
    squared = oracle.sft(halves, loss_type="eaft", entropy=entropy, eaft_alpha=2.0)
    assert squared.item() == pytest.approx((LN2 + 8 * LN2) / 2)
    with pytest.raises(ValueError, match="needs entropy"):
        oracle.sft(halves, loss_type="eaft")
    kl = steps([1.0], [3.0])
    held = oracle.sft(halves, loss_type="asft", divergence=kl, asft_alpha=0.5)
    assert held.item() == pytest.approx((LN2 + 0.5 * 4) / 2)
    assert oracle.sft(halves, loss_type="asft", divergence=kl).item() == pytest.approx((LN2 + 0.05 * 4) / 2)
    with pytest.raises(ValueError, match="needs divergence"):
        oracle.sft(halves, loss_type="asft")
    assert oracle.sft(steps([], [])).item() == 0
    with pytest.raises(ValueError, match="no formula"):
        oracle.sft(logps, loss_type="focal")


def test_weights_of_tokens() -> None:
    logps = steps([-1.0, -2.0], [-6.0])
    assert oracle.sft(logps, weights=steps([0.5, 1.0], [0.25])).item() == pytest.approx((0.5 + 2 + 1.5) / 1.75)
    assert oracle.sft(logps, weights=steps([2.0, 4.0], [1.0])).item() == pytest.approx((0.5 + 2 + 1.5) / 1.75)
    assert oracle.sft(logps, weights=steps([1.0, 0.0], [1.0])).item() == pytest.approx(3.5)  # a mask
    assert oracle.sft(logps, weights=steps([0.0, 0.0], [0.0])).item() == 0
    halves = steps([log(1 / 2)], [log(1 / 4)])
    assert oracle.sft(halves, weights=steps([3.0], [1.0]), loss_type="dft").item() == pytest.approx(LN2 / 2)


def test_z_loss() -> None:
    logps, log_z = steps([-1.0, -2.0], [-6.0]), steps([1.0, -2.0], [3.0])
    loss = oracle.sft(logps, log_z=log_z, z_loss_coef=0.1)
    assert loss.item() == pytest.approx(3 + 0.1 * (1 + 4 + 9) / 3)
    weighted = oracle.sft(logps, log_z=log_z, z_loss_coef=0.1, weights=steps([1.0, 0.0], [3.0]))
    assert weighted.item() == pytest.approx((1 + 0.1 + 3 * (6 + 0.9)) / 4)
    log_z[0].requires_grad_()
    oracle.sft(logps, log_z=log_z, z_loss_coef=0.1).backward()
    assert log_z[0].grad.tolist() == pytest.approx([0.2 / 3, -0.4 / 3])
    with pytest.raises(ValueError, match="needs log_z"):
        oracle.sft(logps, z_loss_coef=0.1)


# ---------------------------------------------------------------------------------------------- KTO
def test_row_weights_and_clipped_ratios() -> None:
    logps, refs = steps([-1.0, -2.0], [-3.0]), steps([-1.0 - LN3, -1.0], [-3.0])  # ratios ln 3 and -1; 0
    options = {"beta": 1.0, "loss_type": "apo_zero_unpaired", "humanline_clip": (0.0, 2.0)}
    loss = oracle.kto(logps, refs, [True, False], weights=[2.0, 0.5], **options)
    assert loss.item() == pytest.approx((2 / 4 + 0.5 / 2) / 2)
    # of kto both means are clipped: mismatched ratios 5 and -5 become 2 and 0
    options |= {"loss_type": "kto", "humanline_clip": (0.0, 2.0)}
    loss = oracle.kto(logps[1:], refs[1:], [True], steps([0.0], [-5.0]), steps([-5.0], [0.0]), **options)
    assert loss.item() == pytest.approx(1 / (1 + exp(-1)))


@pytest.mark.parametrize(
    "label, z, weights, expected",
    [
        (True, -7.0, (1.0, 1.0), 1 / 4),  # z_0 = 0: 1 - sigmoid(ln 3)
        (False, -7.0, (1.0, 1.0), 3 / 4),  # 1 - sigmoid(-ln 3)
        (True, LN3, (1.0, 1.0), 1 / 2),  # r = z_0
        (True, 2 * LN3, (1.0, 1.0), 3 / 4),
        (False, 2 * LN3, (1.0, 1.0), 1 / 4),
        (True, 0.0, (2.0, 5.0), 1 / 2),
        (False, 0.0, (2.0, 5.0), 15 / 4),
    ],
)
def test_kto(label: bool, z: float, weights: tuple[float, float], expected: float) -> None:
    # r = ln 3; the mismatched log-ratios z - 1 and z + 1 have mean z: the mean is clamped, not its parts
    loss = oracle.kto(
        steps([-1.0, -2.0 + LN3]),
        steps([-1.0, -2.0]),
        [label],
        steps([z - 1, 0.0], [z + 1]),
        steps([0.0, 0.0], [0.0]),
        beta=1.0,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("label, weights, expected", [(True, (2.0, 5.0), 2 / 4), (False, (2.0, 5.0), 5 * 3 / 4)])
def test_apo_zero_unpaired_is_kto_with_its_reference_point_at_zero(
    label: bool, weights: tuple[float, float], expected: float
) -> None:
    logps, ref = steps([-1.0, -2.0 + LN3], []), steps([-1.0, -2.0], [])
    options = dict(beta=1.0, desirable_weight=weights[0], undesirable_weight=weights[1])
    for kl in ((), (steps([9.0]), steps([0.0]))):  # which it does not read
        loss = oracle.kto(logps, ref, [label, True], *kl, loss_type="apo_zero_unpaired", **options)
        assert loss.item() == pytest.approx(expected / 2)
    with pytest.raises(ValueError, match="needs kl_logps"):
        oracle.kto(logps, ref, [label, True])


def test_bco_shifts_by_the_mean_reward_of_all_examples_so_far() -> None:
    logps, ref = steps([-1.0, -2.0 + LN3], [-1.0], []), steps([-1.0, -2.0], [-1.0 + LN3], [])
    logps[0].requires_grad_()
    options = dict(loss_type="bco", beta=2.0, desirable_weight=3.0, undesirable_weight=5.0)
    # beta r = 2 ln 3 and -2 ln 3, and nothing; after two examples of mean 0.5: delta = (1 + 0) / 4
    state = oracle.bco_next_state(logps, ref, bco_state=(0.5, 2), beta=2.0)
    assert state == (pytest.approx(0.25), 4)
    loss = oracle.kto(logps, ref, [True, False, True], bco_state=(0.5, 2), **options)
    good, bad = log(1 + exp(0.25) / 9), log(1 + exp(-0.25) / 9)
    assert loss.item() == pytest.approx((3 * good + 5 * bad) / 3)
    loss.backward()  # delta is a number: -beta sigmoid(-(2 ln 3 - 1/4)) alone
    assert logps[0].grad.tolist() == pytest.approx([-2 / (1 + 9 * exp(-0.25))] * 2)
    first = oracle.kto(logps[:1], ref[:1], [True], **options)  # its own mean: beta r = delta
    assert first.item() == pytest.approx(3 * LN2)
    assert oracle.bco_next_state(steps([]), steps([])) == (0.0, 0)


def test_an_unknown_loss() -> None:
    with pytest.raises(ValueError, match="no formula"):
        oracle.kto(steps([-1.0]), steps([-1.0]), [True], loss_type="humanline")
