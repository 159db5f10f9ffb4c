"""When rollouts are asked for: the schedule on a simulated clock, beside the times that it should take."""

import random

import pytest
from accelerate import Accelerator

from logratio.trainers.data.examples import Prompt
from logratio.trainers.errors import UserError
from logratio.trainers.rollout.engines.background import Begun
from logratio.trainers.rollout.engines.protocol import Sample
from logratio.trainers.rollout.sets.ahead import Schedule, check_staleness
from logratio.trainers.rollout.sets.flights import Coming, Flights


class Simulated:
    """A run of `windows` windows, `each` steps on each, whose k-th step takes trained[k] and j-th window sampled[j].

    one: the sampler takes one window at a time, else all that it is given. Has `learned`, [(window, steps done, steps
    behind)] of every step, `asked`, [(window, steps done)], `seconds`, and `in_use`, the most versions at a time.
    """

    def __init__(self, sampled, trained, *, staleness, each=1, one=True):
        self.now, self.free, self.one, self.sampled, self.done = 0.0, 0.0, one, sampled, 0
        self.learned, self.asked, self.in_use = [], [], 0
        total = len(trained)
        schedule = Schedule(
            iter(range(10**6)), self.ask, steps=lambda _: each, staleness=staleness, first=0, total=total
        )
        for self.done in range(total):
            schedule.before(self.done)
            versions = {flight.said[1] for flight in schedule.flights} | {self.done}
            self.in_use = max(self.in_use, len(versions))
            if self.done % each == 0:
                flight = schedule.take()
                assert flight.first == self.done
                self.now = max(self.now, flight.said[0])
            self.learned.append((flight.item, self.done, self.done - flight.said[1]))
            self.now += trained[self.done]
        self.seconds, self.waiting = self.now, len(schedule.flights)

    def ask(self, item, first):
        begins = max(self.now, self.free) if self.one else self.now
        self.free = begins + self.sampled[item]
        self.asked.append((item, self.done))
        return self.free, self.done


@pytest.mark.parametrize(("sample", "step"), [(3.0, 5.0), (5.0, 3.0), (4.0, 4.0)])
def test_a_step_ahead_takes_the_longer_of_both_times_and_none_ahead_their_sum(sample, step):
    n = 10
    for staleness, seconds in ((0, n * (sample + step)), (1, sample + (n - 1) * max(sample, step) + step)):
        run = Simulated([sample] * n, [step] * n, staleness=staleness)
        assert run.seconds == seconds
        assert run.learned == [(k, k, min(k, staleness)) for k in range(n)]
    assert Simulated([sample] * n, [step] * n, staleness=3).seconds == seconds, "one sampler is no faster for that"


def test_where_windows_are_sampled_side_by_side_each_version_more_hides_more():
    """(S + 1) steps of the run take a sampling and a step, until steps alone are longer."""
    n, sample, step = 60, 11.0, 1.0
    for s in (0, 1, 2, 5, 11):
        run = Simulated([sample] * n, [step] * n, staleness=s, one=False)
        assert run.seconds == n / (s + 1) * (sample + step) + s * step, "the last ones have nothing to wait for"


def by_recurrence(sampled, trained, staleness, one):
    """The makespan, and the staleness of each window, by who waits for whom; a step each."""
    learned, ends, free = [], [], 0.0
    for j, (sample, step) in enumerate(zip(sampled, trained, strict=True)):
        asked_behind = j - staleness - 1  # the step after which it is asked for
        asked = learned[asked_behind] if asked_behind >= 0 else 0.0
        free = (max(asked, free) if one else asked) + sample
        ends.append(free)
        learned.append(max(ends[j], learned[j - 1] if j else 0.0) + step)
    return learned[-1]


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_uneven_times_take_what_waiting_for_each_other_takes(staleness, one):
    rng = random.Random(staleness)
    for _ in range(20):
        sampled, trained = ([rng.choice([1, 2, 9]) for _ in range(12)] for _ in range(2))
        run = Simulated(sampled, trained, staleness=staleness, one=one)
        assert run.seconds == by_recurrence(sampled, trained, staleness, one)
        assert max(map(sum, (trained, [sampled[0]]))) <= run.seconds <= sum(sampled) + sum(trained)


@pytest.mark.parametrize(("sample", "step"), [(3.0, 5.0), (5.0, 3.0), (9.0, 2.0)])
def test_of_several_steps_on_a_window_as_many_hide_its_successors_sampling_as_it_may_be_behind(sample, step):
    """Two steps each, ten of them: one version behind, the second one does; two, both do."""
    for staleness, between in ((0, sample + 2 * step), (1, step + max(sample, step)), (2, max(sample, 2 * step))):
        run = Simulated([sample] * 5, [step] * 10, staleness=staleness, each=2)
        assert run.seconds == sample + 4 * between + 2 * step


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("staleness", [0, 1, 2, 3, 7])
def test_no_version_beyond_the_bound_is_used_and_nothing_is_sampled_for_nobody(staleness, each):
    """Counted in optimizer steps, at the first step that learns from a window; the others come behind it."""
    n = 4 * each
    run = Simulated([2.0] * n, [1.0] * n, staleness=staleness, each=each)
    firsts = [j * each for j in range(4)]
    assert run.asked == [(j, max(0, first - staleness)) for j, first in enumerate(firsts)]
    assert run.learned == [(k // each, k, min(firsts[k // each], staleness) + k % each) for k in range(n)]
    assert run.in_use <= staleness + 1 and run.waiting == 0


def test_it_goes_on_where_it_was():
    """From the middle of a window, and with what is asked for at once."""
    asked = []
    schedule = Schedule(
        iter("cdefg"), lambda i, f: asked.append((i, f)), steps=lambda _: 2, staleness=2, first=6, total=14
    )
    schedule.before(3)
    assert asked == []
    schedule.before(4)
    assert asked == [("c", 6)]
    schedule.before(6)
    assert [schedule.take().item, asked] == ["c", [("c", 6), ("d", 8)]]
    for step in range(7, 14):
        schedule.before(step)
    assert [schedule.take().first for _ in range(3)] == [8, 10, 12] and not schedule.flights
    assert schedule.take().item == "g", "who takes more has it, sampled then"


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_what_the_data_raise_is_raised_in_the_step_that_would_have_learned_from_it(staleness):
    def source():
        yield from (0, 1, 2)
        raise UserError("row 3 is bad")

    schedule = Schedule(source(), lambda item, first: None, steps=lambda _: 1, staleness=staleness, first=0, total=9)
    for step in range(3):
        schedule.before(step)
        assert schedule.take().item == step
    schedule.before(3)
    for _ in range(2):
        with pytest.raises(UserError, match="row 3 is bad"):
            schedule.take()


def test_what_asking_raises_is_raised_at_once():
    def ask(item, first):
        if item == 2:
            raise UserError("no server")

    schedule = Schedule(iter(range(9)), ask, steps=lambda _: 1, staleness=1, first=0, total=9)
    schedule.before(0)
    with pytest.raises(UserError, match="no server"):
        schedule.before(1)


def test_a_sample_that_is_too_old_or_from_nowhere_is_refused():
    said = [[Sample([1], "stop", [0.0], 4), Sample([1], "stop", [0.0], 5)], [Sample([1], "stop", [0.0], 6)]]
    check_staleness(said, [7, 9], 6, 2)
    for first, limit, row, version in ((6, 1, 7, 4), (7, 2, 7, 4), (5, 1, 9, 6)):
        with pytest.raises(UserError) as error:
            check_staleness(said, [7, 9], first, limit)
        assert str(error.value) == (
            f"a completion of row {row} of the data set is of the policy after step {version}, and that after step "
            f"{first} learns from it: refused with --max_staleness {limit}"
        )


def test_every_set_is_looked_at_when_it_is_learned_from():
    """By a sampler that never hears of a newer policy."""
    accelerator, said = Accelerator(cpu=True), [[Sample([1], "stop", [0.0], 3), Sample([1], "stop", [0.0], 4)]]
    flights = Flights(lambda prompts, first: Begun(lambda stop: said), 2)
    sets = (Coming.of([[Prompt([1], "a", {}, 7)]], accelerator) for _ in range(3))
    flights.over(sets, accelerator, first=4, total=7)
    for step, behind in ((4, (0.5, 1.0)), (5, (1.5, 2.0))):
        flights.before(step)
        _, landed, metrics = flights.land()
        found = (metrics[f"sampling/staleness_{name}"] for name in ("mean", "max"))
        assert landed == said and tuple(float(total / count) for total, count in found) == behind
    flights.before(6)
    with pytest.raises(UserError, match="a completion of row 7 of the data set is of the policy after step 3, and"):
        flights.land()
