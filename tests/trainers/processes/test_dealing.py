"""What each process gets of a step, without the processes; `test_equal.py` starts them."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from logratio.trainers.errors import UserError
from logratio.trainers.processes.dealing import deal, share


def process(rank: int, world: int) -> Any:
    return SimpleNamespace(num_processes=world, process_index=rank)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_deal_gives_every_item_to_one_process_and_evens_out_loads(world: int) -> None:
    rng = random.Random(world)
    loads = [rng.randint(1, 40) for _ in range(7)]
    shares = [deal(loads, process(rank, world)) for rank in range(world)]
    assert sorted(i for mine in shares for i in mine) == list(range(7))
    assert all(mine == sorted(mine) for mine in shares)
    sums = [sum(loads[i] for i in mine) for mine in shares]
    assert max(sums) - min(sums) <= max(loads)


def test_prompts_are_shared_out_and_every_process_needs_one() -> None:
    assert [list(share("abcde", process(rank, 2))) for rank in range(2)] == [["a", "c", "e"], ["b", "d"]]
    message = "^a step of 2 prompts cannot be dealt to 3 processes; raise --batch_size$"
    with pytest.raises(UserError, match=message):
        share("ab", process(0, 3))
