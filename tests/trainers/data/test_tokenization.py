"""Token ids, prompt boundaries and masks, by property and against TRL's own preparation of the same rows."""

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer, extract_prompt
from trl.experimental.tpo import TPOConfig, TPOTrainer

from logratio.losses import Kind
from logratio.trainers.data.examples import Rows, prepare, prepare_prompts
from logratio.trainers.data.tokenization import check_messages, common_prefix, implicit_prompt
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

# Renders the prompt alone with an empty thought that the whole conversation does not have.
THINKING_TEMPLATE = CHAT_TEMPLATE.replace("assistant\n'", "assistant\n<think></think>'")
QUESTIONS = [
    "What is 12+34?",
    "name a colour ",
    "",
    "héllo 漢字 is",
    "the the",
    "1+1=",
    "a b",
    "say yes:",
    "tell me",
    "x",
]
ANSWERS = ["46", "blue, or red", "so be it", " and why not", "re the the", "2", " c", "yes", " a story", "y"]
OTHERS = ["47", "blue", "so it is", " what", "n the", "3", " d", "no", " nothing", "z"]


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Merges across words, so that a prompt's last token often changes with what follows; and it adds a BOS token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [q + a for q, a in zip(QUESTIONS, ANSWERS, strict=True)] * 3
    special = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = THINKING_TEMPLATE
    return tokenizer


TOKENIZERS = {"bytes": tiny_tokenizer(), "merging": bpe_tokenizer()}


def small_model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def plain(*columns: str) -> list[dict]:
    texts = {"prompt": QUESTIONS, "completion": ANSWERS, "chosen": ANSWERS, "rejected": OTHERS}
    rows = [{column: texts[column][i] for column in columns if column in texts} for i in range(len(QUESTIONS))]
    return [{**row, "label": i % 3 == 0} if "label" in columns else row for i, row in enumerate(rows)]


def conversational(*columns: str) -> list[dict]:
    system = [{"role": "system", "content": "Be brief."}]
    rows = plain(*columns)
    for i, row in enumerate(rows):
        for column in set(columns) - {"label"}:
            row[column] = (
                [*(system if i % 2 else []), user(row[column])]
                if column == "prompt"
                else [assistant(row[column]), user("and?"), assistant("no more")][: 3 if i % 4 == 3 else 1]
            )
    return rows


def without_empty_prompts(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["prompt"]]


def common_options(folder) -> dict:
    return {
        "output_dir": str(folder),
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }


FORMATS = {"plain": plain, "conversational": conversational}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def model(tokenizer):
    return small_model(tokenizer)


def sft_rows(rows: list[dict], tokenizer, **options) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each example, as TRL has them."""
    examples, _ = prepare(Rows("rows", rows), Kind.SEQUENCE, tokenizer, **options)
    result = []
    for example in examples:
        (completion,) = example.completions
        scored = completion.scored or [True] * len(completion.ids)
        labels = [token if flag else -100 for token, flag in zip(completion.ids, scored, strict=True)]
        result.append((example.prompt_ids + completion.ids, [-100] * len(example.prompt_ids) + labels))
    return result


SFT_CASES = {
    "plain": (plain("prompt", "completion"), {}),
    "conversational": (conversational("prompt", "completion"), {}),
    "plain, all scored": (plain("prompt", "completion"), {"completion_only_loss": False}),
    "conversational, all scored": (conversational("prompt", "completion"), {"completion_only_loss": False}),
    "conversational, assistant only": (
        conversational("prompt", "completion"),
        {"assistant_only_loss": True},
    ),
    "any order of roles": (
        [
            {"messages": [assistant("hi"), user("a"), assistant("b")]},
            {"messages": [user("a"), user("b"), assistant("c"), assistant("d"), user("e")]},
            {"messages": [user("a"), {"role": "system", "content": "short"}, assistant("c")]},
            {"messages": [{"role": "critic", "content": "a"}, assistant("c")]},
        ],
        {"assistant_only_loss": True},
    ),
    "an answer begun in the prompt": (
        [
            {"prompt": [user("a poem"), assistant("Roses are")], "completion": [assistant(" red.")]},
            {"prompt": [{"role": "system", "content": "rule"}], "completion": [user("a"), assistant("b")]},
        ],
        {},
    ),
    "text": ([{"text": q + a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)], {}),
    "text with EOS": ([{"text": a + "<|im_end|>"} for a in ANSWERS], {}),
    "messages": ([{"messages": [user(q), assistant(a)]} for q, a in zip(QUESTIONS, ANSWERS, strict=True)], {}),
    "messages, assistant only": (
        [
            {"messages": [user(q), assistant(a), user(a), assistant(q + "!"), user("so")]}
            for q, a in zip(QUESTIONS, ANSWERS, strict=True)
        ],
        {"assistant_only_loss": True},
    ),
}


@pytest.mark.parametrize("max_length", [1024, 30])
@pytest.mark.parametrize("case", SFT_CASES)
def test_sft_ids_and_labels_are_trls(case, max_length, tokenizer, model, tmp_path):
    rows, options = SFT_CASES[case]
    arguments = SFTConfig(**common_options(tmp_path), max_length=max_length, **options)
    trainer = SFTTrainer(model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    # The loss never sees the first label: the shift takes it away. An example that had no other is none of ours.
    theirs = [(x["input_ids"], [-100, *x["labels"][1:]]) for x in trainer.train_dataset]
    theirs = [(ids, labels) for ids, labels in theirs if any(label != -100 for label in labels)]
    assert sft_rows(rows, tokenizer, max_length=max_length, **options) == theirs


PAIR_CASES = {
    "plain": without_empty_prompts(plain("prompt", "chosen", "rejected")),
    "conversational": conversational("prompt", "chosen", "rejected"),
    "plain, implicit prompt": [
        {"chosen": q + c, "rejected": q + r} for q, c, r in zip(QUESTIONS, ANSWERS, OTHERS, strict=True) if q
    ],
    "conversational, implicit prompt": [
        {"chosen": [user(q), assistant(c)], "rejected": [user(q), assistant(r)]}
        for q, c, r in zip(QUESTIONS, ANSWERS, OTHERS, strict=True)
    ],
}


def check_collated(examples, theirs) -> None:
    """Compare the ids, padding aside, and which of them are scored, with TRL's collated batch."""
    ours = [(x.prompt_ids + c.ids, [0] * len(x.prompt_ids) + [1] * len(c.ids)) for x, c in examples]
    ids, attention, scored = (theirs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    lengths = attention.sum(1).tolist()
    assert ours == [(i[:n], s[:n]) for i, s, n in zip(ids.tolist(), scored.tolist(), lengths, strict=True)]


@pytest.mark.parametrize("max_length", [1024, 32])
@pytest.mark.parametrize("case", PAIR_CASES)
def test_dpo_ids_are_trls(case, max_length, tokenizer, model, tmp_path):
    rows = PAIR_CASES[case]
    arguments = DPOConfig(**common_options(tmp_path), max_length=max_length)
    data = datasets.Dataset.from_list(rows)
    trainer = DPOTrainer(model, small_model(tokenizer), arguments, train_dataset=data, processing_class=tokenizer)
    theirs = trainer.data_collator([dict(x) for x in trainer.train_dataset])
    examples, report = prepare(Rows("rows", rows), Kind.PAIRED, tokenizer, max_length=max_length)
    assert report.dropped == len(rows) - len(trainer.train_dataset)
    assert all(c.scored is None for x in examples for c in x.completions)
    # All chosen come first in TRL's batch.
    check_collated([(x, x.completions[i]) for i in (0, 1) for x in examples], theirs)


def triples(rows: list[dict], case: str) -> list[dict]:
    """The pairs with a gold completion each, which in plain rows merges with some prompts that chosen does not."""
    if case == "plain":
        return [{**row, "reference": " c"} for row in rows]
    more = " and more" if "plain" in case else [user("so?"), assistant("so")]
    return [{**row, "reference": row["chosen"] + more} for row in rows if "plain" in case or len(row["chosen"]) < 4]


@pytest.mark.parametrize("max_length", [1024, 32])
@pytest.mark.parametrize("case", PAIR_CASES)
def test_tpo_ids_are_trls(case, max_length, tokenizer, model, tmp_path):
    rows = triples(PAIR_CASES[case], case)
    arguments = TPOConfig(**common_options(tmp_path), max_length=max_length)
    data = datasets.Dataset.from_list(rows)
    trainer = TPOTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    examples, _ = prepare(Rows("rows", rows), Kind.PAIRED, tokenizer, max_length=max_length, gold=True)
    # TRL keeps prompts that leave no room for a completion
    theirs = trainer.data_collator([dict(x) for x in trainer.train_dataset if len(x["prompt_ids"]) < max_length])
    check_collated([(x, x.completions[i]) for i in (0, 1, 2) for x in examples], theirs)


@pytest.mark.parametrize("max_length", [1024, 32])
@pytest.mark.parametrize("case", ["plain", "conversational", "unpaired"])
def test_kto_ids_are_trls(case, max_length, tokenizer, model, tmp_path):
    rows = (
        PAIR_CASES["plain, implicit prompt"]
        if case == "unpaired"
        else without_empty_prompts(FORMATS[case]("prompt", "completion", "label"))
    )
    arguments = KTOConfig(**common_options(tmp_path), max_length=max_length, per_device_train_batch_size=4)
    data = datasets.Dataset.from_list(rows)
    trainer = KTOTrainer(model, small_model(tokenizer), arguments, train_dataset=data, processing_class=tokenizer)
    theirs = trainer.data_collator([dict(x) for x in trainer.train_dataset])
    examples, _ = prepare(Rows("rows", rows), Kind.LABELED, tokenizer, max_length=max_length)
    check_collated([(x, x.completions[0]) for x in examples], theirs)
    assert [x.label for x in examples] == theirs["label"].tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_prompts_are_tokenized_as_for_generation(format, tokenizer):
    rows = without_empty_prompts(FORMATS[format]("prompt"))
    prompts, _ = prepare_prompts(Rows("rows", rows), tokenizer)
    expected = [
        tokenizer(row["prompt"])["input_ids"]
        if format == "plain"
        else tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for row in rows
    ]
    assert [prompt.prompt_ids for prompt in prompts] == expected


def test_the_cases_do_move_prompt_boundaries():
    """The comparisons with TRL above mean something only where merges and templates do change a prompt's end."""
    rows = PAIR_CASES["plain"]
    assert prepare(Rows("rows", rows), Kind.PAIRED, TOKENIZERS["merging"])[1].moved >= 2
    rows = PAIR_CASES["conversational"]
    assert prepare(Rows("rows", rows), Kind.PAIRED, TOKENIZERS["merging"])[1].moved == len(rows)
    assert prepare(Rows("rows", rows), Kind.PAIRED, TOKENIZERS["bytes"])[1].moved == 0


words = st.text(alphabet="the ab1+?é漢", min_size=1, max_size=12)
answers = words.filter(str.strip)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(prompt=words, chosen=answers, rejected=answers)
def test_splitting_loses_nothing(name, prompt, chosen, rejected):
    tokenizer = TOKENIZERS[name]
    (example,), _ = prepare(
        Rows("rows", [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]), Kind.PAIRED, tokenizer
    )
    for completion, text in zip(example.completions, (chosen, rejected), strict=True):
        assert example.prompt_ids + completion.ids == tokenizer(prompt + text + tokenizer.eos_token)["input_ids"]
        assert completion.ids[-1] == tokenizer.eos_token_id


@settings(max_examples=100, deadline=None)
@given(st.text("ab ", min_size=1, max_size=8), st.text("ab ", min_size=1, max_size=8))
def test_an_implicit_prompt_is_trls(chosen, rejected):
    cut = implicit_prompt(chosen, rejected)
    assert 0 <= cut < min(len(chosen), len(rejected))
    # Where the two differ from the first character on, TRL looks at the character before it: the text's last.
    if chosen[0] == rejected[0]:
        assert extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"] == chosen[:cut]
    else:
        assert cut == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1), max_size=6), st.lists(st.integers(0, 1), max_size=6))
def test_common_prefix_is_the_longest(left, right):
    n = common_prefix(left, right)
    assert left[:n] == right[:n]
    assert n == min(len(left), len(right)) or left[n] != right[n]


@pytest.mark.parametrize("role, meant", [("gpt", "assistant"), ("Assistant", "assistant"), ("human", "user")])
def test_a_role_that_means_another_is_named(role, meant):
    with pytest.raises(UserError, match=f"^here, message 1 has the role '{role}': write '{meant}'"):
        check_messages([user("a"), {"role": role, "content": "text"}], "here")
