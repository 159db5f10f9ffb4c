"""The assistant's turns: of templates without marks as of TRL's marked versions of them, and where tokenizers trim."""

from pathlib import Path

import pytest
import trl
from tokenizers import processors
from trl.chat_template_utils import get_training_chat_template

from logratio.trainers.data.chat.assistant_masks import token_mask
from logratio.trainers.data.tokenization import Encoder, Piece, check_tokenizer
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

CHATML = """\
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
WORDS = "{%- for m in messages -%}{{ m.role + ': ' + m.content + '\\n' }}{%- endfor -%}"
NEXT_TURN_CLOSES = "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{%- endfor -%}"

TOKENS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
)


def tokenizer_with(template, *tokens, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens], **options})
    tokenizer.chat_template = template
    return tokenizer


def family(name):
    """A tokenizer with the chat template of this family, as TRL's package holds it."""
    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    return tokenizer_with(source, *TOKENS, bos_token="<s>", eos_token="<|endoftext|>")


def message(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "warmth", "arguments": {"town": "Pecs"}}}
CHAT = [
    message("user", "Write a line. "),
    message("assistant", "Here it is:"),
    message("user", "<end> Secret?"),
    message("assistant", "An\n\nanswer."),
    message("user", "More?"),
]
TOOLS = [
    message("system", "Be brief."),
    message("user", "How warm?"),
    message("assistant", "", tool_calls=[CALL]),
    message("tool", "21"),
    message("assistant", "It is 21."),
]
GREETING = [
    message("assistant", "Welcome!"),
    message("user", "Hi."),
    message("user", "Hello?"),
    message("assistant", "Yes?"),
]
SAME = [
    (name, chat, options)
    for name, chats in {
        "llama3": (CHAT, CHAT[:4], GREETING),
        "gemma": (CHAT, CHAT[:4]),
        "gemma3": (CHAT, CHAT[:4]),
        "phi3": (CHAT,),
        "qwen3_instruct_2507": (CHAT, CHAT[:4], TOOLS, GREETING),
    }.items()
    for chat in chats
    for options in ({},)
]


def decoded(tokenizer, ids, mask):
    """The scored text of each run."""
    runs, before = [], False
    for token, own in zip(ids, mask, strict=True):
        if own:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = own
    return [tokenizer.decode(run) for run in runs]


def ours(tokenizer, chat, **options):
    encoder = Encoder(tokenizer)
    (ids,) = encoder.wholes([Piece(chat, options, "row 0")])
    return ids, encoder.assistant_mask(chat, options, "row 0")


@pytest.mark.parametrize("name, chat, options", SAME)
def test_turns_without_marks_are_those_of_trls_marked_template(name, chat, options):
    tokenizer = family(name)
    training = get_training_chat_template(tokenizer)
    theirs = tokenizer.apply_chat_template(
        chat, chat_template=training, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    ids, mask = ours(tokenizer, chat, **options)
    assert ids == theirs["input_ids"]
    scored = [bool(flag) for flag in theirs["assistant_masks"]]
    assert decoded(tokenizer, ids, mask) == decoded(tokenizer, ids, scored)
    assert mask == scored


def test_qwen25_scores_no_line_break_of_the_generation_prompt():
    tokenizer = family("qwen2_5")
    for chat in (CHAT, TOOLS, GREETING):
        theirs = tokenizer.apply_chat_template(
            chat,
            chat_template=get_training_chat_template(tokenizer),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = ours(tokenizer, chat)
        assert ids == theirs["input_ids"]
        expected = decoded(tokenizer, ids, theirs["assistant_masks"])
        assert expected[0].startswith("\n")
        assert [text.removeprefix("\n") for text in expected] == decoded(tokenizer, ids, mask)


def test_qwen3_keeps_its_text_and_drops_earlier_thoughts():
    tokenizer = family("qwen3")
    chat = [*CHAT[:3], message("assistant", "An answer.", reasoning_content="Let me think.")]
    chat[1] = message("assistant", "Here it is:", reasoning_content="Which line?")
    ids, mask = ours(tokenizer, chat)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert decoded(tokenizer, ids, mask) == [
        "Here it is:<|im_end|>\n",
        "<think>\nLet me think.\n</think>\n\nAn answer.<|im_end|>\n",
    ]
    quiet = decoded(tokenizer, *ours(tokenizer, CHAT[:4], enable_thinking=False))
    # what the generation prompt already has is not scored
    assert quiet == ["Here it is:<|im_end|>\n", "An\n\nanswer.<|im_end|>\n"]


def test_what_the_answer_contains_does_not_end_it():
    tokenizer = tokenizer_with(CHATML, eos_token="<|endoftext|>")
    chat = [
        message("user", "a"),
        message("assistant", "one<|im_end|>\ntwo"),
        message("user", ""),
        message("assistant", "b"),
    ]
    assert decoded(tokenizer, *ours(tokenizer, chat)) == ["one<|im_end|>\ntwo<|im_end|>\n", "b<|im_end|>\n"]


@pytest.mark.parametrize(
    "template",
    [
        NEXT_TURN_CLOSES,  # nothing tells where an answer ends
        CHATML.replace("m.content", "m.content | upper"),  # the mark does not come back
        CHATML.replace("m.content +", "m.content + m.content +"),  # written twice
        CHATML.replace(
            "m.content +", "(m.content | length | string) + m.content +"
        ),  # a mark changes more than its place
        CHATML.replace("if add_generation_prompt", "if false"),  # whose is the header?
    ],
)
def test_turns_that_do_not_agree_with_the_whole_are_refused(template):
    tokenizer = tokenizer_with(template, eos_token="<|endoftext|>")
    with pytest.raises(UserError, match="^row 0: the chat template does not mark the assistant's turns"):
        ours(tokenizer, CHAT)


def test_a_template_that_closes_nothing_is_refused_at_once():
    with pytest.raises(UserError, match="assistant_only_loss needs a chat template that marks"):
        check_tokenizer(tokenizer_with(WORDS), conversational=True, assistant_only_loss=True)
    check_tokenizer(tokenizer_with(CHATML), conversational=True, assistant_only_loss=True)


MARKED = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content -}}{%- endgeneration -%}"
    "{{- '<|im_end|>' -}}{%- else -%}{{- '[' + m.content + ']' -}}{%- endif -%}{%- endfor -%}"
)


@pytest.mark.parametrize("trims", [True, False])
def test_spaces_at_an_answers_edges_are_its_own(trims):
    tokenizer = tokenizer_with(MARKED)
    if trims:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    chat = [
        message("user", " a "),
        message("assistant", "one  "),
        message("user", " b "),
        message("assistant", "  two"),
    ]
    assert decoded(tokenizer, *ours(tokenizer, chat)) == ["one  ", "  two"]


def test_tokens_are_the_spans_that_they_overlap():
    offsets = [(0, 2), (2, 4), (4, 6), (7, 7), (7, 9), (9, 9)]
    assert token_mask(offsets, [(3, 5), (6, 7)]) == [False, True, True, True, False, False]
    assert token_mask(offsets, []) == [False] * 6
