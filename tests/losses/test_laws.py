"""Every registered loss in every type and option keeps the laws of `reference/laws.py`: a new one needs no new test.

What a loss breaks on purpose stands in two tables here, and is seen to be broken.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch

from logratio.benchmarks.peers.breaks import (
    COMPARES_WITH_OTHERS,
    RISES_AT_THE_REFERENCE,
    STEP_MEANS,
    TEACHERS,
    WEIGHED_WITHOUT_GRADIENT,
)
from logratio.benchmarks.peers.case import Case
from logratio.benchmarks.peers.cases import CASES
from logratio.losses import (
    CPO_TYPES,
    DPO_TYPES,
    F_DIVERGENCES,
    GRPO_TYPES,
    KL_ESTIMATORS,
    KTO_TYPES,
    LISTWISE_TYPES,
    LOSSES,
    SFT_TYPES,
    TPO_TYPES,
    Loss,
)
from logratio.reference._law_runs import arguments, inputs
from logratio.reference.laws import LAWS, LawViolation, check_loss, laws_of
from logratio.reference.strategies import LOGPS, PARTS, Batch, take

from .._cases import enough

TABLES = {
    **{"sft": SFT_TYPES, "dpo": DPO_TYPES, "kto": KTO_TYPES, "cpo": CPO_TYPES, "tpo": TPO_TYPES},
    **{"listwise": LISTWISE_TYPES, "grpo": GRPO_TYPES},
}


def types_of(case: Case) -> set[str]:
    types = case.options.get("loss_type", ())
    return {types} if isinstance(types, str) else set(types)


def stops_gradients(case: Case) -> Any:
    """Numbers without gradient are log-probs' weights, WPO's pairs', GSPO-token's and k3+'s of their KL, step means."""
    if case.options.get("kl_estimator") == "k3+":
        return True
    of_sequence = case.options.get("importance_sampling_level") == "sequence_token" and case.options.get("beta")
    if of_sequence or case.options.get("use_weighting") or types_of(case) & WEIGHED_WITHOUT_GRADIENT:
        return True
    return "collected" if types_of(case) & STEP_MEANS or case.options.get("optimal_token_baseline") else False


def pulls_the_wrong_way(case: Case) -> bool:
    """DiscoPOP increases around the reference unless its temperature is above (1 - ln 2) / 3; a teacher says itself
    what is wanted."""
    rises = types_of(case) & RISES_AT_THE_REFERENCE and case.loss.discopop_tau < (1 - math.log(2)) / 3
    return bool(rises or types_of(case) & TEACHERS)


def may_stay(case: Case) -> bool:
    """A completion that nothing is compared with, or that is as good as the prompt's others, has nowhere to go."""
    return bool(types_of(case) & COMPARES_WITH_OTHERS) or case.options.get("optimal_token_baseline", False)


def skipped(case: Case) -> set[str]:
    return {"direction"} if pulls_the_wrong_way(case) or may_stay(case) else set()


def name_of(case: Case) -> str:
    return f"{case.method}-{case.name}"


@pytest.mark.parametrize("case", enough(CASES, together=2), ids=name_of)
def test_laws(case):
    """The plain types on more batches than their options; neighbours in the list on others. Of three options together
    the slow test below has all cases."""
    plain = len(case.options) <= 1
    check_loss(
        case.loss,
        max_examples=4 if plain else 2,
        skip=skipped(case),
        stops_gradients=stops_gradients(case),
        seed=CASES.index(case) % 3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_laws_on_many_batches(case):
    check_loss(case.loss, max_examples=30, skip=skipped(case), stops_gradients=stops_gradients(case), seed=17)


def one_of_each(reason: Any) -> list[Any]:
    """The first case of each reason that is true of it."""
    found = {reason(case): case for case in reversed(CASES) if reason(case)}
    return [pytest.param(case, id=name_of(case)) for case in found.values()]


def why_stopped(case: Case) -> Any:
    words = ("use_weighting", "optimal_token_baseline")
    return stops_gradients(case) and (next(filter(case.options.get, words), None) or types_of(case).pop())


@pytest.mark.parametrize("case", one_of_each(why_stopped))
def test_gradients_that_are_said_to_be_stopped_are(case):
    with pytest.raises(LawViolation) as violation:
        check_loss(case.loss, laws=["gradient"], max_examples=400)  # until the first that shows it
    assert violation.value.law == "gradient"


@pytest.mark.parametrize("case", [c for c in CASES if pulls_the_wrong_way(c) or may_stay(c)], ids=name_of)
def test_losses_that_are_said_to_pull_the_wrong_way_do(case):
    with pytest.raises(LawViolation) as violation:
        check_loss(case.loss, laws=["direction"], max_examples=5 if pulls_the_wrong_way(case) else 100)
    assert violation.value.law == "direction"


def test_cases_cover_every_registered_loss_type_and_choice():
    """Whoever registers a loss or a variant enters it into the catalogue."""
    assert {case.method for case in CASES} == set(LOSSES)
    with_types = {name for name, cls in LOSSES.items() if "loss_type" in {f.name for f in dataclasses.fields(cls)}}
    assert with_types == set(TABLES)
    for method, table in TABLES.items():
        assert set().union(*(types_of(case) for case in CASES if case.method == method)) == set(table), method
    options = {(key, value) for case in CASES for key, value in vars(case.loss).items() if isinstance(value, str)}
    assert {value for key, value in options if key == "f_divergence_type"} == set(F_DIVERGENCES)
    assert {value for key, value in options if key == "kl_estimator"} == set(KL_ESTIMATORS)


def test_which_laws_speak_of_which_losses():
    some = ("collected", "only_the_policy_learns", "no_broadcast", "renumbered", "without_old")
    always = [name for name in LAWS if name not in some]
    extra = {name: sorted(set(laws_of(LOSSES[name]())) - set(always)) for name in LOSSES}
    assert all(set(always) <= set(laws_of(LOSSES[name]())) for name in LOSSES)
    assert extra == {
        "sft": ["only_the_policy_learns"],
        "dpo": ["no_broadcast", "only_the_policy_learns"],
        "kto": ["collected", "no_broadcast", "only_the_policy_learns"],
        "cpo": [],
        "tpo": [],
        "orpo": [],
        "listwise": ["no_broadcast", "only_the_policy_learns"],
        "grpo": ["no_broadcast", "only_the_policy_learns", "without_old"],
    }


def three(kind: str) -> Batch:
    """Three examples of two scored tokens."""
    tokens = {role: {part: torch.full((3, 2), -0.5) for part in PARTS[kind]} for role in LOGPS}
    rows = {"labeled": {"label": torch.tensor([True, False, True])}, "grouped": {"advantages": torch.ones(3)}}
    rows["grouped"]["prompts"] = torch.zeros(3, dtype=torch.int64)
    rows["paired"] = {"margin": torch.ones(3)}
    rows["listed"] = {"rewards": torch.ones(3, 3), "sizes": torch.tensor([3, 3, 2])}
    masks = {part: torch.ones(3, 2, dtype=torch.bool) for part in PARTS[kind]}
    stats = {name: tokens["policy"] for name in ("entropy", "log_z", "log_sum_p2")}
    return Batch(kind, masks, tokens | stats, rows.get(kind, {}), torch.zeros(3))


every_type = pytest.mark.parametrize(
    "loss",
    [
        pytest.param(case.loss, id=name_of(case))
        for case in {(c.method, *types_of(c)): c for c in reversed(CASES) if len(types_of(c)) < 2}.values()
    ],
)


@every_type
@pytest.mark.parametrize("name", ["ref", "old", "advantages", "prompts", "label", "rewards", "sizes"])
def test_rows_that_would_broadcast_are_refused_by_name(loss, name):
    kwargs, one = arguments(loss, three(loss.kind)), inputs(loss, take(three(loss.kind), [0]))
    if name in kwargs:
        with pytest.raises(ValueError, match=name):
            loss(**kwargs | {name: one[name]})


@every_type
def test_unknown_loss_types_and_bad_betas_are_refused(loss: Loss):
    fields = {field.name for field in dataclasses.fields(loss)}
    if "loss_type" in fields:
        known = loss.loss_type if isinstance(loss.loss_type, str) else loss.loss_type[0]
        with pytest.raises(ValueError, match="loss_type='typo' is unknown, expected one of: .*" + known):
            dataclasses.replace(loss, loss_type="typo")
    if "beta" in fields:
        with pytest.raises(ValueError, match="beta=-0.1 must"):
            dataclasses.replace(loss, beta=-0.1)


@every_type
def test_losses_are_frozen_and_know_their_defaults(loss):
    assert loss == dataclasses.replace(loss) and hash(loss) == hash(dataclasses.replace(loss))
    assert type(loss)() == type(loss)(**{f.name: f.default for f in dataclasses.fields(loss)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 1.0
