"""The kernels of these layers, and of attention, in Triton's interpreter, on CPU tensors: a process of its own, which
decides that at its first import of Triton."""

import subprocess
import sys

import pytest

CODE = """
import torch
from torch.nn.functional import silu
from logratio.trainers.attention._triton import sum_copies
from logratio.trainers.batches.sequences import key_lists
from logratio.trainers.layers import _triton

torch.manual_seed(0)
close = torch.testing.assert_close


def apply_rotary_pos_emb(q, k, cos, sin):
    def one(x):
        a, b = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]

    return one(q), one(k)


for rows, heads, keys, length, size, angle_rows in ((2, 6, 2, 5, 8, 2), (1, 14, 2, 7, 64, 1), (3, 4, 4, 3, 16, 1)):
    q, k = (torch.randn(rows, length, n, size).transpose(1, 2).requires_grad_() for n in (heads, keys))
    angles = torch.randn(angle_rows, length, size)
    cos, sin = angles.cos(), angles.sin()
    own = apply_rotary_pos_emb(q, k, cos, sin)
    for mine, theirs in zip(_triton.rotate(q.detach(), k.detach(), cos, sin, False), own, strict=True):
        close(mine, theirs.detach())
    grads = [torch.randn_like(x) for x in own]
    theirs = torch.autograd.grad(own, (q, k), grads)
    for layout in (lambda x: x, torch.Tensor.contiguous):
        for mine, true in zip(_triton.rotate(*map(layout, grads), cos, sin, True), theirs, strict=True):
            close(mine, true)
for count in (0, 1, 1000, 3000):
    gate, up, dy = (torch.randn(count) for _ in range(3))
    close(_triton.swiglu(gate, up), silu(gate) * up)
    gate.requires_grad_(), up.requires_grad_()
    theirs = torch.autograd.grad(silu(gate) * up, (gate, up), dy)
    for mine, true in zip(_triton.swiglu_gradients(dy, gate.detach(), up.detach()), theirs, strict=True):
        close(mine, true)
group = torch.tensor([[0] * 9 + [1] * 4, [0] * 11 + [-1] * 2])
segment = torch.tensor([[0] * 3 + [1] * 2 + [2] + [3] * 3 + [0] * 2 + [1] * 2, [0] + [1] * 5 + [2] * 5 + [0] * 2])
lists = key_lists(group, segment)
index = lists.source.long()
for heads, size in ((2, 8), (1, 24), (5, 40)):
    for dtype in (torch.float32, torch.bfloat16):
        grads = [torch.randn(len(index), heads, size).to(dtype) for _ in range(2)]
        for grad, mine in zip(grads, sum_copies(*grads, lists), strict=True):
            close(mine, torch.zeros(26, heads, size).index_add(0, index, grad.float()).to(dtype))
print("all")
"""


def test_under_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert out.returncode == 0 and "all" in out.stdout, out.stderr[-2000:]
