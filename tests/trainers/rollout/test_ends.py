"""Which tokens end a completion, and that the saved model names those that it was trained on."""

import json

import pytest
from transformers import GenerationConfig

from logratio.trainers import cli
from logratio.trainers.data.examples import Completion, Example, Prompt
from logratio.trainers.policy.tiny import EOS, PAD, START, tiny_model, tiny_tokenizer
from logratio.trainers.rollout.ends import ends_of, holds_string, name_ends, named_ends

CLOSED = "{% for m in messages %}" + START + "{{ m.role }}\n{{ m.content }}" + EOS + "\n{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}]


def other_eos():
    """A base model's tokenizer: the template closes a turn with <|im_end|>, its EOS is another token."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CLOSED
    closing = tokenizer.eos_token_id
    tokenizer.eos_token = PAD
    return tokenizer, closing, tokenizer.eos_token_id


def model_naming(ends):
    model = tiny_model(num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return model


def test_a_conversation_ends_where_its_template_closes_a_turn():
    tokenizer, closing, eos = other_eos()
    assert ends_of(tokenizer, conversational=True) == [eos, closing]
    assert ends_of(tokenizer, conversational=False) == [eos]
    assert ends_of(tiny_tokenizer(), conversational=True) == [tiny_tokenizer().eos_token_id]


@pytest.mark.parametrize("named, before", [(None, []), (3, [3]), ([3, 4], [3, 4])])
def test_what_training_teaches_is_named(named, before):
    tokenizer, closing, eos = other_eos()
    chat, plain = Example([1], [Completion([65, closing, 10])]), Example([1], [Completion([65, eos])])
    for data, end in [([chat], closing), ([plain], eos), ([Prompt([1], CHAT, {}, 0)], closing)]:
        model = model_naming(named)
        (note,) = name_ends(model, tokenizer, data)
        taught = [eos, closing] if isinstance(data[0], Prompt) else [end]
        assert named_ends(model) == [*before, *taught]
        assert all(token in note for token in tokenizer.convert_ids_to_tokens(taught))
        assert name_ends(model, tokenizer, data) == [], "it is named now"
    model = model_naming(named)
    assert name_ends(model, tokenizer, [Prompt([1], "hi", {}, 0)]) and named_ends(model) == [*before, eos]


def test_what_is_named_already_or_not_taught_changes_nothing():
    tokenizer, closing, eos = other_eos()
    for named, ids in [([closing, 3], [65, closing]), (eos, [65, eos]), (3, [65, 66])]:
        model = model_naming(named)
        assert name_ends(model, tokenizer, [Example([1], [Completion(ids)])]) == []
        assert model.generation_config.eos_token_id == named
    assert name_ends(object(), tokenizer, [Example([1], [Completion([65, closing])])]) == []


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_the_saved_model_stops_where_it_learned_to(tmp_path, method, capsys):
    tokenizer, closing, eos = other_eos()
    model_naming(eos).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = {"sft": {"completion": [{"role": "assistant", "content": "4"}]}, "grpo": {"answer": "4"}}[method]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": CHAT, **rows}) + "\n")
    words = ["train", method, "--model_name_or_path", str(tmp_path / "base"), "--max_steps", "1"]
    words += ["--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
    words += ["--num_generations", "2", "--max_completion_length", "2"] if method == "grpo" else []
    assert cli.main(words) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [eos, closing]
    assert (
        "completions end with <|im_end|>, which the model's generation_config did not name" in capsys.readouterr().out
    )


def test_a_string_is_found_at_the_end_whatever_its_bytes_and_however_long_the_text():
    """Where the last token completes it: of all before that none, and no more is read than it takes."""
    tokenizer, read = tiny_tokenizer(), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: (read.append(len(ids)), decode(ids, **options))[1]
    for string in ("</answer>", "é€😀é€😀", "x"):
        ids = tokenizer("a" * 500 + string)["input_ids"]
        assert holds_string(tokenizer, ids, [string]) and holds_string(tokenizer, ids, ["never in it", string])
        assert not holds_string(tokenizer, ids[:-1], [string])
    assert max(read) < 40 and not holds_string(tokenizer, [], ["x"]) and not holds_string(tokenizer, ids, [])
