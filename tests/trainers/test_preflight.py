"""Token ids, positions, the warm-up and options of the model are checked before the model is loaded."""

import json
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from logratio.trainers import setup
from logratio.trainers.data.examples import Completion, Example, Prompt
from logratio.trainers.data.table.extremes import extremes_of
from logratio.trainers.errors import UserError
from logratio.trainers.loop import train_run
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.preflight import Shape, check_before, longest_sequence, read_model

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"{i}+1=", "completion": "1", "chosen": str(i + 1), "rejected": "x" * (20 + i), "answer": "1"}
            for i in range(2)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def build(data, method, *options, model=None, tokenizer=None):
    if model is not None:
        model.save_pretrained(data / "model")
        (tokenizer or tiny_tokenizer()).save_pretrained(data / "model")
        options = ("--model_name_or_path", str(data / "model"), *options)
    words = ["--dataset_name", str(data / "rows.jsonl"), "--output_dir", str(data / "out"), *options]
    return setup.build(parse_train([method, *words]))


def refused(message, *args, **options):
    with pytest.raises(UserError, match=f"^{message}$") as raised:
        build(*args, **options)
    assert "\n" not in str(raised.value)


@pytest.fixture
def unloaded(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(setup, "load_model", never)


def gpt2(positions):
    ids = {"bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256}
    return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=positions, **ids))


def test_a_token_without_a_row_names_the_row_of_the_data(data, unloaded):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xxxxx"])
    message = (
        f"row 0 of the data set holds token 259, which has no row in the embeddings of '{data}/model', that end at "
        "258; use the tokenizer that belongs to the model"
    )
    refused(re.escape(message), data, "dpo", model=tiny_model(**SMALL), tokenizer=tokenizer)


def test_a_sequence_beyond_learned_positions_is_refused(data, unloaded):
    """2 characters of a prompt, "=", 21 x and EOS are 26 tokens (the prompt has 4)."""
    message = (
        f"row 1 of the data set makes a sequence of 26 tokens, more than the 25 positions that '{data}/model' has "
        "learned; lower --max_length"
    )
    refused(re.escape(message), data, "dpo", model=gpt2(25))


def test_as_many_as_there_are_positions_train(data):
    assert train_run(build(data, "dpo", "--max_steps", "1", model=gpt2(26)), quiet=True)["step"] == 1


def test_rollouts_count_with_all_that_they_may_become(data, unloaded):
    options = ("--num_generations", "2", "--max_completion_length", "40")
    message = (
        "row . of the data set makes a sequence of 44 tokens, more than the 43 positions that .* has learned; lower"
    )
    refused(message + " --max_length or --max_completion_length", data, "grpo", *options, model=gpt2(43))


def test_kto_may_give_a_prompt_the_longest_completion():
    config = parse_train(["kto", "--max_length", "12"])
    examples = [Example([1] * 9, [Completion([1, 2])], row=3), Example([1], [Completion([1] * 10)], row=4)]
    assert longest_sequence(config, extremes_of(examples)) == (3, 12)
    assert longest_sequence(parse_train(["kto"]), extremes_of(examples)) == (3, 19)
    assert longest_sequence(parse_train(["dpo"]), extremes_of(examples)) == (3, 11)
    prompts = [Prompt([1] * n, "a", {}, row) for row, n in enumerate((5, 6))]
    assert longest_sequence(parse_train(["grpo", "--max_completion_length", "7"]), extremes_of(prompts)) == (1, 13)


def test_a_sequence_beyond_ropes_positions_is_said(data):
    run = build(data, "dpo", model=tiny_model(**SMALL, max_position_embeddings=25))
    message = (
        f"row 1 of the data set makes a sequence of 26 tokens, more than the 25 positions that '{data}/model' was made "
        "for, where it may do badly"
    )
    assert message in run.notes
    assert not any("positions" in n for n in build(data, "dpo").notes)


def test_a_reference_is_held_to_its_own_tables(data, unloaded):
    gpt2(24).save_pretrained(data / "other")
    message = "row 1 .* 26 tokens, .* 24 positions that .*/other' has learned; lower --max_length"
    refused(message, data, "dpo", "--ref_model_name_or_path", str(data / "other"))
    message = f"--ref_model_name_or_path {data} holds no model: the folder has no config.json"
    refused(re.escape(message), data, "dpo", "--ref_model_name_or_path", str(data))


def test_a_warm_up_beyond_the_end_is_refused(data, unloaded):
    message = "--warmup_steps 3 of 3 steps: the learning rate would never reach its peak; choose fewer"
    refused(message, data, "dpo", "--warmup_steps", "3", "--max_steps", "3")
    shape = Shape("m", 259, None, None, 10)
    assert check_before(parse_train(["dpo", "--warmup_steps", "2"]), [], [shape], 3) == []


def test_targets_and_adapters_are_looked_at_before_the_model_is_loaded(data, unloaded):
    options = ("--lora_r", "2", "--lora_target_modules", "q_proj", "qkv_proj")
    refused("--lora_target_modules q_proj qkv_proj: no module of the model is called qkv_proj; it has .*", data, "dpo",
            *options)  # fmt: skip
    message = f"no adapter could be loaded from '{data}': the folder has no adapter_config.json"
    refused(re.escape(message), data, "dpo", "--adapter_name_or_path", str(data))


def test_looking_at_a_model_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read_model(parse_train(["dpo"]))
    assert torch.equal(torch.get_rng_state(), before)


def test_rollouts_pad_with_a_token_of_the_model(data):
    """Prompts of two lengths are padded to generate, with what the tokenizer calls its padding token."""
    (data / "rows.jsonl").write_text('{"prompt": "1=", "answer": "1"}\n{"prompt": "11111=", "answer": "1"}')
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    options = ("--num_generations", "2", "--max_completion_length", "3", "--max_steps", "1")
    run = build(data, "grpo", *options, model=tiny_model(**SMALL), tokenizer=tokenizer)
    assert any(note.startswith("the padding token [PAD] (259) has no row") for note in run.notes)
    assert run.step.packing["pad_id"] == run.tokenizer.pad_token_id == 258
    assert train_run(run, quiet=True)["step"] == 1


@pytest.mark.parametrize(("options", "said"), [((), True), (("--lora_r", "2"), False), (("--dtype", "float32"), False)])
def test_bfloat16_weights_at_a_small_rate_are_said(data, options, said):
    run = build(data, "dpo", "--dtype", "bfloat16", *options)
    (*notes,) = (note for note in run.notes if "cannot be moved" in note)
    assert bool(notes) is said
    if said:
        assert re.fullmatch(
            r"\d+ % of the bfloat16 weights cannot be moved by a step of the learning rate 1e-06, which is below their "
            "rounding: use --dtype float32 --mixed_precision bf16, or a larger rate",
            notes[0],
        )
        faster = build(data, "dpo", "--dtype", "bfloat16", "--learning_rate", "0.1")
        assert not any("cannot be moved" in note for note in faster.notes)
