"""FlashAttention's two operators of torch for a CPU: the same arguments, sequence by sequence, in float64."""

import copy

import torch

from logratio.trainers.attention.varlen import VARLEN
from logratio.trainers.policy.policy import Policy


def sees(queries: int, keys: int, left: int, right: int) -> torch.Tensor:
    """[queries, keys]: causal from the bottom right corner, within a window (-1: without end)."""
    own = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    seen = (key <= own + right) if right >= 0 else torch.ones(queries, keys, dtype=torch.bool)
    return seen & (key >= own - left) if left >= 0 else seen


def parts(ends: torch.Tensor, longest: int) -> list[slice]:
    at = ends.tolist()
    assert ends.dtype == torch.int32 and at[0] == 0 and max(b - a for a, b in zip(at, at[1:], strict=False)) == longest
    return [slice(a, b) for a, b in zip(at, at[1:], strict=False)]


def scores(q, k, scale, left, right):
    """[heads, queries, keys] with every key head repeated for its query heads."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * (q.shape[2] ** -0.5 if scale is None else scale)
    return found.masked_fill(~sees(len(q), len(k), left, right), -torch.inf)


def flash_forward(
    q, k, v, query_ends, key_ends, longest_query, longest_key, dropout, causal, debug, *,
    scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    assert (dropout, causal, debug) == (0.0, True, False) and q.is_contiguous() and q.dtype == k.dtype == v.dtype
    out, row_sums = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float64)
    of_queries, of_keys = parts(query_ends, longest_query), parts(key_ends, longest_key)
    assert of_queries[-1].stop == len(q) and of_keys[-1].stop == len(k) == len(v)
    for own, seen in zip(of_queries, of_keys, strict=True):
        found = scores(q[own], k[seen], scale, window_size_left, 0)
        values = v[seen].repeat_interleave(q.shape[1] // v.shape[1], 1).double()
        out[own] = torch.einsum("hqk,khd->qhd", found.softmax(-1), values).to(q.dtype)
        row_sums[:, own] = found.logsumexp(-1)
    return out, row_sums, torch.zeros(2), torch.zeros(()), torch.zeros(0)


def flash_backward(
    d_out, q, k, v, out, row_sums, query_ends, key_ends, longest_query, longest_key, dropout, causal, random, unused, *,
    scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """By hand, as the kernels do: probabilities from the row sums that the forward pass kept."""
    assert (dropout, causal, random.shape, unused.shape) == (0.0, True, (2,), ())
    heads, dq, dk, dv = q.shape[1] // k.shape[1], *(torch.full_like(x, torch.nan) for x in (q, k, v))
    for own, seen in zip(parts(query_ends, longest_query), parts(key_ends, longest_key), strict=True):
        found = scores(q[own], k[seen], scale, window_size_left, 0)
        p = (found - row_sums[:, own, None]).exp()
        d, o = d_out[own].double(), out[own].double()
        values = v[seen].repeat_interleave(heads, 1).double()
        dp = torch.einsum("qhd,khd->hqk", d, values) - (d * o).sum(-1).T[:, :, None]
        ds = p * dp * (q.shape[2] ** -0.5 if scale is None else scale)
        keys = k[seen].repeat_interleave(heads, 1).double()
        dq[own] = torch.einsum("hqk,khd->qhd", ds, keys).to(q.dtype)
        for grad, of in (
            (dk, torch.einsum("hqk,qhd->khd", ds, q[own].double())),
            (dv, torch.einsum("hqk,qhd->khd", p, d)),
        ):
            grad[seen] = of.unflatten(1, (-1, heads)).sum(2).to(grad.dtype)
    return dq, dk, dv


def with_varlen(model) -> Policy:
    model = copy.deepcopy(model)
    model.set_attn_implementation(VARLEN)
    return Policy(model, shared=True)


def never(*arguments, **options):
    raise AssertionError("called FlashAttention")
