"""GRPO with a tool: the model writes <calc>12*34</calc>, reads =408 behind it, and goes on; up to three times.

    python examples/calculator_tool.py > calls.jsonl
    logratio train sft --dataset_name calls.jsonl --learning_rate 1e-3 --batch_size 16 --max_steps 150 \\
        --output_dir runs/calls
    PYTHONPATH=examples logratio train grpo --model_name_or_path runs/calls --rollout_func calculator_tool:rollout \\
        --reward_funcs exact_answer calculator_tool:few_calls --reward_weights 1 0.1 --num_generations 8 \\
        --batch_size 8 --max_completion_length 48 --learning_rate 1e-4 --max_steps 40 --output_dir runs/tool

Run from the repository's root. The first line writes what the second teaches the embedded model: that there are calls.
A chat model needs no such lesson, but has to be told in its prompts ("write <calc>12*34</calc> to have it computed").
To change the tool, write another `answered`; a shell, a search or a game is called in its place.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from typing import Any

CALL = re.compile(r"<calc>([^<>]{1,64})</calc>")
END = "</calc>"
CALLS = 3
OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}


def value(node: ast.AST) -> int | float:
    """Of numbers, + - * / // % and parentheses. ValueError for all else: nothing that the model writes is run."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))  # type: ignore[no-any-return]
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.operand))  # type: ignore[no-any-return]
    raise ValueError("not arithmetic")


def answered(text: str) -> str | None:
    """What the tool answers to the last call of a text; None: there is none."""
    calls = CALL.findall(text)
    if not calls:
        return None
    try:
        found = value(ast.parse(calls[-1].strip(), mode="eval").body)
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return "=error"
    return f"={found:.6g}" if isinstance(found, float) else f"={found}"


def rollout(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
    """A completion of each prompt. Token ids are handed on as they are: text that is tokenized again may become other
    ones than the model wrote."""
    tokenizer, limit = trainer.processing_class, trainer.max_completion_length
    completion_ids: list[list[int]] = [[] for _ in prompts]
    env_mask: list[list[int]] = [[] for _ in prompts]
    calls = [0] * len(prompts)
    going = list(range(len(prompts)))
    for turn in range(CALLS + 1):
        contexts = [trainer.prompt_ids[i] + completion_ids[i] for i in going]
        said = trainer.sample(contexts, going, stop_strings=[END] if turn < CALLS else [])
        calling = []
        for i, sample in zip(going, said, strict=True):
            completion_ids[i] += sample.ids
            env_mask[i] += [1] * len(sample.ids)
            answer = answered(tokenizer.decode(sample.ids)) if turn < CALLS and sample.finish_reason == "stop" else None
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
            if ids and len(completion_ids[i]) + len(ids) < limit:
                completion_ids[i] += ids
                env_mask[i] += [0] * len(ids)
                calls[i] += 1
                calling.append(i)
        going = calling
        if not going:
            break
    return {"completion_ids": completion_ids, "env_mask": env_mask, "calls": calls}


def few_calls(calls: list[int], **_: Any) -> list[float]:
    """1 for one call, less for each further one and for none."""
    return [1 - abs(count - 1) / CALLS for count in calls]


def lessons(count: int = 2000) -> list[dict[str, str]]:
    """Questions with a call, its answer, and the model's own last line."""
    from logratio.trainers.data.tasks.arithmetic import questions

    return [
        {"prompt": f"{a}+{b}=", "completion": f"<calc>{a}+{b}</calc>={a + b}\nA: {a + b}"}
        for a, b in questions()[:count]
    ]


if __name__ == "__main__":
    for row in lessons():
        print(json.dumps(row))
