"""The packed forward is the plain one: log-probs and gradients of each completion alone, neither padded nor packed."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from logratio.benchmarks.peers.truths import exact
from logratio.losses import Support
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.policy.policy import REFERENCE_ADAPTER, Policy, attention_windows

SHAREABLE = [
    "llama",
    "qwen2",
    "qwen2-window",
    "mistral",
    "mistral-window",
    "phi",
    "phi3-window",
    "gpt2",
    "opt",
    "gemma",
    "gemma3",
    "granite",
    "cohere",
    "mixtral",
    "qwen3-moe",
    "phimoe",
]
# Those whose norms compute in float64 if asked to (`exact`).
EXACT = ["llama", "qwen2-window", "mistral-window", "gpt2", "granite"]


def ragged_examples(seed: int = 0, vocab: int = 97) -> list[Example]:
    """Groups of one to three completions, longer than the models' windows, some with unscored tokens."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(2, vocab) for _ in range(rng.randint(low, high))]

    examples = []
    for row, size in enumerate((2, 1, 3, 2)):
        completions = [Completion(ids(1, 12)) for _ in range(size)]
        examples.append(Example(ids(1, 10), completions, row=row))
    tail = examples[3].completions[0].ids
    examples[3].completions[0] = Completion(tail, [i % 3 != 1 for i in range(len(tail))])
    return examples


def plain_logps(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens behind the first, and entropies, of one sequence in one unpadded forward."""
    ids = torch.tensor([[*prompt, *completion]])
    log_p = (model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature).log_softmax(-1)
    return log_p.gather(-1, ids[0, 1:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def expected(model, examples: list[Example], temperature: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """(log-probs, entropies) of the scored tokens of every completion."""
    paths = []
    for e in examples:
        for c in e.completions:
            start, keep = len(e.prompt_ids) - 1, torch.tensor([True] * len(c.ids) if c.scored is None else c.scored)
            paths.append(tuple(x[start:][keep] for x in plain_logps(model, e.prompt_ids, c.ids, temperature)))
    return paths


def weighted(paths: list[Tensor]) -> Tensor:
    """A scalar in which every token has a weight of its own, so that no gradient can be another's."""
    flat = torch.cat(paths)
    return (flat * torch.cos(torch.arange(len(flat), dtype=flat.dtype))).sum()


def gradients(model, value: Tensor) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def packed(policy: Policy, examples: list[Example], budget: int, which: int = 0) -> list[Tensor]:
    """Scored log-probs (or, with which=1, entropies) of every completion, in the order of `examples`."""
    by_row = {}
    for batch in pack(examples, budget, shared=policy.shared):
        values = policy(batch)[which]
        assert (values[~batch.scored] == 0).all()
        path = 0
        for e in batch.examples:
            by_row[e.row] = [values[path + k, batch.scored[path + k]] for k in range(len(e.completions))]
            path += len(e.completions)
    return [values for e in examples for values in by_row[e.row]]


def assert_equal_to_plain(model, bound: float, *, shared: bool, temperature: float = 1.0) -> None:
    examples = ragged_examples()
    policy = Policy(model, temperature=temperature, shared=shared)
    truth = [logps for logps, _ in expected(model, examples, temperature)]
    wanted = gradients(model, weighted(truth))
    for budget in (30, 1000):  # several micro-batches, and everything in one
        ours = packed(policy, examples, budget)
        for mine, theirs in zip(ours, truth, strict=True):
            assert (mine - theirs).abs().max() <= bound * theirs.abs().max()
        got = gradients(model, weighted(ours))
        assert (got - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("name", SHAREABLE)
def test_shared_prompts_give_the_plain_forward_in_float32(random_model, name):
    assert_equal_to_plain(random_model(name), 1e-5, shared=True)


@pytest.mark.parametrize("name", EXACT)
def test_shared_prompts_give_the_plain_forward_in_float64(random_model, name):
    assert_equal_to_plain(exact(random_model(name)), 1e-10, shared=True)


UNSHARED = ["llama", "mistral-window", "gpt2", "gemma2", "bloom", "mpt", "mamba", "falcon-alibi", "gpt-oss", "llama4"]


@pytest.mark.parametrize("name", UNSHARED)
def test_unshared_prompts_give_the_plain_forward(random_model, name):
    """Right-padded rows, the way for models that may not share; Gemma 2 caps its logits."""
    assert_equal_to_plain(random_model(name), 1e-5, shared=False)


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2"])
def test_temperature_divides_the_logits_after_scale_and_cap(random_model, name):
    assert_equal_to_plain(random_model(name), 1e-5, shared=name != "gemma2", temperature=0.6)


def test_rows_longer_than_the_table_of_positions_are_fine(random_model, pack_one):
    """GPT-2's table has 24 positions; rows of eight completions and their padding have more, no sequence has."""
    model = random_model("gpt2")
    examples = [Example([2] * 4, [Completion([3] * n)] * 8, row=n) for n in (5, 4)]
    assert pack_one(examples).input_ids.shape == (2, 44) and model.config.n_positions < 36
    for mine, (theirs, _) in zip(
        packed(Policy(model, shared=True), examples, 100), expected(model, examples), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_a_completion_brings_the_words_that_it_was_sampled_from(random_model, shared):
    """One of two completions, with an unscored token; the other, and the prompt's own tokens, are of all words."""
    model = random_model("llama")
    ids, prompt = [5, 9, 7], [3, 4, 8]
    words = [[5, 6], [1, 2], [7]]
    support = Support(torch.tensor([5, 6, 1, 2, 7]), torch.tensor([0, 2, 4, 5]))
    examples = [
        Example(prompt, [Completion([9, 4]), Completion(ids, [True, False, True], support=support)]),
        Example(prompt[:2], [Completion([6])]),
    ]
    logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, 2:-1]
    expected = [logits[t, ids[t]] - logits[t, words[t]].logsumexp(-1) for t in range(3)]
    for scores_prompt in (True, False):
        batch = pack(examples, 1000, shared=shared, scores_prompt=scores_prompt)[0]
        got, all_words = (Policy(model, shared=shared)(b).logps for b in (batch, replace(batch, support=None)))
        assert (got[1, 0], got[1, 2]) == (pytest.approx(expected[0].item(), abs=1e-5), 0)
        others = [0, *range(2, len(got))]
        torch.testing.assert_close(got[others], all_words[others], rtol=0, atol=1e-6)
        assert (got[1, 0] - all_words[1, 0]).item() > 0.1 and got[1, 1] == 0
        assert batch.unscored().support is None
    assert pack(examples[1:], 1000)[0].support is None


def test_entropy_is_that_of_the_predictions_and_can_be_trained(random_model):
    model = random_model("llama")
    policy = Policy(model, temperature=0.7, stats=("entropy",), shared=True)
    examples = ragged_examples()
    truth = [entropy for _, entropy in expected(model, examples, 0.7)]
    for mine, theirs in zip(packed(policy, examples, 60, which=1), truth, strict=True):
        assert mine.requires_grad
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert Policy(model, shared=True)(pack(examples, 1000)[0]).entropy is None


def test_prompt_paths_are_scored_along_the_chosen_path(random_model, pack_one):
    model = random_model("llama")
    examples = ragged_examples()
    batch = pack_one(examples, scores_prompt=True)
    logps = Policy(model, shared=True)(batch).logps
    for k, e in enumerate(examples):
        chosen = e.completions[0]
        all_logps, _ = plain_logps(model, e.prompt_ids, chosen.ids)
        unscored = [] if chosen.scored is None else [i for i, s in enumerate(chosen.scored) if not s]
        start = len(e.prompt_ids) - 1
        wanted = torch.cat([all_logps[:start], all_logps[start:][unscored]])
        path = len(batch.completions) + k
        torch.testing.assert_close(logps[path, batch.scored[path]], wanted, rtol=1e-5, atol=1e-5)


def lora(model, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(copy.deepcopy(model), config)


def trainable(policy: Policy) -> set[str]:
    return {name for name, p in policy.named_parameters() if p.requires_grad}


def test_reference_is_the_model_without_adapters(random_model, pack_one):
    base = random_model("llama")
    policy = Policy(lora(base), shared=True)
    batch = pack_one(ragged_examples())
    wanted, before = Policy(base, shared=True)(batch)[0].detach(), trainable(policy)
    with torch.no_grad(), policy.as_reference():
        torch.testing.assert_close(policy(batch).logps, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(policy(batch).logps, wanted, atol=1e-2)
    assert trainable(policy) == before


def test_reference_is_the_frozen_copy_of_the_starting_adapter(random_model, pack_one, tmp_path):
    base = random_model("llama")
    started = lora(base, seed=1)
    started.save_pretrained(tmp_path)
    policy = Policy(copy.deepcopy(started), shared=True)
    policy.model.load_adapter(tmp_path, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    policy.model.set_adapter("default")
    batch = pack_one(ragged_examples())
    start, before = policy(batch).logps.detach(), trainable(policy)
    assert before and not any(REFERENCE_ADAPTER in name for name in before)
    weighted([policy(batch).logps.flatten()]).backward()
    grads = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if name in before:
                p.add_(0.1)
        with policy.as_reference():
            torch.testing.assert_close(policy(batch).logps, start, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(policy(batch).logps, start, atol=1e-2)
    with pytest.raises(RuntimeError, match="inside"), policy.as_reference():
        raise RuntimeError("inside")
    assert trainable(policy) == before
    after = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert grads.keys() == after.keys() and all(torch.equal(after[name], grads[name]) for name in grads)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", (None,)),
        ("mistral", (None,)),
        ("mistral-window", (7,)),
        ("qwen2", (None,)),
        ("qwen2-window", (None, 7)),
        ("gemma3", (None, 7)),
    ],
)
def test_windows_are_those_of_some_layer(random_model, name, windows):
    assert attention_windows(random_model(name).config) == windows


def test_a_gpu_gets_fewer_and_larger_micro_batches(monkeypatch, random_model):
    policy = Policy(random_model("llama"), shared=True)
    assert policy.packing == {"shared": True, "micro_batch_cost": 64, "sequences": False}
    monkeypatch.setattr(type(policy.causal_lm), "device", torch.device("cuda"))
    assert policy.packing["micro_batch_cost"] == 1024
