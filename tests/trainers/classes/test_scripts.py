"""A widely used guide's five settings as scripts for TRL, of which the import alone is another, with stand-in data of
the same columns and a small model in the place of the Hub's."""

import json
import runpy
from pathlib import Path

import datasets
import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

SCRIPTS = Path(__file__).parent / "scripts"
PLAIN = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
TEMPLATE = PLAIN + "{% if add_generation_prompt %}a:{% endif %}"


def say(role, text):
    return {"role": role, "content": text}


def pair(n):
    first = say("user", f"{n}+{n}=")
    return {
        "chosen": [first, say("assistant", str(2 * n))],
        "rejected": [first, say("assistant", str(2 * n + 1))],
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    }


STAND_INS = {
    "trl-lib/Capybara": [
        {"messages": [say("user", f"{n}+1="), say("assistant", str(n + 1))], "source": "made up", "num_turns": 1}
        for n in range(10)
    ],
    "trl-lib/ultrafeedback_binarized": [pair(n) for n in range(10)],
    "trl-lib/DeepMath-103K": [{"prompt": [say("user", f"{n}+2=")], "solution": f"${n + 2}$"} for n in range(2)],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """In the working directory, folders that are called as the Hub's models; the Hub's data sets by their names."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2-0.5B-Instruct"):
        tiny_model(0).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(STAND_INS[name]))
    return tmp_path


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["sft", "kto", "orpo"])
def test_a_script_trains_the_whole_model(method, hub, capsys):
    """Steps of 2 x 4 rows over one epoch, from the model by its name; what has another form here is said."""
    runpy.run_path(str(SCRIPTS / f"{method}.py"), run_name="__main__")
    folder = hub / f"{method}_output"
    assert len(log_of(folder)) == 2 and log_of(folder)[0]["learning_rate"] == {"sft": 2e-5}.get(method, 5e-5)
    options = json.loads((folder / "run_config.json").read_text())
    assert options["train"]["batch_size"] == 8 and options["data"]["max_length"] == 1024
    assert options["model"]["gradient_checkpointing"] and options["save"]["save_steps"] == 500
    said = capsys.readouterr().out
    assert "without effect: fp16: true (autocast to float16 needs a GPU, and there is none: without autocast)" in said
    assert ("translated: max_seq_length: 1024 -> max_length: 1024" in said) == (method == "sft")
    assert ("without effect: max_prompt_length: 512" in said) == (method != "sft")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE and model.num_parameters() > 10**5


def test_the_script_with_adapters_trains_them_as_peft_makes_them(hub):
    """Where no modules are named, PEFT's choice for the architecture; dropout 0.05; the reference is the base."""
    runpy.run_path(str(SCRIPTS / "dpo.py"), run_name="__main__")
    folder = hub / "dpo_output"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (16, 32, 0.05, "none")
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    assert config["base_model_name_or_path"] == "Qwen/Qwen2.5-0.5B"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert {name.rsplit(".", 3)[-3] for name in file.keys()} == {"q_proj", "v_proj"}
    rows = log_of(folder)
    assert len(rows) == 2 and rows[0]["loss"] == pytest.approx(0.693147, abs=5e-2)


def run_shorter(hub):
    """The GRPO script with 12 tokens in the place of 512."""
    (hub / "grpo.py").write_text((SCRIPTS / "grpo.py").read_text().replace("=512", "=12"))
    runpy.run_path(str(hub / "grpo.py"), run_name="__main__")


def test_the_script_with_rewards_of_text_says_what_they_are_given(hub):
    """On messages: TRL 1.16 ends in re.search, and its users read `completion[0]["content"]`."""
    with pytest.raises(UserError) as told:
        run_shorter(hub)
    said = str(told.value)
    assert said.startswith("step 1: the reward 'format_reward' raised TypeError: expected string or bytes-like object")
    assert said.endswith('each a list of messages, whose text is completion[0]["content"]')
    assert len(said.splitlines()) == 1 and not (hub / "grpo_output" / "model.safetensors").exists()


def test_the_script_with_rewards_trains_on_prompts_of_text(hub, monkeypatch):
    rows = [{"prompt": row["prompt"][0]["content"]} for row in STAND_INS["trl-lib/DeepMath-103K"]]
    monkeypatch.setitem(STAND_INS, "trl-lib/DeepMath-103K", rows)
    run_shorter(hub)
    rows = log_of(hub / "grpo_output")
    assert (
        len(rows) == 2
        and rows[0]["rewards/format_reward/mean"] == 0
        and 0.9 < rows[0]["rewards/length_reward/mean"] <= 1
    )
