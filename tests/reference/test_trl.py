"""TRL's trainers, driven on tiny models, against the oracle: two truths that share nothing must agree."""

import copy
import importlib.metadata
import os
import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from logratio.reference import oracle, trl

RTOL = 1e-5
"""float32 through two layers, against float64"""

PAIRS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " five?"},
    {"prompt": "Say hello.", "chosen": " Hello, world", "rejected": " no"},
    {"prompt": "abc", "chosen": "d", "rejected": "x"},
    {"prompt": "?", "chosen": "!", "rejected": "......"},
]
COMPLETIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
LABELED = [dict(row, label=i % 3 != 1) for i, row in enumerate(COMPLETIONS)]
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
MESSAGES = [{side: [{"role": ROLES[side], "content": text}] for side, text in row.items()} for row in PAIRS]


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=template
    )


def make_model(architecture: str = "llama", seed: int = 0, lora: bool = True) -> Any:
    """Two layers with weights large enough that log-probs are far from uniform; an adapter that is not zero."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[architecture]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    model = model_class(config).float()
    if not lora:
        return model
    adapter = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
    )
    return get_peft_model(model, adapter)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def base_of(model: Any) -> Any:
    return copy.deepcopy(model).unload()


def make_rollouts(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Two prompts with two completions each, off policy: other models sampled them, and other models refer."""
    old, ref = (make_model(seed=seed, lora=False) for seed in (11, 12))
    rows = []
    for pair, signs in zip(PAIRS[:2], ((1.3, -0.4), (-1.1, 0.6)), strict=True):
        for side, advantage in zip(("chosen", "rejected"), signs, strict=True):
            row = {name: tokenizer(pair[key]).input_ids for name, key in (("prompt", "prompt"), ("completion", side))}
            ids = row["prompt"], row["completion"]
            with torch.no_grad():
                policy, noise, other = (oracle.sequence_logps(m, *ids).completion for m in (model, old, ref))
            rows.append(
                {
                    "prompt_ids": ids[0],
                    "completion_ids": ids[1],
                    "advantage": advantage,
                    "old_per_token_logps": (policy + (noise + 5) / 4).tolist(),
                    "ref_per_token_logps": (policy + (other + 5) / 4).tolist(),
                }
            )
    return rows


def oracle_loss(
    method: str, model: Any, ref: Any, result: trl.Result, rows: list[dict[str, Any]], **options: Any
) -> Any:
    """The oracle's loss of the very tokens that TRL fed its model, each sequence forwarded alone in float64."""

    def logps(network: Any, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pairs = [oracle.sequence_logps(network, *sequence.split()) for sequence in result.sequences[kind]]
        return [pair.completion for pair in pairs], [pair.prompt for pair in pairs]

    if method == "sft":
        return oracle.sft(logps(model, "completion")[0], **options)
    if method == "dpo":
        both = [logps(network, side)[0] for network in (model, ref) for side in ("chosen", "rejected")]
        return oracle.dpo(*both, **options)
    if method == "kto":
        own, ref_own, kl, ref_kl = (logps(m, kind)[0] for kind in ("completion", "mismatched") for m in (model, ref))
        return oracle.kto(own, ref_own, [row["label"] for row in rows], kl, ref_kl, **options)
    if method == "orpo":
        chosen, prompts = logps(model, "chosen")
        return oracle.orpo(prompts, chosen, logps(model, "rejected")[0], **options)
    given = [
        [tensor(row[name], dtype=torch.float64) for row in rows] if name in rows[0] else None
        for name in ("old_per_token_logps", "ref_per_token_logps")
    ]
    return oracle.grpo(logps(model, "completion")[0], *given, [row["advantage"] for row in rows], **options)


def assert_agrees(
    method: str, model: Any, ref: Any, result: trl.Result, rows: list[dict[str, Any]], **options: Any
) -> None:
    exact = copy.deepcopy(model).double()
    loss = oracle_loss(method, exact, None if ref is None else copy.deepcopy(ref).double(), result, rows, **options)
    loss.backward()
    assert abs(result.loss - loss.item()) <= RTOL * max(abs(loss.item()), result.scale)
    expected = {name: p.grad for name, p in exact.named_parameters() if p.requires_grad}
    assert result.grads.keys() == expected.keys() and expected
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert whole > 0
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-3 * whole, f"{name} says nothing: its gradient is too small"
        error = (result.grads[name] - gradient).norm()
        assert error <= RTOL * whole, f"{name}: {error / whole:.1e} of the whole gradient"


CASES = [
    ("sft", {}),
    ("sft", {"loss_type": "dft"}),
    ("dpo", {}),
    ("dpo", {"loss_type": "hinge", "beta": 0.02}),
    ("dpo", {"loss_type": "ipo", "beta": 0.3}),
    ("kto", {}),
    ("kto", {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}),
    ("orpo", {}),
    ("orpo", {"beta": 1.0}),
    ("grpo", {}),
    ("grpo", {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3}),
    ("grpo", {"loss_type": "bnpo", "beta": 0.04}),
    ("grpo", {"loss_type": "dr_grpo", "beta": 0.04, "max_completion_length": 20}),
    ("grpo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.5}),
    ("grpo", {"beta": 0.4, "use_bias_correction_kl": False}),
]


def rows_of(method: str, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    if method in ("grpo", "rloo", "gmpo"):
        return make_rollouts(model, tokenizer)
    triples = [dict(row, reference=PAIRS[i - 1]["chosen"]) for i, row in enumerate(PAIRS)]
    return {"sft": COMPLETIONS, "kto": LABELED, "tpo": triples}.get(method, PAIRS)


@pytest.mark.parametrize("method, options", CASES, ids=lambda value: str(value))
def test_loss_and_gradient_are_the_oracles(method: str, options: dict, model: Any, tokenizer: Any) -> None:
    rows = rows_of(method, model, tokenizer)
    result = trl.loss_and_grads(method, model, tokenizer, rows, **options)
    assert_agrees(method, model, base_of(model), result, rows, **options)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo", "grpo"])
def test_the_same_on_another_architecture_and_chat_rows(method: str, tokenizer: Any) -> None:
    model = make_model("qwen2", seed=3)
    rows = rows_of(method, model, tokenizer)
    if method in ("dpo", "orpo"):
        rows = MESSAGES
    elif method in ("sft", "kto"):
        rows = [{"prompt": m["prompt"], "completion": m["chosen"], "label": i > 1} for i, m in enumerate(MESSAGES)]
    assert_agrees(method, model, base_of(model), trl.loss_and_grads(method, model, tokenizer, rows), rows)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_without_adapters_the_reference_is_a_copy_or_the_one_given(method: str, tokenizer: Any) -> None:
    model, other = make_model(lora=False), make_model(seed=5, lora=False)
    rows = rows_of(method, model, tokenizer)
    at_reference = trl.loss_and_grads(method, model, tokenizer, rows)
    assert at_reference.loss == pytest.approx({"dpo": 0.6931472, "kto": 0.5}[method], rel=1e-6)
    result = trl.loss_and_grads(method, model, tokenizer, rows, ref_model=other)
    exact, ref = copy.deepcopy(model).double(), copy.deepcopy(other).double()
    assert result.loss == pytest.approx(oracle_loss(method, exact, ref, result, rows).item(), rel=RTOL)
    assert abs(result.loss - at_reference.loss) > 1e-2


def test_the_rows_are_fed_as_they_read(model: Any, tokenizer: Any) -> None:
    """Prompt not scored, completion scored to its end of sequence; KTO's other completion is the row's before."""
    fed = trl.loss_and_grads("kto", model, tokenizer, LABELED).sequences
    texts = [[tokenizer.decode(part) for part in sequence.split()] for sequence in fed["completion"]]
    assert texts == [[row["prompt"], row["completion"] + "<eos>"] for row in LABELED]
    mismatched = [[tokenizer.decode(part) for part in sequence.split()] for sequence in fed["mismatched"]]
    assert mismatched == [[row["prompt"], LABELED[i - 1]["completion"] + "<eos>"] for i, row in enumerate(LABELED)]
    rows = make_rollouts(model, tokenizer)
    fed = trl.loss_and_grads("grpo", model, tokenizer, rows).sequences
    assert [s.split() for s in fed["completion"]] == [(row["prompt_ids"], row["completion_ids"]) for row in rows]


# ---------------------------------------------------------------------------------------------- trajectories
@pytest.mark.parametrize("method", trl.METHODS)
def test_a_run_is_adamw_on_the_gradients_of_its_batches_in_order(method: str, model: Any, tokenizer: Any) -> None:
    rows = rows_of(method, model, tokenizer)
    run = trl.train(method, model, tokenizer, rows, max_steps=3, batch_size=2, learning_rate=1e-2, max_grad_norm=0.5)
    mine = copy.deepcopy(model)
    trained = {name: p for name, p in mine.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    losses, norms = [], []
    for batch in (rows[:2], rows[2:], rows[:2]):  # the third step starts again from the first rows
        result = trl.loss_and_grads(method, mine, tokenizer, batch)
        for name, p in trained.items():
            p.grad = result.grads[name].clone()
        losses.append(result.loss)
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 0.5).item())
        optimizer.step()
    assert run.losses[0] == pytest.approx(losses[0], rel=RTOL)
    # AdamW's first step is the sign of the gradient: entries that are all rounding move a whole learning rate
    assert run.losses == pytest.approx(losses, rel=1e-4)
    assert run.grad_norms == pytest.approx(norms, rel=1e-4)
    start, end = dict(model.named_parameters()), dict(run.model.named_parameters())
    for name, p in trained.items():
        moved = (p - start[name]).norm()
        assert (end[name] - p).norm() < 1e-3 * moved, name


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_accumulation_is_one_larger_batch(method: str, model: Any, tokenizer: Any) -> None:
    """Where TRL's own normalizer spans the window: token totals (sft, dapo) and means of equal counts (dpo)."""
    rows = rows_of(method, model, tokenizer)
    options: dict[str, Any] = dict(max_steps=1, learning_rate=1e-2, max_grad_norm=0.0)
    whole = trl.train(method, model, tokenizer, rows, batch_size=4, **options)
    split = trl.train(method, model, tokenizer, rows, batch_size=2, gradient_accumulation_steps=2, **options)
    assert split.grad_norms == pytest.approx(whole.grad_norms, rel=RTOL)
    assert split.losses == pytest.approx(whole.losses, rel=RTOL)


def test_learning_rate_schedule_clipping_and_weight_decay_reach_trl(model: Any, tokenizer: Any) -> None:
    schedule: dict[str, Any] = dict(
        max_steps=4, batch_size=2, learning_rate=0.1, lr_scheduler_type="linear", warmup_steps=2
    )
    run = trl.train("sft", model, tokenizer, COMPLETIONS, max_grad_norm=1e-9, weight_decay=0.5, **schedule)
    assert [log["learning_rate"] for log in run.logs] == pytest.approx([0.0, 0.05, 0.1, 0.05])
    # clipped to 1e-9, the update of AdamW (eps 1e-8) is at most 0.1 lr: what is left is the decay
    decay = (1 - 0.05 * 0.5) * (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5)
    before = dict(model.named_parameters())
    for name, p in run.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, before[name] * decay, rtol=0, atol=0.1 * (0.05 + 0.1 + 0.05))


# ---------------------------------------------------------------------------------------------- manners
def test_the_model_the_random_state_and_the_folder_stay_as_they_were(
    model: Any, tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    torch.manual_seed(123)
    random.seed(123)
    expected = torch.rand(2).tolist(), random.random()
    torch.manual_seed(123)
    random.seed(123)
    trl.train("dpo", model, tokenizer, PAIRS, max_steps=1, batch_size=2, learning_rate=0.1)
    assert (torch.rand(2).tolist(), random.random()) == expected
    assert model.state_dict().keys() == before.keys() and "ref" not in model.peft_config
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", trl.METHODS)
def test_nothing_is_logged_or_warned_of(method: str, model: Any, tokenizer: Any, caplog: Any, recwarn: Any) -> None:
    rows = rows_of(method, model, tokenizer)
    caplog.clear()
    recwarn.clear()
    trl.train(method, model, tokenizer, rows, max_steps=1, batch_size=2, learning_rate=0.1)
    assert [record.message for record in caplog.records] == [str(w.message) for w in recwarn] == []


def test_another_version_is_refused_in_one_sentence(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.15.0")
    with pytest.raises(ImportError, match=r"needs trl==1.16.0, found 1.15.0: pip install"):
        trl.loss_and_grads("sft", model, tokenizer, COMPLETIONS)


def test_bad_input_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="method 'ppo' is unknown, expected one of: sft, dpo"):
        trl.loss_and_grads("ppo", model, tokenizer, [])
    with pytest.raises(ValueError, match="in float32: call model.float"):
        trl.loss_and_grads("sft", copy.deepcopy(model).double(), tokenizer, COMPLETIONS)
    with pytest.raises(ValueError, match="TRL dropped 1 of 4 rows"):
        trl.loss_and_grads("dpo", model, tokenizer, PAIRS, max_length=10)  # "Say hello." fills it
    rows = make_rollouts(model, tokenizer)
    rows[2]["old_per_token_logps"] = [0.0]
    with pytest.raises(ValueError, match="row 2: old_per_token_logps must have one number a completion token"):
        trl.loss_and_grads("grpo", model, tokenizer, rows)
    del rows[2]["old_per_token_logps"]
    with pytest.raises(ValueError, match="row 2: old_per_token_logps .* in every row or in none"):
        trl.loss_and_grads("grpo", model, tokenizer, rows)
    del rows[0]["ref_per_token_logps"]
    with pytest.raises(ValueError, match="beta=0.1 needs ref_per_token_logps in every row"):
        trl.loss_and_grads("grpo", model, tokenizer, rows, beta=0.1)
