"""BOS and EOS by ids, whatever the tokenizer adds, the template writes and the text already has."""

import pytest
from tokenizers import processors

from logratio.losses import Kind
from logratio.trainers.data.examples import Rows, prepare, prepare_prompts
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

BOS, EOS = "<s>", "<|im_end|>"
TEMPLATE = (
    "{{ bos_token }}{%- for m in messages -%}{{ '[' + m.role + ']' + m.content + eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[assistant]' }}{%- endif -%}"
)
ADDS = {"nothing": "$A", "BOS": f"{BOS} $A", "EOS": f"$A {EOS}", "both": f"{BOS} $A {EOS}"}


def tokenizer_that_adds(what, template=TEMPLATE, bos=BOS):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": bos})
    pairs = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {bos, EOS}]
    single = ADDS[what].replace(BOS, bos)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    tokenizer.chat_template = template
    return tokenizer


def bytes_of(text):
    return list(text.encode())


def ids(example):
    return example.prompt_ids + example.completions[0].ids


@pytest.mark.parametrize("what", ADDS)
@pytest.mark.parametrize("ending", ["", EOS, EOS + EOS])
@pytest.mark.parametrize("beginning", ["", BOS, BOS + BOS])
def test_plain_text_has_one_bos_and_one_eos(what, ending, beginning):
    tokenizer = tokenizer_that_adds(what)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = [bos] if beginning or what in ("BOS", "both") else []
    rows = [{"prompt": beginning + "ab", "completion": "c" + ending}]
    (example,), report = prepare(Rows("data", rows), Kind.SEQUENCE, tokenizer)
    assert ids(example) == [*first, *bytes_of("abc"), eos]
    assert example.completions[0].ids == [*bytes_of("c"), eos] and report.moved == 0
    (text,), _ = prepare(Rows("data", [{"text": beginning + "abc" + ending}]), Kind.SEQUENCE, tokenizer)
    assert ids(text) == ids(example)
    # what ends a text, ends it; anything else in it is said
    assert report.special == bool(beginning or ending == EOS + EOS)


@pytest.mark.parametrize("what", ADDS)
def test_a_prompt_to_generate_from_does_not_end_in_eos(what):
    tokenizer = tokenizer_that_adds(what)
    first = [tokenizer.bos_token_id] if what in ("BOS", "both") else []
    prompts, _ = prepare_prompts(Rows("data", [{"prompt": "ab"}, {"prompt": "ab" + EOS}]), tokenizer)
    assert [p.prompt_ids for p in prompts] == [[*first, *bytes_of("ab")]] * 2


@pytest.mark.parametrize("what", ADDS)
def test_conversations_have_what_their_template_writes(what):
    tokenizer = tokenizer_that_adds(what)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = [{"role": "user", "content": "a"}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "b" + more}]} for more in ("", EOS)]
    examples, report = prepare(Rows("data", rows), Kind.SEQUENCE, tokenizer)
    start = [bos, *bytes_of("[user]a"), eos, *bytes_of("[assistant]")]
    assert [ids(e) for e in examples] == [[*start, ord("b"), eos]] * 2
    assert str(report).endswith("; 1 whose own text has special tokens, which are read as such")
    (generated,), _ = prepare_prompts(Rows("data", [{"prompt": prompt}]), tokenizer)
    assert generated.prompt_ids == start


def test_a_conversation_without_a_generation_prompt_cannot_be_gone_on_with():
    tokenizer = tokenizer_that_adds("nothing", TEMPLATE.replace("if add_generation_prompt", "if false"))
    with pytest.raises(UserError, match=r"^data, row 0 .counted from 0.: the prompt as rendered ends with EOS"):
        prepare_prompts(Rows("data", [{"prompt": [{"role": "user", "content": "a"}]}]), tokenizer)


def test_one_token_may_be_both():
    tokenizer = tokenizer_that_adds("BOS", bos=EOS)
    rows = Rows("data", [{"prompt": "", "completion": "a"}, {"prompt": EOS, "completion": "a"}])
    examples, _ = prepare(rows, Kind.SEQUENCE, tokenizer)
    eos = tokenizer.eos_token_id
    assert [ids(e) for e in examples] == [[eos, ord("a"), eos]] * 2
    (prompt,), _ = prepare_prompts(Rows("data", [{"prompt": ""}]), tokenizer)
    assert prompt.prompt_ids == [eos]


def test_the_row_that_a_batch_fails_at_is_found(monkeypatch):
    tokenizer = tiny_tokenizer()
    encode = type(tokenizer).__call__

    def picky(self, text, **options):
        if any("\x00" in one for one in text):
            raise RuntimeError("a NUL in it\nand more")
        return encode(self, text, **options)

    rows = [{"prompt": "a", "completion": "b"} for _ in range(2500)]
    rows[1234] = {"prompt": "a", "completion": "b\x00"}
    monkeypatch.setattr(type(tokenizer), "__call__", picky)
    wanted = r"^data, row 1234 \(counted from 0\): the tokenizer does not take the text: a NUL in it$"
    with pytest.raises(UserError, match=wanted):
        prepare(Rows("data", rows), Kind.SEQUENCE, tokenizer)
    examples, report = prepare(Rows("data", rows), Kind.SEQUENCE, tokenizer, on_bad_row="skip")
    assert [e.row for e in examples] == [*range(1234), *range(1235, 2500)]
    assert [entry["row"] for entry in report.skipped] == [1234]


def test_answers_begun_in_the_prompt_are_counted():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "c"}]}]
    _, report = prepare(Rows("data", rows), Kind.SEQUENCE, tiny_tokenizer())
    assert str(report).endswith("; 1 whose prompt ends with an assistant's turn, which a turn of its own follows")
