"""LM heads for the tests of `linear_logps`, and the options that they are called with."""

import torch
from torch import Tensor

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "logit_scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"temperature": 1.7, "logit_scale": 0.6, "softcap": 1.5},
}


def head(n: int = 5, h: int = 3, v: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """hidden, weight, bias, targets"""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((n, h), (v, h), (v,))]
    return [t.to(dtype) for t in tensors] + [torch.randint(v, (n,), generator=g)]


def near_certain(n: int = 24, h: int = 64, v: int = 300, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A head whose targets have p of about 0.9994: there e_y - p is a small difference."""
    g = torch.Generator().manual_seed(1)
    weight = torch.nn.functional.normalize(torch.randn(v, h, generator=g, dtype=torch.float64), dim=1)
    targets = torch.randint(v, (n,), generator=g)
    hidden = 14.6 * weight[targets] + 0.02 * torch.randn(n, h, generator=g, dtype=torch.float64)
    return [hidden.to(dtype), weight.to(dtype), torch.zeros(v, dtype=dtype), targets]
