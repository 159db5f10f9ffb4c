"""Divergences of a student's next-token distribution from a teacher's, and the losses made of them.

GKD: Agarwal et al., arXiv 2306.13649. P is the teacher and Q the student, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) = sum_v P(v) log(P(v) / Q(v)), of log-probabilities [V]."""
    return torch.sum(torch.exp(log_p) * (log_p - log_q))


def generalized_jsd(teacher_logits: Tensor, student_logits: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """[N] nats of logits [N, V]: the paper's Eq. 1, beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q.

    beta = 0 is KL(P || Q) and beta = 1 is KL(Q || P), which JSD / beta and JSD / (1 - beta) tend to. The teacher is a
    constant.
    """
    values = []
    for t, s in zip(teacher_logits.double().detach(), student_logits.double(), strict=True):
        log_p, log_q = log_softmax(t / temperature), log_softmax(s / temperature)
        if beta in (0, 1):
            values.append(kl(log_p, log_q) if beta == 0 else kl(log_q, log_p))
            continue
        log_m = log_sum(log_p + log(beta), log_q + log(1 - beta))
        values.append(beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m))
    return torch.stack(values)


def log_softmax(z: Tensor) -> Tensor:
    """z - log sum exp z, of one row."""
    largest = z.detach().max()
    return z - largest - torch.log(torch.sum(torch.exp(z - largest)))


def log_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b)"""
    largest = torch.maximum(a, b).detach()
    return largest + torch.log(torch.exp(a - largest) + torch.exp(b - largest))


def log(x: float) -> Tensor:
    """In float64."""
    return torch.log(torch.tensor(x, dtype=torch.float64))
