"""Tokens drawn by the inverse of the distribution: exact, and with the right log-probability."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from logratio.trainers.rollout.engines.drawing import BLOCK, Drawing, TopP, inverse, uniforms
from logratio.trainers.rollout.engines.protocol import Sampling

SCORES = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -torch.inf])


def kept(**options):
    """The distribution by hand, float64: sorted, cut, and divided by what is left."""
    z = SCORES.double() / options.get("temperature", 1.0)
    p = z.softmax(-1)
    order = p.argsort(descending=True)
    if k := options.get("top_k"):
        p[order[k:]] = 0
        p /= p.sum()
    if (top := options.get("top_p", 1.0)) < 1:
        before = p[order].cumsum(-1) - p[order]
        p[order[before >= top]] = 0
        p /= p.sum()
    if least := options.get("min_p"):
        p[p < least * p.max()] = 0
        p /= p.sum()
    return p


CUTS = [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_p": 0.75}, {"top_k": 3}, {"min_p": 0.2}]
CUTS += [{"top_k": 4, "top_p": 0.8, "min_p": 0.3, "temperature": 1.3}]


@pytest.mark.parametrize("options", CUTS)
def test_a_sample_is_exact(options):
    """Counts of 20,000 draws against the distribution by hand: chi-square below its 1e-6 quantile; and every token's
    log-probability is that distribution's."""
    p, n = kept(**options), 20_000
    numbers = torch.cat([uniforms(seed, 1) for seed in range(n)])
    tokens, logps, _ = Drawing(Sampling(max_new_tokens=1, **options))(SCORES.repeat(n, 1), numbers)
    seen = tokens.bincount(minlength=len(p)).double()
    assert (seen[p == 0] == 0).all()
    degrees = int((p > 0).sum()) - 1
    chi_square = ((seen - n * p).square() / (n * p))[p > 0].sum()
    assert chi_square < {4: 33.4, 3: 30.7, 2: 27.7, 1: 23.9}[degrees]
    assert torch.allclose(logps.double(), p[tokens].log(), atol=1e-6)


def test_a_greedy_row_takes_the_likeliest_token_of_all():
    """Beside a drawn one, with the model's own log-probability."""
    numbers = torch.tensor([math.nan, 0.999999])
    tokens, logps, _ = Drawing(Sampling(max_new_tokens=1, top_p=0.9))(SCORES.repeat(2, 1), numbers)
    assert tokens.tolist() == [0, 4]
    wanted = [SCORES.log_softmax(-1)[0].item(), kept(top_p=0.9)[4].log().item()]
    assert logps.tolist() == pytest.approx(wanted, abs=1e-6)


def test_cuts_and_penalty_are_those_of_transformers():
    """In its order: the penalty on raw logits, then the temperature, top_k, top_p and min_p."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=draw)
    history = torch.randint(0, 40, (50, 7), generator=draw)
    options = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.7}
    theirs = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.7), TemperatureLogitsWarper(0.8), TopKLogitsWarper(12),
         TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]
    )  # fmt: skip
    wanted = theirs(history, logits).log_softmax(-1)
    numbers = torch.rand(50, generator=draw, dtype=torch.float64)
    tokens, logps, _ = Drawing(Sampling(max_new_tokens=1, **options))(logits, numbers, history)
    assert torch.allclose(logps, wanted.gather(-1, tokens[:, None])[:, 0].double(), atol=1e-5)
    assert torch.equal(tokens, inverse(wanted.exp(), numbers)[0])


def test_the_inverse_is_the_whole_sums_in_any_width():
    """Of rows wider than a block, and of no number of whole blocks."""
    draw = torch.Generator().manual_seed(0)
    for width in (100, 128, 1000, 2048):
        probabilities = torch.rand(1, width, generator=draw, dtype=torch.float64).expand(3000, width)
        numbers = torch.rand(3000, generator=draw, dtype=torch.float64)
        sums = probabilities.cumsum(-1)
        wanted = torch.searchsorted(sums, (numbers * sums[:, -1])[:, None], right=True)[:, 0]
        assert torch.equal(inverse(probabilities, numbers)[0], wanted)


@pytest.mark.parametrize("apart", [1, BLOCK])
def test_what_would_not_move_a_sum_in_float32_is_drawn_as_often_as_it_should_be(apart):
    """Within a block, and each in a block of its own."""
    small, count = 2.0**-25, 100
    probabilities = torch.zeros(1, (count + 1) * BLOCK)
    probabilities[0, 0], probabilities[0, apart : (count + 1) * apart : apart] = 1.0, small
    wanted = 1 + small * (torch.arange(count, dtype=torch.float64) + 0.5)
    places, whole = inverse(probabilities.expand(count, -1), wanted / (1 + small * count))
    assert places.tolist() == [apart * (k + 1) for k in range(count)]
    assert whole.tolist() == [1 + small * count] * count


@example([0.0, 1.0], 0.0)
@example([*[0.0] * 200, 0.5, 0.0, 0.5], 0.5)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=300), st.floats(0, 1, exclude_max=True))
def test_the_inverse_is_a_plain_search(probabilities, number):
    """The place where the exact running sum passes the number's share, up to rounding; never one of probability 0."""
    if not any(probabilities):
        return
    row = torch.tensor([probabilities], dtype=torch.float64)
    (place,) = inverse(row, torch.tensor([number], dtype=torch.float64))[0].tolist()
    exact = list(map(Fraction, probabilities))
    wanted, near = Fraction(number) * sum(exact), Fraction(1, 2**40) * sum(exact)
    assert probabilities[place] > 0
    assert sum(exact[:place]) - near <= wanted < sum(exact[: place + 1]) + near


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.99, 0.9999])
def test_top_p_is_transformers_whether_few_tokens_hold_it_or_all(top_p):
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 3000, generator=draw, dtype=torch.float64) * torch.linspace(0.1, 6, 20)[:, None]
    assert torch.equal(TopP(top_p)(None, scores), TopPLogitsWarper(top_p)(None, scores))


def test_uniform_numbers_are_the_seeds_own():
    """The same for any count and on every machine, even, and unlike those of other seeds."""
    assert torch.equal(uniforms(7, 100)[:3], uniforms(7, 3))
    assert uniforms(7, 2).tolist() == FIRST
    many = torch.cat([uniforms(seed, 50) for seed in range(400)])
    assert ((0 <= many) & (many < 1)).all() and len(many.unique()) == len(many)
    counts = (many * 20).long().bincount(minlength=20).double()
    assert ((counts - 1000).square() / 1000).sum() < 66.6  # chi-square of 19 degrees, 1e-6, of 20,000
    pairs = many.view(-1, 2)
    assert abs(float(torch.corrcoef(pairs.T)[0, 1])) < 0.05
    assert len(uniforms(2**64 - 1, 1)) == 1


FIRST = [0.8720734548204873, 0.29536538151378355]  # a run resumed by another version of numpy draws the same


@pytest.mark.parametrize("spread", [1.0, 4.0, 8.0])
def test_log_probs_of_many_words_are_to_the_rounding(spread):
    """Of 150,000 words in float32, whose probabilities add up to another sum than 1: those of float64."""
    logits = spread * torch.randn(16, 151_936, generator=torch.Generator().manual_seed(2))
    drawn = Drawing(Sampling(max_new_tokens=1))(logits, torch.linspace(0.01, 0.99, 16, dtype=torch.float64))
    wanted = logits.double().log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
    assert (drawn.logps - wanted).abs().max() < 3e-6 and (drawn.logps - wanted).mean().abs() < 1e-6
