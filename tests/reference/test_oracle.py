"""The oracle against numbers worked out by hand, and its gradients against finite differences."""

import math

import pytest
import torch
from torch import tensor
from transformers import LlamaConfig, LlamaForCausalLM

from logratio.reference import oracle

LN2, LN3 = math.log(2), math.log(3)


def steps(*sequences: list[float]) -> list[torch.Tensor]:
    return [tensor(sequence, dtype=torch.float64) for sequence in sequences]


# ---------------------------------------------------------------------------------------------- log-probabilities
@pytest.mark.parametrize(
    "options, probability",
    [
        ({}, 3 / 4),  # logits 0 and ln 3
        ({"temperature": 0.5}, 9 / 10),  # 0 and 2 ln 3
        ({"logit_scale": 2.0}, 9 / 10),
        ({"bias": tensor([LN3, 0.0])}, 1 / 2),  # ln 3 and ln 3
        ({"logit_scale": 0.0, "bias": tensor([0.0, 5.0])}, 1 / 2),  # the bias is scaled too
        ({"softcap": LN3, "logit_scale": 1e6}, 3 / 4),  # tanh saturates: 0 and ln 3
        ({"softcap": LN3, "logit_scale": 1e6, "temperature": 0.5}, 9 / 10),  # the cap comes before the temperature
    ],
)
def test_token_logps_of_two_logits(options: dict, probability: float) -> None:
    hidden, weight = tensor([[1.0], [1.0]]), tensor([[0.0], [LN3]], dtype=torch.float64)
    out = oracle.token_logps(hidden, weight, tensor([1, 0]), **options)
    other = 1 - probability
    torch.testing.assert_close(out.logps, tensor([probability, other], dtype=torch.float64).log(), rtol=1e-7, atol=0)
    entropy = -probability * math.log(probability) - other * math.log(other)
    assert out.entropy.tolist() == pytest.approx([entropy] * 2, rel=1e-7)


def test_token_logps_of_large_logits_and_of_nothing() -> None:
    weight = tensor([[1000.0], [999.0]])
    out = oracle.token_logps(tensor([[1.0]]), weight, tensor([1]))
    assert out.logps.item() == pytest.approx(-1 - math.log1p(math.exp(-1)))
    assert oracle.token_logps(torch.zeros(0, 1), weight, torch.zeros(0, dtype=torch.long)).logps.shape == (0,)


def test_sequence_logps_are_what_the_models_own_loss_averages() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, initializer_range=0.5, **sizes)).double()
    ids = [1, 5, 3, 9, 2]
    out = oracle.sequence_logps(model, ids[:3], ids[3:])
    assert out.prompt.shape == out.completion.shape == (2,) and out.completion.dtype == torch.float64
    everything, completion = tensor([ids]), tensor([[-100, -100, -100, 9, 2]])
    for logps, labels in [(torch.cat([out.prompt, out.completion]), everything), (out.completion, completion)]:
        # transformers computes its loss in float32
        assert -logps.mean().item() == pytest.approx(model(everything, labels=labels).loss.item(), rel=1e-6)
    assert oracle.sequence_logps(model, [1], []).completion.shape == (0,)
    with pytest.raises(ValueError, match="at least one prompt token"):
        oracle.sequence_logps(model, [], [1])


# ---------------------------------------------------------------------------------------------- SFT
def test_sft() -> None:
    logps = steps([-1.0, -2.0], [-6.0])
    assert oracle.sft(logps).item() == 3.0  # (1 + 2 + 6) / 3, not the mean of 1.5 and 6
    halves = steps([math.log(1 / 2)], [math.log(1 / 4)])
    # (1/2 ln 2 + 1/4 ln 4) / 2 = ln 2 / 2
    assert oracle.sft(halves, loss_type="dft").item() == pytest.approx(LN2 / 2)
    p = halves[1].requires_grad_()
    oracle.sft(halves, loss_type="dft").backward()
    assert p.grad.tolist() == pytest.approx([-1 / 8])  # -p / N, p = 1/4: p itself is not differentiated


# ---------------------------------------------------------------------------------------------- DPO
@pytest.mark.parametrize(
    "loss_type, beta, at_reference, expected",
    [
        # r_w = 2 ln 3 over 2 tokens, r_l = ln 3 over 1: the margin is ln 3, that of the token means 0
        ("sigmoid", 1.0, LN2, math.log(4 / 3)),  # -ln sigmoid(ln 3) = -ln 3/4
        ("sigmoid", 2.0, LN2, math.log(10 / 9)),
        ("hinge", 0.5, 1.0, 1 - LN3 / 2),
        ("hinge", 1.0, 1.0, 0.0),  # 1 - ln 3 < 0
        ("ipo", 0.1, 25.0, 25.0),  # 1/(4 beta^2)
        ("ipo", 1.0, 0.25, 0.25),
    ],
)
def test_dpo(loss_type: str, beta: float, at_reference: float, expected: float) -> None:
    ref_w, ref_l = steps([-3.0, -4.0]), steps([-5.0])
    chosen, rejected = steps([-3.0 + LN3, -4.0 + LN3]), steps([-5.0 + LN3])
    options = dict(loss_type=loss_type, beta=beta)
    assert oracle.dpo(ref_w, ref_l, ref_w, ref_l, **options).item() == pytest.approx(at_reference)
    assert oracle.dpo(chosen, rejected, ref_w, ref_l, **options).item() == pytest.approx(expected, abs=1e-12)
    # a pair with nothing to score has no loss, and counts
    nothing = steps([])
    half = oracle.dpo(chosen + nothing, rejected + nothing, ref_w + nothing, ref_l + nothing, **options)
    assert half.item() == pytest.approx(expected / 2, abs=1e-12)


def test_ipo_takes_means_over_each_completions_own_tokens() -> None:
    # r_w = 4 over 2 tokens, r_l = 3 over 3: h = 2 - 1 = 1, (1 - 1/(2 * 1))^2 = 1/4; at beta 0.25, (1 - 2)^2 = 1
    chosen, rejected = steps([-1.0, -1.0]), steps([-1.0] * 3)
    refs = steps([-3.0, -3.0]), steps([-2.0] * 3)
    assert oracle.dpo(chosen, rejected, *refs, loss_type="ipo", beta=1.0).item() == pytest.approx(0.25)
    assert oracle.dpo(chosen, rejected, *refs, loss_type="ipo", beta=0.25).item() == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------- KTO
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


# ---------------------------------------------------------------------------------------------- ORPO
def test_orpo() -> None:
    # odds 3 against 1/3, by token means: log odds ratio ln 9, -ln sigmoid(ln 9) = ln(10/9).
    # NLL over prompt (ln 2, 1 token) and chosen (2 ln 4/3, 2 tokens): (ln 2 + 2 ln 4/3) / 3
    prompt, chosen, rejected = steps([-LN2]), steps([math.log(3 / 4)] * 2), steps([math.log(1 / 4)])
    nll = (LN2 + 2 * math.log(4 / 3)) / 3
    assert oracle.orpo(prompt, chosen, rejected, beta=0.5).item() == pytest.approx(nll + 0.5 * math.log(10 / 9))
    assert oracle.orpo(prompt, chosen, chosen, beta=1.0).item() == pytest.approx(nll + LN2)  # equal odds
    with pytest.raises(ValueError, match="empty completion"):
        oracle.orpo(prompt, chosen, steps([]))


# ---------------------------------------------------------------------------------------------- GRPO
def test_grpo_clips_only_what_would_gain() -> None:
    for ratio, advantage, expected in [
        (1.5, 1.0, -1.2),  # held at 1 + epsilon
        (1.5, -1.0, 1.5),  # not held: the loss is the larger of the two
        (0.5, -1.0, 0.8),  # held at 1 - epsilon
        (0.5, 1.0, -0.5),
        (1.1, 2.0, -2.2),  # inside
    ]:
        loss = oracle.grpo(steps([-1.0 + math.log(ratio)]), steps([-1.0]), None, [advantage])
        assert loss.item() == pytest.approx(expected), (ratio, advantage)
    loss = oracle.grpo(steps([-1.0 + math.log(1.5)]), steps([-1.0]), None, [1.0], epsilon_high=0.3)
    assert loss.item() == pytest.approx(-1.3)


@pytest.mark.parametrize(
    "loss_type, expected",
    [
        # one token of -1.2, three of 0.8
        ("grpo", (-1.2 + 0.8) / 2),
        ("dapo", (-1.2 + 2.4) / 4),
        ("bnpo", (-1.2 + 2.4) / 4),
        ("dr_grpo", (-1.2 + 2.4) / (2 * 8)),
    ],
)
def test_grpo_normalizers(loss_type: str, expected: float) -> None:
    old = steps([-1.0], [-1.0] * 3)
    logps = steps([-1.0 + math.log(1.5)], [-1.0 - LN2] * 3)
    loss = oracle.grpo(logps, old, None, [1.0, -1.0], loss_type=loss_type, max_completion_length=8)
    assert loss.item() == pytest.approx(expected)


def test_grpo_ratio_of_a_sequence_is_the_geometric_mean() -> None:
    # ratios 9 and 1, advantage -1, so not held: 9 and 1 on the token level, 3 and 3 at sequence level
    logps, old = steps([-3.0 + 2 * LN3, -2.0]), steps([-3.0, -2.0])
    assert oracle.grpo(logps, old, None, [-1.0]).item() == pytest.approx((9 + 1) / 2)
    assert oracle.grpo(logps, old, None, [-1.0], importance_sampling_level="sequence").item() == pytest.approx(3.0)


def test_grpo_kl() -> None:
    # ref = policy + ln 2: k3 = 2 - ln 2 - 1; ratio 3/2 multiplies it when corrected. A = 0 leaves the KL alone
    logps, old, ref = steps([-2.0 + math.log(1.5)]), steps([-2.0]), steps([-2.0 + math.log(3.0)])
    for corrected, factor in [(True, 1.5), (False, 1.0)]:
        loss = oracle.grpo(logps, old, ref, [0.0], beta=0.04, use_bias_correction_kl=corrected)
        assert loss.item() == pytest.approx(0.04 * factor * (1 - LN2))
    with pytest.raises(ValueError, match="needs ref_logps"):
        oracle.grpo(logps, old, None, [0.0], beta=0.04)


def test_grpo_on_policy_has_value_minus_advantage_and_the_policy_gradient() -> None:
    logps = steps([-1.0, -3.0])
    logps[0].requires_grad_()
    loss = oracle.grpo(logps, None, None, [0.7])
    loss.backward()
    assert loss.item() == pytest.approx(-0.7) and logps[0].grad.tolist() == pytest.approx([-0.35, -0.35])


def test_advantages() -> None:
    rewards = [[0.0, 1.0], [3.0, 3.0]]
    root = math.sqrt(1 / 2)  # the unbiased deviation of 0 and 1
    assert oracle.advantages(rewards)[0] == pytest.approx([-0.5 / (root + 1e-4), 0.5 / (root + 1e-4)])
    assert oracle.advantages(rewards)[1] == [0.0, 0.0]
    assert oracle.advantages(rewards, "none") == [[-0.5, 0.5], [0.0, 0.0]]
    # all four: mean 7/4, squares 49/16 + 9/16 + 25/16 + 25/16 = 108/16, over 3: 9/4, root 3/2
    assert oracle.advantages(rewards, "batch")[0] == pytest.approx([-0.5 / 1.5001, 0.5 / 1.5001])
    assert oracle.advantages([[4.0]]) == [[0.0]]


# ---------------------------------------------------------------------------------------------- gradients
GRADIENT_CASES = {
    "sft": lambda a, b, c, d: oracle.sft([a, b]),
    **{
        f"dpo {kind}": lambda a, b, c, d, kind=kind: oracle.dpo([a], [b], [c], [d], loss_type=kind, beta=0.3)
        for kind in ("sigmoid", "hinge", "ipo")
    },
    "kto": lambda a, b, c, d: oracle.kto([a, b], [c, d], [True, False], [a + 2, b], [c, d], beta=0.3),
    "orpo": lambda a, b, c, d: oracle.orpo([c], [a], [b], beta=0.3),
    **{
        f"grpo {level} {corrected}": lambda a, b, c, d, level=level, corrected=corrected: oracle.grpo(
            [a, b],
            [c, d],
            [c - 0.5, d - 0.25],
            [0.7, -1.1],
            beta=0.3,
            epsilon=5.0,
            importance_sampling_level=level,
            use_bias_correction_kl=corrected,
        )
        for level in ("token", "sequence")
        for corrected in (False, True)
    },
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_agree_with_finite_differences_in_what_is_differentiated(case: str) -> None:
    a, b = (-torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (3, 2))
    references = [a - 0.3, b + 0.2]  # constants of the step, also where `a` and `b` move
    frozen = (a.clone() + 2, b.clone())

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if case == "kto":  # its z_0 is a number, so it must not move with the policy here
            options = dict(beta=0.3)
            return oracle.kto([x, y], references, [True, False], list(frozen), references, **options)
        return GRADIENT_CASES[case](x, y, *references)

    torch.autograd.gradcheck(loss, (a.requires_grad_(), b.requires_grad_()))


def test_references_old_and_mismatched_log_probs_get_no_gradient() -> None:
    a, b, c, d = (x.requires_grad_() for x in steps([-1.0, -2.0], [-3.0], [-2.0, -2.0], [-1.0]))
    for case, run in GRADIENT_CASES.items():
        if case not in ("sft", "orpo"):
            (run(a, b, c, d) + 0 * (c.sum() + d.sum())).backward()
            assert not c.grad.any() and not d.grad.any(), case
