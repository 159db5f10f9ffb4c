"""The oracle's head against numbers worked out by hand, and gradients of what has no file of its own for them."""

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


def test_row_statistics_of_two_logits() -> None:
    hidden, weight = tensor([[1.0]], dtype=torch.float64), tensor([[0.0], [LN3]], dtype=torch.float64)
    weight.requires_grad_()
    out = oracle.token_logps(hidden, weight, tensor([1]))  # probabilities 1/4, 3/4
    assert out.log_z.item() == pytest.approx(math.log(4))
    assert out.log_sum_p2.item() == pytest.approx(math.log(1 / 16 + 9 / 16))
    (d_log_z,) = torch.autograd.grad(out.log_z.sum(), weight, retain_graph=True)
    assert d_log_z.flatten().tolist() == pytest.approx([1 / 4, 3 / 4])
    # d log sum p^2 / dz_v = 2 (p_v^2 / sum p^2 - p_v); of the entropy: -p_v (log p_v + H)
    (d_p2,) = torch.autograd.grad(out.log_sum_p2.sum(), weight, retain_graph=True)
    assert d_p2.flatten().tolist() == pytest.approx([2 * (1 / 10 - 1 / 4), 2 * (9 / 10 - 3 / 4)])
    (d_entropy,) = torch.autograd.grad(out.entropy.sum(), weight)
    entropy = math.log(4) - 3 / 4 * LN3
    assert d_entropy.flatten().tolist() == pytest.approx([(LN2 * 2 - entropy) / 4, 3 / 4 * (math.log(4 / 3) - entropy)])
    capped = oracle.token_logps(hidden, weight.detach(), tensor([1]), softcap=LN3, logit_scale=1e6, temperature=0.5)
    assert capped.log_z.item() == pytest.approx(math.log(10))  # of the transformed logits 0 and 2 ln 3
    assert capped.log_sum_p2.item() == pytest.approx(math.log(0.82))


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
    logits = model(tensor([ids])).logits[0, 2:4].detach()  # the rows that predict the completion
    p = torch.softmax(logits, -1)
    torch.testing.assert_close(out.log_z.detach(), torch.logsumexp(logits, -1))
    torch.testing.assert_close(out.log_sum_p2.detach(), (p * p).sum(-1).log())
    torch.testing.assert_close(out.entropy.detach(), -(p * p.log()).sum(-1))
    nothing = oracle.sequence_logps(model, [1], [])
    assert all(part.shape == (0,) for part in nothing)
    with pytest.raises(ValueError, match="at least one prompt token"):
        oracle.sequence_logps(model, [], [1])


# ---------------------------------------------------------------------------------------------- gradients
GRADIENT_CASES = {
    "sft": lambda a, b, c, d: oracle.sft([a, b]),
    "kto": lambda a, b, c, d: oracle.kto([a, b], [c, d], [True, False], [a + 2, b], [c, d], beta=0.3),
    "apo_zero_unpaired": lambda a, b, c, d: oracle.kto(
        [a, b], [c, d], [True, False], beta=0.3, loss_type="apo_zero_unpaired"
    ),
    "orpo": lambda a, b, c, d: oracle.orpo([c], [a], [b], beta=0.3),
    "tpo": lambda a, b, c, d: oracle.tpo([a], [b], [a], beta=0.3),
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients_agree_with_finite_differences_in_what_is_differentiated(case: str) -> None:
    a, b = (-torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (3, 2))
    references = [a - 0.3, b + 0.2]  # constants of the step, also where `a` and `b` move
    frozen = (a.clone() + 2, b.clone())

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if case == "kto":  # its z_0 is a number, so it must not move with the policy here
            return oracle.kto([x, y], references, [True, False], list(frozen), references, beta=0.3)
        return GRADIENT_CASES[case](x, y, *references)

    torch.autograd.gradcheck(loss, (a.requires_grad_(), b.requires_grad_()))


def test_references_old_and_mismatched_log_probs_get_no_gradient() -> None:
    a, b, c, d = (x.requires_grad_() for x in steps([-1.0, -2.0], [-3.0], [-2.0, -2.0], [-1.0]))
    for case, run in GRADIENT_CASES.items():
        if case in ("kto", "apo_zero_unpaired"):
            (run(a, b, c, d) + 0 * (c.sum() + d.sum())).backward()
            assert not c.grad.any() and not d.grad.any(), case
