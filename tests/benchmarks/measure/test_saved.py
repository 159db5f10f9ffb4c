"""What autograd keeps, counted by hand."""

import torch
from torch import nn

from logratio.benchmarks.measure.saved import saved_mib

SIZE = 256 * 1024  # float32 numbers of 1 MiB


def leaf() -> torch.Tensor:
    return torch.ones(SIZE, requires_grad=True)


def test_a_graph_holds_each_storage_once_and_until_it_has_gone_backward():
    def one() -> None:
        x = leaf()
        y = x.exp()  # keeps y
        (y * y[:]).sum().backward()  # keeps y and a view of it

    def three_after_one_another() -> None:
        for _ in range(3):
            one()

    def two_at_a_time() -> None:
        graphs = [(leaf().exp()).sum() for _ in range(2)]
        for graph in graphs:
            graph.backward()

    assert saved_mib(one) == saved_mib(three_after_one_another) == 1
    assert saved_mib(two_at_a_time) == 2


def test_weights_do_not_count_and_nothing_is_kept_without_gradients():
    model = nn.Linear(512, 512, bias=False)
    x = torch.ones(2048, 512, requires_grad=True)  # 4 MiB, kept for the weight's gradient
    assert saved_mib(lambda: model(x).sum().backward(), model) == 4
    assert saved_mib(lambda: model(x).sum().backward()) == 5
    model.requires_grad_(False)
    assert saved_mib(lambda: model(x).sum().backward(), model) == 0
    with torch.no_grad():
        assert saved_mib(lambda: model(x).sum()) == 0


def test_gradients_are_the_same():
    x, y = leaf(), leaf()
    x.exp().sin().sum().backward()
    saved_mib(lambda: y.exp().sin().sum().backward())
    assert torch.equal(x.grad, y.grad)
