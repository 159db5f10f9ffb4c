"""The embedded model and tokenizer: any text, a chat template with marks, the size that is promised."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "a2"},
]


@settings(max_examples=50, deadline=None)
@given(st.text().filter(lambda text: "<|" not in text))
def test_any_text_is_its_bytes_and_comes_back(text):
    # The three special tokens are the only text that is not spelt out.
    ids = TOKENIZER(text)["input_ids"]
    assert bytes(ids) == text.encode() and TOKENIZER.decode(ids) == text


def test_the_special_tokens_are_three():
    names = [TOKENIZER.pad_token, "<|im_start|>", TOKENIZER.eos_token]
    assert TOKENIZER.convert_tokens_to_ids(names) == [256, 257, 258] and len(TOKENIZER) == 259
    assert TOKENIZER.bos_token is None
    assert TOKENIZER.decode([ord("a"), 258, 256], skip_special_tokens=True) == "a"


def test_the_template_marks_what_the_assistant_says_and_its_end():
    encoded = TOKENIZER.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert TOKENIZER.decode(said) == "a1<|im_end|>a2<|im_end|>"
    assert encoded["input_ids"][-1] == TOKENIZER.eos_token_id


def test_a_prompt_with_its_generation_prompt_begins_the_conversation():
    prompt = TOKENIZER.apply_chat_template(CHAT[:-1], add_generation_prompt=True, tokenize=False)
    assert prompt + "a2<|im_end|>" == TOKENIZER.apply_chat_template(CHAT, tokenize=False)


def test_model_and_tokenizer_come_back_from_a_folder(tmp_path):
    model = tiny_model(seed=3)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("é <|im_end|>") == TOKENIZER("é <|im_end|>")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token) == (256, 258, None)
    assert tokenizer.apply_chat_template(CHAT) == TOKENIZER.apply_chat_template(CHAT)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_model_is_of_its_seed_alone_and_leaves_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (next(tiny_model(seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_size_is_as_said():
    model = tiny_model()
    assert sum(p.numel() for p in model.parameters()) == 673_024
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tiny_model(num_hidden_layers=1, tie_word_embeddings=False).config.num_hidden_layers == 1
