"""The variants of DPO beyond sigmoid, hinge and ipo: one function each, in the words of `dpo.py`.

x = beta (r_w - r_l), e = label_smoothing, sp = softplus; sums over tokens unless said. Those that TRL 1.16 has bear its
names and equal it on one micro-batch; TRL's `+1` in apo_zero and apo_down is kept, the papers have none.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from .dpo import MAX_EXPONENT, DPOLoss, PairRatios, dpo_type


def smoothed(x: Tensor, e: float) -> Tensor:
    """(1 - e) sp(-x) + e sp(x): the cross-entropy of sigmoid(x) with a label that is right with probability 1 - e."""
    return -(1 - e) * logsigmoid(x) - e * logsigmoid(-x)


@dpo_type(divergences=True)
def sigmoid_norm(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (r_w/|y_w| - r_l/|y_l|)), Tulu 3, arXiv 2411.15124 Sec. 4.3."""
    return -logsigmoid(loss.beta * r.average_margin)


@dpo_type(reads=("label_smoothing",))
def cdpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(1 - e) sp(-x) + e sp(x), conservative DPO (Mitchell, "A note on DPO with noisy preferences", Eq. 3)."""
    return smoothed(loss.beta * r.margin, loss.label_smoothing)


@dpo_type(divergences=True, reads=("label_smoothing",))
def robust(r: PairRatios, loss: DPOLoss) -> Tensor:
    """((1 - e) sp(-x) - e sp(x)) / (1 - 2e), arXiv 2403.00409: unbiased under flipped labels, not bounded below."""
    x, e = loss.beta * r.margin, loss.label_smoothing
    return (e * logsigmoid(-x) - (1 - e) * logsigmoid(x)) / (1 - 2 * e)


@dpo_type(divergences=True, reads=("label_smoothing",))
def exo_pair(r: PairRatios, loss: DPOLoss) -> Tensor:
    """s(x) (log s(x) - log(1 - e)) + s(-x) (log s(-x) - log e), arXiv 2402.00856 Eq. 16: a reverse KL."""
    x, e = loss.beta * r.margin, r.margin.new_tensor(loss.label_smoothing)
    return x.sigmoid() * (logsigmoid(x) - (-e).log1p()) + (-x).sigmoid() * (logsigmoid(-x) - e.log())


@dpo_type()
def nca_pair(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-b r_w) + sp(b r_w)/2 + sp(b r_l)/2, arXiv 2402.05369: r_w has a finite optimum, sigmoid(b r_w) = 2/3."""
    chosen, rejected = loss.beta * r.chosen, loss.beta * r.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dpo_type()
def bco_pair(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-b r_w) + sp(b r_l), arXiv 2404.04656 without its shift delta, as in TRL (`bco` of KTO has it)."""
    return -logsigmoid(loss.beta * r.chosen) - logsigmoid(-loss.beta * r.rejected)


@dpo_type()
def sppo_hard(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2, arXiv 2405.00675 Eq. 4.7 with P = 1 for chosen."""
    target = 0.5 / loss.beta
    return (r.chosen - target) ** 2 + (r.rejected + target) ** 2


@dpo_type()
def apo_zero(r: PairRatios, loss: DPOLoss) -> Tensor:
    """1 - s(b r_w) + s(b r_l), arXiv 2408.06266 Eq. 7: raises chosen, lowers rejected."""
    return (-loss.beta * r.chosen).sigmoid() + (loss.beta * r.rejected).sigmoid()


@dpo_type()
def apo_down(r: PairRatios, loss: DPOLoss) -> Tensor:
    """s(b r_w) + 1 - s(x), arXiv 2408.06266 Eq. 8: lowers both, rejected more.

    For chosen completions that are worse than the model's own; at the reference chosen has no gradient.
    """
    return (loss.beta * r.chosen).sigmoid() + (-loss.beta * r.margin).sigmoid()


@dpo_type(divergences=True, reads=("discopop_tau",))
def discopop(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(1 - m) sp(-x) + m exp(-x), m = s(x / tau), arXiv 2406.08414 Eq. 5, with m exp(-x) as one exponential.

    At tau = 0.05 it increases for x in (-0.12, 0.07): at the reference the gradient has the wrong sign, as published.
    """
    x = loss.beta * r.margin
    blend = x / loss.discopop_tau
    return (logsigmoid(blend) - x).clamp(max=MAX_EXPONENT).exp() - (-blend).sigmoid() * logsigmoid(x)


@dpo_type(divergences=True, ignores=("beta", "ld_alpha", "f_divergence_type"))
def sft(r: PairRatios, loss: DPOLoss) -> Tensor:
    """-sum log p_w / N_w, N_w the chosen tokens of the step (MPO, arXiv 2411.10442; RPO, 2405.16436).

    TRL divides by the tokens of the micro-batch.
    """
    return r.chosen_nll * (r.totals.num_sequences / max(r.totals.num_chosen_tokens, 1))


@dpo_type(whole_step=True, reads=("label_smoothing",))
def aot(r: PairRatios, loss: DPOLoss) -> Tensor:
    """Smoothed sp(-beta (u_k - v_k)), u, v the step's margins log p_w - log p_l of policy and reference, each sorted.

    arXiv 2406.05882: the policy's margins shall dominate the reference's in distribution, not pair by pair.
    """
    matched = same_rank(r, 0, 1)
    return smoothed(loss.beta * (r.chosen_logps - r.rejected_logps - matched), loss.label_smoothing)


@dpo_type(whole_step=True, reads=("label_smoothing",))
def aot_unpaired(r: PairRatios, loss: DPOLoss) -> Tensor:
    """Smoothed sp(-beta (u_k - v_k)), u = r_w and v = r_l of the step, each sorted, arXiv 2406.05882.

    Both sides of a match have a gradient and may lie in different micro-batches: each pair accounts for the matches of
    its own two sides, half the value and the whole gradient of its side.
    """
    of_chosen = smoothed(loss.beta * (r.chosen - same_rank(r, 2, 3)), loss.label_smoothing)
    of_rejected = smoothed(loss.beta * (same_rank(r, 3, 2) - r.rejected), loss.label_smoothing)
    both = of_chosen + of_rejected
    return both - 0.5 * both.detach()


def same_rank(r: PairRatios, column: int, other: int) -> Tensor:
    """[P], for each pair the `other` column's entry of the rank that its own entry has in `column` of `collected`."""
    if r.totals.collected is None or r.totals.own is None:
        raise ValueError("aot compares the pairs of the whole step: it needs totals.collected and totals.own")
    rank = r.totals.collected[:, column].argsort(stable=True).argsort()
    matched = r.totals.collected[:, other].sort().values[rank[r.totals.own]]
    return matched.to(r.chosen).nan_to_num()  # NaN only for pairs with nothing scored, which sort last on both sides


@dpo_type(reads=("irpo_alpha",))
def irpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-x) - alpha log p_w / |y_w|, iterative reasoning preference optimization, arXiv 2404.19733."""
    return loss.irpo_alpha * r.chosen_nll / r.chosen_lengths - logsigmoid(loss.beta * r.margin)


@dpo_type(reads=("dpop_lambda",))
def dpop(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (r_w - r_l - lambda max(0, -r_w))), DPO-Positive (Smaug), arXiv 2402.13228.

    The kink is at r_w = 0, where training begins: there torch's relu has slope 0 and this is plain DPO; just below,
    the slope in r_w is 1 + lambda times as steep.
    """
    return -logsigmoid(loss.beta * (r.margin - loss.dpop_lambda * (-r.chosen).relu()))


@dpo_type(reads=("cal_dpo_coef",))
def cal_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-(r_w - r_l)) + c sppo_hard, arXiv 2412.14516; no beta in the sigmoid, as in the authors' code."""
    return loss.cal_dpo_coef * sppo_hard(r, loss) - logsigmoid(r.margin)


@dpo_type(reads=("r_dpo_alpha",))
def r_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-(x + alpha (|y_w| - |y_l|))), arXiv 2403.19159: a pair whose chosen is longer weighs less."""
    return -logsigmoid(loss.beta * r.margin + loss.r_dpo_alpha * (r.chosen_lengths - r.rejected_lengths))


@dpo_type(reads=("chi_po_r_max",))
def chi_po(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-clip(beta (f(r_w) - f(r_l)), +-2 R_max)), f(r) = exp(r) + r, chi-squared PO, arXiv 2407.13399."""
    chosen, rejected = (value.clamp(max=MAX_EXPONENT).exp() + value for value in (r.chosen, r.rejected))
    limit = 2 * loss.chi_po_r_max
    return -logsigmoid((loss.beta * (chosen - rejected)).clamp(-limit, limit))


@dpo_type(reads=("rainbow_mu", "rainbow_gamma"))
def rainbow(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (D - mu D_ref - (1 - mu) gamma)), D, D_ref average log p_w minus average log p_l, arXiv 2410.04203.

    mu = 1 is sigmoid_norm, mu = 0 is SimPO with a margin of beta gamma.
    """
    own = r.chosen_logps / r.chosen_lengths - r.rejected_logps / r.rejected_lengths
    reference = r.ref_chosen_logps / r.chosen_lengths - r.ref_rejected_logps / r.rejected_lengths
    to_beat = loss.rainbow_mu * reference + (1 - loss.rainbow_mu) * loss.rainbow_gamma
    return -logsigmoid(loss.beta * (own - to_beat))


@dpo_type(whole_step=True, reads=("beta_dpo_coef", "beta_dpo_momentum"))
def beta_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-b (r_w - r_l)), b = max(1e-3, beta (1 + coef (mean margin of the step - M))), arXiv 2407.08639.

    M is the running mean of the steps before. The paper's filter of pairs is random and left out.
    """
    if r.totals.collected is None:
        raise ValueError("beta_dpo adapts beta to the pairs of the whole step: it needs totals.collected")
    mean = (r.totals.collected[:, 2] - r.totals.collected[:, 3]).nanmean().nan_to_num().to(r.chosen)
    beta = loss.beta * (1 + loss.beta_dpo_coef * (mean - r.totals.state.get("margin", 0.0)))
    return -logsigmoid(beta.clamp(min=1e-3) * r.margin)
