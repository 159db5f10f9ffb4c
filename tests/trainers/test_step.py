"""A step's loss, metrics and gradient do not depend on how it was cut, for every loss and loss_type."""

import copy
import dataclasses
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from logratio.benchmarks.peers import truths
from logratio.benchmarks.peers.case import Case
from logratio.benchmarks.peers.cases import CASES
from logratio.benchmarks.peers.randoms import random_model
from logratio.losses import (
    LOSSES,
    DPOLoss,
    GRPOLoss,
    Kind,
    KTOLoss,
    Largest,
    Loss,
    Mean,
    Smallest,
    TokenLogps,
    Totals,
)
from logratio.trainers.batches import packing
from logratio.trainers.batches.inputs import count_totals, loss_inputs
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference, ModelReference, StoredReference
from logratio.trainers.setup import start_accelerator
from logratio.trainers.step import Step
from logratio.trainers.window import MicroBatch, StepResult

MAX_LENGTH = 20


def asked(case: Case) -> tuple[Any, ...]:
    """What a loss asks of the step; of two that ask the same the step does the same."""
    loss, names = case.loss, ("stats", "ref_stats", "window_pass", "divergence", "scores_prompt", "scores_gold")
    wants = ("reference", "behavior", "prompt_tokens", "prompts", "margin")
    own = [getattr(loss, name) for name in (*names, *(f"wants_{want}" for want in wants))]
    return (case.method, case.weighted, case.by_token, bool(case.state), *own)


def chosen_cases() -> list[Any]:
    """Once each option that asks the step for something, statistics, totals, a pass, and every loss_type: those that
    ask for the same as one before are the slow form."""
    first: dict[tuple[str, Any], Case] = {}
    for case in CASES:
        first.setdefault((case.method, case.options.get("loss_type")), case)
    asking = ("use_weighting", "ld_alpha", "z_loss_coef", "top_entropy_quantile", "entropy_coef", "tpo_alpha")
    asking += ("positive_nll_coef",)
    for option in asking:
        case = next(c for c in CASES if option in c.options)
        first[case.method, option] = case
    first["sft", "weighted"] = next(c for c in CASES if c.weighted)
    level = "importance_sampling_level"
    first["grpo", level] = next(c for c in CASES if c.options.get(level) == "sequence" and c.options["beta"])
    named = {f"{case.method} {case.name}": case for case in first.values()}
    new = {asked(case): case for case in reversed(named.values())}.values()
    default = [*new, *(first[key] for key in first if key[1] in asking)]
    slow = [() if any(case is one for one in default) else pytest.mark.slow for case in named.values()]
    return [pytest.param(case, id=name, marks=mark) for (name, case), mark in zip(named.items(), slow, strict=True)]


every = pytest.mark.parametrize("case", chosen_cases())


def examples_of(case: Case) -> list[Example]:
    """Ragged examples for a case, with token weights or margins where it is about them."""
    examples = examples_for(case.loss.kind, gold=case.loss.scores_gold)
    if case.loss.wants_margin:
        examples = [dataclasses.replace(example, margin=i / 4 - 0.5) for i, example in enumerate(examples)]
    if case.weighted:
        for i, example in enumerate(examples[1:]):
            weights = [(i + t) % 4 / 2 for t in range(len(example.completions[0].ids))]
            example.completions[0] = dataclasses.replace(example.completions[0], weights=weights)
    return examples


def examples_for(kind: Kind, count: int = 6, vocab: int = 256, gold: bool = False) -> list[Example]:
    """Ragged examples of one kind; sequences have unscored tokens, one pair tokenizes its prompt's end otherwise, lists
    are of two to four."""
    rng = random.Random(0)

    def ids(high: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(rng.randint(1, high))]

    sizes = {Kind.PAIRED: 3 if gold else 2, Kind.GROUPED: 3}
    examples = []
    for row in range(count):
        size = 2 + row % 3 if kind is Kind.LISTED else sizes.get(kind, 1)
        completions = [Completion(ids(9)) for _ in range(size)]
        if kind in (Kind.SEQUENCE, Kind.PAIRED) and row % 2:
            tokens = [*ids(3), *completions[0].ids]
            completions[0] = Completion(
                tokens, [i > 1 and i % 3 != 1 or i == len(tokens) - 1 for i in range(len(tokens))]
            )
        label = row % 3 != 1 if kind is Kind.LABELED else None
        advantages = tuple(rng.gauss(0, 1) for _ in completions) if kind is Kind.GROUPED else None
        rewards = tuple(rng.gauss(0, 1) for _ in completions) if kind is Kind.LISTED else None
        examples.append(Example(ids(8), completions, label, row, advantages, rewards=rewards))
    return examples


@pytest.fixture(scope="module")
def built():
    return truths.exact(random_model(LlamaConfig, 0))


@pytest.fixture
def model(built):
    """A tiny Llama with LoRA that computes in float64, without gradients. The same in all tests, whose copies would
    take longer than their steps."""
    built.zero_grad()
    return built


def make_step(model, loss: Loss, *, micro_batch_tokens: int, shared: bool = True) -> Step:
    policy = Policy(model, shared=shared, stats=(*loss.stats, *loss.metric_stats, *loss.ref_stats))
    teacher = None
    if loss.divergence is not None:
        anchored = loss.divergence.anchored
        teacher = AdapterReference(policy) if anchored else ModelReference(Policy(copy.deepcopy(model).unload()))
    return Step(
        start_accelerator("no"),
        policy,
        loss,
        AdapterReference(policy, loss.ref_stats) if loss.wants_reference else None,
        micro_batch_tokens=micro_batch_tokens,
        max_length=MAX_LENGTH,
        teacher=teacher,
    )


def run(model, loss: Loss, examples: list[Example], micro_batch_tokens: int, shared: bool = True, state: Any = None):
    """(number of micro-batches, loss and metrics, gradient, totals, state after it) of a step; rollouts off policy."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    model.zero_grad()
    step = make_step(model, loss, micro_batch_tokens=micro_batch_tokens, shared=shared)
    step.state = state or {}
    micros = step.micro_batches(examples)
    if loss.kind is Kind.GROUPED:
        step.fill_old(micros)
        with torch.no_grad():  # the update that makes them off policy
            for p in trained:
                p += 0.05 * torch.cos(torch.arange(p.numel(), dtype=p.dtype)).view_as(p)
    totals = step.totals(examples, micros)
    result = step(micros, totals).reduced(step.accelerator)
    grads = torch.cat([p.grad.flatten() for p in trained])
    with torch.no_grad():
        for p, value in zip(trained, before, strict=True):
            p.copy_(value)
    model.zero_grad()
    return len(micros), result, grads, totals, step.state


@every
def test_the_cut_and_the_order_do_not_matter(model, case, monkeypatch):
    """But for KTO's order, in which neighbours are mismatched."""
    loss, examples = case.loss, examples_of(case)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "ROW_FILLS", (0.0,))  # everything in one micro-batch, however short its rows
        count, whole, gradient, totals, state = run(model, loss, examples, 10_000, state=case.state)
    assert count == 1 and gradient.norm() > 1e-3
    moved = examples if loss.window_pass == "mismatched" else examples[3:] + examples[:3]
    for budget, shared, at_least in ((1, True, 6), (60, False, 2)):
        parts, result, grads, counted, after = run(model, loss, moved, budget, shared, case.state)
        assert parts >= at_least
        assert result.keys() == whole.keys()
        for name, value in whole.items():
            assert result[name] == pytest.approx(value, rel=1e-10, abs=1e-12), name
        assert (grads - gradient).norm() <= 1e-10 * gradient.norm()
        assert after == pytest.approx(state, rel=1e-10)
        if totals.collected is not None:
            one, other = (t.collected.sort(0)[0] for t in (counted, totals))
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@every
@pytest.mark.parametrize("shared", [True, False])
def test_totals_counted_from_examples_are_those_of_the_tensors(case, shared):
    loss, examples = case.loss, examples_of(case)
    counted = count_totals(examples, loss)
    fields = ["num_sequences", "num_tokens", *(["sum_weights"] if case.weighted else [])]
    if loss.kind is Kind.PAIRED:
        fields += ["num_chosen_tokens", "num_prompt_tokens", "num_gold_tokens"]
    if loss.kind is Kind.GROUPED:
        fields += ["num_positive_tokens"]
    summed = dict.fromkeys(fields, 0)
    for batch in pack(examples, 10_000, shared=shared, scores_prompt=loss.scores_prompt):
        inputs = loss_inputs(loss, batch, TokenLogps(torch.zeros(batch.scored.shape)), None, None)
        totals = Totals.of(inputs["policy"], sizes=inputs.get("sizes"), advantages=inputs.get("advantages"))
        for field in fields:
            summed[field] += getattr(totals, field)
    assert {field: getattr(counted, field) for field in fields} == summed
    needed = {"num_prompt_tokens": loss.scores_prompt, "num_gold_tokens": loss.scores_gold}
    assert all((value > 0) == needed.get(field, True) for field, value in summed.items())


def test_evaluation_leaves_no_gradient_and_gives_the_same_numbers(model):
    loss, examples = LOSSES["dpo"](), examples_for(Kind.PAIRED)
    _, whole, *_ = run(model, loss, examples, 10_000)
    step = make_step(model, loss, micro_batch_tokens=40)
    graphs = []
    step.policy.register_forward_pre_hook(lambda module, inputs: graphs.append(torch.is_grad_enabled()))
    micros = step.micro_batches(examples)
    result = step(micros, step.totals(examples, micros), backward=False)
    assert graphs and not any(graphs)
    assert result.reduced(step.accelerator) == pytest.approx(whole, rel=1e-10)
    assert not result.loss.requires_grad and all(p.grad is None for p in step.policy.parameters())


def test_gradients_add_to_those_that_are_there(model):
    """A step's micro-batches are backward passes of their own; nothing in between is cleared or averaged."""
    loss, examples = LOSSES["sft"](), examples_for(Kind.SEQUENCE)
    step = make_step(model, loss, micro_batch_tokens=40)
    micros = step.micro_batches(examples)
    totals = step.totals(examples, micros)
    step(micros, totals)
    once = [p.grad.clone() for p in step.policy.parameters() if p.requires_grad]
    step(micros, totals)
    for p, grad in zip((p for p in step.policy.parameters() if p.requires_grad), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad, rtol=1e-12, atol=1e-15)


def test_a_reference_is_computed_once_for_each_micro_batch(model):
    step = make_step(model, LOSSES["dpo"](), micro_batch_tokens=40)
    calls = []
    live = step.reference
    step.reference = lambda batch: calls.append(batch) or live(batch)  # type: ignore[func-returns-value]
    examples = examples_for(Kind.PAIRED)
    micros = step.micro_batches(examples)
    for _ in range(2):
        step(micros, step.totals(examples, micros))
    assert len(calls) == len(micros) > 1


def test_a_step_of_one_collects_nothing(model):
    step = make_step(model, LOSSES["kto"](), micro_batch_tokens=40)
    (example,) = examples_for(Kind.LABELED, count=1)
    micros = step.micro_batches([example])
    assert step.totals([example], micros).collected is None


def test_a_loss_that_is_not_finite_is_refused_by_row(model):
    """One bad embedding, in one row; the micro-batch that has it is named, and no other."""
    examples = examples_for(Kind.SEQUENCE, vocab=200)
    examples[4] = Example([250, 3], examples[4].completions, row=4)
    step = make_step(copy.deepcopy(model), LOSSES["sft"](), micro_batch_tokens=1)
    step.policy.causal_lm.get_input_embeddings().weight.data[250] = torch.nan
    micros = step.micro_batches(examples)
    message = "the loss is not finite; its micro-batch holds the rows 4 of the data set"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        step(micros, step.totals(examples, micros))


WRONG_OUTPUTS = {
    "it must return LossOutput(loss, metrics), not Tensor": lambda out: out.loss,
    "its loss must be one number, a tensor of the shape [], not [1]": lambda out: out._replace(loss=out.loss[None]),
    "its metric nll must be a Mean, such as Mean.of(values, where), not float": lambda out: out._replace(
        metrics={"nll": 1.0}
    ),
    "its loss has no graph: it is detached from the policy's log-probs": lambda out: out._replace(
        loss=out.loss.detach()
    ),
}


@pytest.mark.parametrize(("message", "change"), WRONG_OUTPUTS.items(), ids=lambda x: x if isinstance(x, str) else "")
def test_what_a_loss_returns_wrongly_is_told_in_words(model, message, change):
    class Own(LOSSES["sft"]):
        def __call__(self, policy, *, totals):
            return change(super().__call__(policy, totals=totals))

    step, examples = make_step(model, Own(), micro_batch_tokens=1000), examples_for(Kind.SEQUENCE)
    micros = step.micro_batches(examples)
    with pytest.raises(UserError, match=f"^{re.escape(f'the loss Own: {message}')}$"):
        step(micros, step.totals(examples, micros))


def test_a_state_that_no_checkpoint_could_keep_is_refused(model):
    class Own(LOSSES["sft"]):
        def advance(self, totals):
            return {"steps": torch.tensor(1.0)}

    step, examples = make_step(model, Own(), micro_batch_tokens=1000), examples_for(Kind.SEQUENCE)
    micros = step.micro_batches(examples)
    with pytest.raises(UserError, match="the loss Own: its advance.. must give numbers, and gives steps as Tensor"):
        step(micros, step.totals(examples, micros))


def test_many_rows_are_not_all_listed(model):
    examples = [Example([250], [Completion([3])], row=row) for row in range(20)]
    step = make_step(copy.deepcopy(model), LOSSES["sft"](), micro_batch_tokens=1000)
    step.policy.causal_lm.get_input_embeddings().weight.data[250] = torch.nan
    micros = step.micro_batches(examples)
    with pytest.raises(UserError, match=r"the rows 0, 1, .*, 15 and 4 more of the data set$"):
        step(micros, step.totals(examples, micros))


def test_metrics_are_means_over_what_was_counted():
    result = StepResult(torch.tensor(0.0))
    result.add(
        torch.tensor(0.25),
        {"a": Mean(torch.tensor(3.0), torch.tensor(1)), "b": Mean(torch.tensor(0.0), torch.tensor(0))},
    )
    result.add(torch.tensor(0.5), {"a": Mean(torch.tensor(1.0), torch.tensor(3))})
    assert result.reduced(start_accelerator("no")) == {"loss": 0.75, "a": 1.0}


def test_the_largest_is_that_of_all_micro_batches_and_processes():
    class Two:
        """The other process has seen 7, and nothing that is smallest."""

        def reduce(self, values: Tensor, how: str) -> Tensor:
            return values

        def gather(self, values: Tensor) -> Tensor:
            return torch.cat([values, torch.tensor([7.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)])

    result = StepResult(torch.tensor(0.0))
    for value in (3.0, 5.0, 4.0):
        one = torch.tensor([value])
        nothing = Largest.of(one, torch.tensor([False]))
        result.add(torch.tensor(0.0), {"a": Largest.of(one), "b": nothing, "c": Smallest.of(one), "d": Mean.of(one)})
    alone = {"loss": 0.0, "a": 5.0, "c": 3.0, "d": 4.0}
    assert result.reduced(start_accelerator("no")) == alone
    assert result.reduced(Two()) == alone | {"a": 7.0}


def test_what_was_sampled_is_the_same_however_a_step_is_cut(model):
    loss = GRPOLoss(sampling_correction="sequence_mask", sampling_clip_min=0.5, sampling_clip_max=2.0)
    examples = examples_for(Kind.GROUPED)
    drawn = truths.old_logps(model, examples, seed=3)
    found = []
    for tokens in (1000, 40):
        model.zero_grad()
        step = make_step(model, loss, micro_batch_tokens=tokens)
        micros = step.micro_batches(examples)
        for micro in micros:
            micro.behavior = StoredReference(drawn, None)(micro.batch)
        found.append((len(micros), step(micros, step.totals(examples, micros)).reduced(step.accelerator)))
    (one, whole), (several, cut) = found
    assert one == 1 < several and cut == pytest.approx(whole, rel=1e-9)
    assert 0 < whole["sampling/masked_mean"] < 1
    assert whole["sampling/ratio_min"] < 0.5 and whole["sampling/ratio_max"] > 2


def test_fillers_count_for_nothing(model):
    """A process that has run out computes a micro-batch with nothing scored: loss, gradient and metrics stay."""
    losses = {name: cls() for name, cls in LOSSES.items()}
    losses |= {name: DPOLoss(loss_type=name) for name in ("aot", "aot_unpaired", "beta_dpo")}
    losses |= {"bco": KTOLoss(loss_type="bco"), "quantile": GRPOLoss(top_entropy_quantile=0.3, entropy_coef=0.1)}
    for name, loss in losses.items():
        model.zero_grad()
        examples = examples_for(loss.kind, gold=loss.scores_gold)
        step = make_step(model, loss, micro_batch_tokens=40)
        micros = step.micro_batches(examples)
        filled = [*micros, MicroBatch(micros[-1].batch.unscored())]
        totals = step.totals(examples, filled)
        alone = step(micros, totals).reduced(step.accelerator)
        grads = [p.grad.clone() for p in step.policy.parameters() if p.requires_grad]
        step.policy.zero_grad()
        assert step(filled, totals).reduced(step.accelerator) == pytest.approx(alone, rel=1e-12), name
        for p, grad in zip((p for p in step.policy.parameters() if p.requires_grad), grads, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-15)
        if totals.collected is not None:
            assert torch.equal(step._collect(filled), step._collect(micros))


def test_totals_of_dealt_examples_are_not_counted_twice(model):
    """dealt: the examples are this process's own; with one process that is the whole step."""
    loss = LOSSES["grpo"]()
    examples = examples_for(Kind.GROUPED)
    step = make_step(model, loss, micro_batch_tokens=40)
    micros = step.micro_batches(examples, dealt=True)
    assert step.totals(examples, micros, dealt=True) == count_totals(examples, loss)
    assert dataclasses.asdict(count_totals(examples, loss))["num_sequences"] == 18
