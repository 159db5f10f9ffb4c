"""The example of a tool: what it computes, and that a model which calls it learns with it."""

import importlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from logratio.trainers import cli
from logratio.trainers.policy.tiny import tiny_tokenizer

from .test_imports import imports
from .trainers._runs import completions, log
from .trainers.rollout._server import SmallServer

EXAMPLES = Path(__file__).parents[1] / "examples"
ANSWERS = {
    "<calc>12*34</calc>": "=408",
    "first <calc>1+1</calc>=2, then <calc>-(2 - 5) // 2 % 7</calc>": "=1",
    "<calc>7/2</calc>": "=3.5",
    "<calc>1/0</calc>": "=error",
    "<calc>2**9999</calc>": "=error",
    "<calc>__import__('os')</calc>": "=error",
    "<calc>(1).real</calc>": "=error",
    "<calc>'a'*9</calc>": "=error",
    "<calc>True+1</calc>": "=error",
    "<calc>1+</calc>": "=error",
    "<calc>0x</calc>": "=error",
    "12*34": None,
    "<calc></calc>": None,
    "<calc>1+1": None,
}


@pytest.fixture
def calculator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("calculator_tool")


@pytest.mark.parametrize("text", ANSWERS)
def test_only_arithmetic_is_computed(calculator, text):
    assert calculator.answered(text) == ANSWERS[text]


def test_it_is_short_and_asks_the_trainer_alone():
    path = EXAMPLES / "calculator_tool.py"
    assert len(path.read_text().splitlines()) <= 120
    assert {name for _, name in imports(path) if name.startswith("logratio.")} == {
        "logratio.trainers.data.tasks.arithmetic.questions"
    }


@pytest.mark.slow
def test_a_model_that_calls_reads_the_answer_and_learns(calculator):
    """By the lessons of one question it calls; then three steps in the process, and the same from a server."""
    (lesson,) = calculator.lessons(1)
    Path("calls.jsonl").write_text((json.dumps(lesson) + "\n") * 8)
    taught = (
        "train sft --dataset_name calls.jsonl --learning_rate 3e-3 --batch_size 8 --max_steps 40 --output_dir taught"
    )
    assert cli.main(taught.split()) == 0
    Path("rows.jsonl").write_text((json.dumps({"prompt": lesson["prompt"], "answer": "103"}) + "\n") * 4)
    words = "train grpo --model_name_or_path taught --dataset_name rows.jsonl --rollout_func calculator_tool:rollout"
    words += " --reward_funcs exact_answer calculator_tool:few_calls --reward_weights 1 0.1 --batch_size 2 --lora_r 2"
    words += " --num_generations 4 --max_completion_length 40 --learning_rate 1e-3 --max_steps 3 --temperature 1.2"
    assert cli.main([*words.split(), "--output_dir", "here"]) == 0
    rows, made = completions("here"), lesson["completion"].partition("\n")[0]
    called = [row for row in rows if row["completion"].startswith(made)]
    assert called, [row["completion"] for row in rows]
    tool = len(made.partition("</calc>")[2])
    lengths = {row["completion_length"] for row in rows if row["completion"] == lesson["completion"]}
    assert lengths == {len(lesson["completion"]) - tool + 1}, "with its end, without what the tool answered"
    server = SmallServer(AutoModelForCausalLM.from_pretrained("taught"), tiny_tokenizer())
    try:
        at = ["--rollout_engine", "vllm", "--vllm_server_base_url", server.url]
        assert cli.main([*words.split(), *at, "--output_dir", "there"]) == 0
    finally:
        server.close()
    assert [row["completion"] for row in completions("there")] == [row["completion"] for row in rows]
    for steps in (log("here"), log("there")):
        assert any(row["grad_norm"] > 0 for row in steps) and max(row["sampling/logp_diff_max"] for row in steps) < 1e-3
