"""What the tests of attention in packed rows share: groups, and what a policy makes of them."""

import random

import torch
from hypothesis import strategies as st

from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.policy.policy import Policy


def groups(seed: int = 0, longest: int = 30, sizes=(2, 1, 3, 2, 4)) -> list[Example]:
    """Groups longer than the models' windows, some tokens unscored."""
    rng = random.Random(seed)

    def ids(low: int) -> list[int]:
        return [rng.randrange(2, 97) for _ in range(rng.randint(low, longest))]

    examples = [Example(ids(3), [Completion(ids(1)) for _ in range(n)], row=row) for row, n in enumerate(sizes)]
    last = examples[-1].completions[0].ids
    examples[-1].completions[0] = Completion(last, [i % 3 != 1 for i in range(len(last))])
    return examples


@st.composite
def batches(draw: st.DrawFn):
    """Micro-batches of a step with few tokens."""
    lengths = st.integers(1, 9)
    examples = [
        Example([5] * draw(lengths), [Completion([6] * draw(lengths)) for _ in range(draw(st.integers(1, 3)))], row=row)
        for row in range(draw(st.integers(1, 5)))
    ]
    return pack(examples, draw(st.integers(1, 120)), sequences=draw(st.booleans()), shared=draw(st.booleans()))


def results(policy: Policy, examples: list[Example], device="cpu", budget: int = 1000) -> tuple[torch.Tensor, ...]:
    """Scored log-probs in the order of the examples, and the gradient of a sum with a weight for each."""
    by_row = {}
    for batch in pack(examples, budget, **policy.packing):
        batch = batch.to(torch.device(device))
        logps, path = policy(batch).logps, 0
        for e in batch.examples:
            by_row[e.row] = logps[path : path + len(e.completions)][batch.scored[path : path + len(e.completions)]]
            path += len(e.completions)
    flat = torch.cat([by_row[e.row] for e in examples])
    value = (flat * torch.cos(torch.arange(len(flat), device=device))).sum()
    trained = [p for p in policy.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, trained, allow_unused=True)
    return flat.detach(), torch.cat([g.float().flatten() for g in grads if g is not None])


def assert_close(ours: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...], bound: float) -> None:
    for mine, theirs in zip(ours, truth, strict=True):
        assert (mine - theirs).norm() <= bound * theirs.norm()
