"""What is done with a trained model: eval, merge, chat and push."""

import io
import json
import math
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import RepoUrl
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from logratio.trainers import cli
from logratio.trainers.after import chat
from logratio.trainers.after.trained import base_of, load_trained
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of an adapter, of one on nf4 weights, and of a whole model, trained on few rows until it shows."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ways = {"lora": ["--lora_r", "4"], "qlora": ["--lora_r", "4", "--load_in_4bit", "--save_steps", "12"], "full": []}
    for name, way in ways.items():
        words = ["train", "sft", "--dataset_name", str(folder / "rows.jsonl"), "--max_steps", "12", *way]
        assert cli.main([*words, "--learning_rate", "1e-2", "--output_dir", str(folder / name)]) == 0
    return folder


def run(capsys, *words, status=0):
    capsys.readouterr()
    assert cli.main(list(map(str, words))) == status
    out = capsys.readouterr()
    return out.err.strip() if status else out.out


@pytest.mark.parametrize("name", ["lora", "full"])
def test_perplexity_is_that_of_transformers(name, runs, capsys):
    """By hand: the mean of -log p over the completions' tokens and their ends."""
    answer = json.loads(run(capsys, "eval", runs / name, "--dataset_name", runs / "rows.jsonl", "--json"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(runs / name), AutoTokenizer.from_pretrained(runs / name)
    total, count = 0.0, 0
    for row in map(json.loads, (runs / "rows.jsonl").read_text().splitlines()):
        prompt = tokenizer(row["prompt"]).input_ids
        completion = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        logps = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(logps.gather(-1, torch.tensor(completion)[:, None]).sum())
        count += len(completion)
    assert answer["rows"] == 8 and answer["scored_tokens"] == count
    assert answer["nll"] == pytest.approx(total / count, rel=1e-4)
    assert answer["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_preferences_are_counted(runs, tmp_path, capsys):
    right = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "x" * 9} for n in range(3)]
    wrong = [{"prompt": f"{n}+1=", "chosen": "x" * 9, "rejected": str(n + 1)} for n in range(1)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in right + wrong))
    answer = json.loads(run(capsys, "eval", runs / "full", "--dataset_name", tmp_path / "pairs.jsonl", "--json"))
    assert answer["accuracy_of_sums"] == answer["accuracy_of_means"] == 0.75
    assert answer["logps/chosen"] > answer["logps/rejected"]


def test_a_run_is_evaluated_on_what_it_was_evaluated_on(runs, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for split, count in {"train": 2, "valid": 3, "test": 5}.items():
        rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "sft", "--max_steps", "1", "--lora_r", "2", "--output_dir"]
    held = ["--dataset_name", tmp_path / "data", "--dataset_test_split", "valid"]
    run(capsys, *train, tmp_path / "out", *held)
    assert json.loads(run(capsys, "eval", tmp_path / "out", "--json"))["rows"] == 3
    assert json.loads(run(capsys, "eval", tmp_path / "out", "--dataset_test_split", "test", "--json"))["rows"] == 5
    run(capsys, *train, tmp_path / "embedded")
    said = json.loads(run(capsys, "eval", tmp_path / "embedded", "--max_rows", "2", "--json"))
    assert (said["rows"], said["data"]) == (2, "arithmetic: 2 examples")
    assert run(capsys, "eval", runs / "lora", status=1) == (
        f"logratio: {runs / 'lora'} was trained on {runs / 'rows.jsonl'} and has no split of it to evaluate on: name "
        "rows (--dataset_name), or a split (--dataset_test_split)"
    )
    run(capsys, *train, tmp_path / "several", "--dataset_name", "arithmetic", "shopping")
    assert "was trained on several data sets: name one " in run(capsys, "eval", tmp_path / "several", status=1)
    assert "is not a run, whose data would be known" in run(capsys, "eval", tmp_path, status=1)
    (tmp_path / "run_config.json").write_text("[1]")
    assert "run_config.json names no data set (" in run(capsys, "eval", tmp_path, status=1)


def test_rewards_of_what_is_sampled(runs, tmp_path, capsys):
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", runs / "full", "--dataset_name", tmp_path / "prompts.jsonl", "--reward_funcs", "exact_answer"]
    words += ["--max_completion_length", "6", "--temperature", "0.05", "--json"]
    answer = json.loads(run(capsys, *words))
    assert answer["prompts"] == 4 and answer["completions"] == 16
    assert 0 < answer["rewards/exact_answer/mean"] <= answer["rewards/exact_answer/best_of_4"] <= 1
    assert answer["rewards/exact_answer/mean@4"] == pytest.approx(answer["rewards/exact_answer/pass@1"])
    assert answer["rewards/exact_answer/pass@4"] == pytest.approx(answer["rewards/exact_answer/best_of_4"])
    bounds = [answer[f"rewards/exact_answer/mean@4_{end}"] for end in ("low", "high")]
    assert 0 < bounds[0] < answer["rewards/exact_answer/mean"] <= bounds[1] <= 1
    assert answer == json.loads(run(capsys, *words)), "seeded"
    first, *table = run(capsys, *words[:-1]).splitlines()
    assert first == f"{runs / 'full'} on {tmp_path / 'prompts.jsonl'}: 4 examples", "on one line"
    assert any("rewards/exact_answer/mean" in line for line in table)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_merged_model_is_the_base_with_the_adapter(name, runs, tmp_path, capsys):
    """In float32 to rounding, on what nf4 weights stand for; W + (alpha / r) B A of a layer by hand."""
    said = run(capsys, "merge", runs / name, "--output_dir", tmp_path / "merged")
    answer = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert answer["largest_difference"] < 1e-3 * answer["mean_effect"] + 1e-5 and answer["mean_effect"] > 0.1
    assert f"over {answer['tokens']} tokens the log-probabilities differ by" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    trained, _ = load_trained(str(runs / name), "float32", CPU, dequantize=name == "qlora")
    layer = trained.get_base_model().model.layers[0].mlp.up_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    got = merged.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(got, layer.base_layer.weight + product, rtol=1e-5, atol=1e-6)
    assert run(capsys, "merge", runs / name, tmp_path / "merged", status=1).endswith(
        "merged is there and not empty; name another"
    )


def test_an_adapter_on_a_tied_embedding_leaves_the_head_as_it_was(tmp_path, capsys):
    """W + B A is what tokens are looked up in, and W stays what the hidden states are multiplied with."""
    tiny_model(1, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of the tie
        lora = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = get_peft_model(base, lora)
        adapted.save_pretrained(tmp_path / "adapter")
        run(capsys, "merge", tmp_path / "adapter", tmp_path / "merged")
    ids = torch.arange(40, 60)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    wanted = adapted.get_base_model().get_output_embeddings().weight
    assert torch.equal(merged.get_output_embeddings().weight, wanted)
    assert not torch.equal(merged.get_input_embeddings().weight, wanted)


def test_what_cannot_be_merged_is_said_and_leaves_nothing(tmp_path, runs, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shared tensors\n in detail")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", broken)
    said = run(capsys, "merge", runs / "lora", tmp_path / "merged", status=1)
    assert said == f"logratio: {runs / 'lora'} could not be merged: RuntimeError: shared tensors"
    assert not list(tmp_path.iterdir())


def test_in_16_bits_the_difference_is_said(runs, tmp_path, capsys):
    run(capsys, "merge", runs / "lora", tmp_path / "merged", "--dtype", "bfloat16")
    answer = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert 1e-4 < answer["mean_difference"] < answer["mean_effect"]


def test_there_must_be_an_adapter(runs, tmp_path, capsys):
    for folders in ([], ["one", "--output_dir", "other"]):
        assert run(capsys, "merge", runs / "lora", *folders, status=1) == (
            f"logratio: name one folder for the merged model: logratio merge {runs / 'lora'} FOLDER"
        )
    said = run(capsys, "merge", runs / "full", "--output_dir", tmp_path / "out", status=1)
    assert said == f"logratio: {runs / 'full'} holds no adapter (adapter_config.json), so there is nothing to merge"
    assert not (tmp_path / "out").exists()


def test_what_an_adapter_was_trained_on_is_not_guessed(tmp_path, capsys):
    """On other weights it is another model, and a figure of it or a merged one would be of neither."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    for broken in ("", "[1]", '{"model": {"load_in'):
        (tmp_path / "run_config.json").write_text(broken)
        for words in (["eval", "--dataset_name", "arithmetic"], ["chat"], ["merge", "--output_dir", tmp_path / "out"]):
            said = run(capsys, words[0], tmp_path, *words[1:], status=1)
            assert said.startswith(
                f"logratio: {tmp_path / 'run_config.json'} cannot be read, which says on which weights"
            )
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "adapter_config.json cannot be read: " in run(capsys, "chat", tmp_path, status=1)


def test_a_checkpoint_is_on_the_weights_of_its_run(runs, capsys):
    """Quantized ones: on others its figures would be nobody's."""
    words = ["--dataset_name", runs / "rows.jsonl", "--json"]
    of_run, of_last = (
        json.loads(run(capsys, "eval", folder, *words)) for folder in (runs / "qlora", runs / "qlora" / "checkpoint-12")
    )
    assert of_last == of_run
    (runs / "qlora" / "checkpoint-13").mkdir()
    (runs / "qlora" / "checkpoint-13" / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    (runs / "qlora" / "checkpoint-13" / "trainer_state.json").write_text("{")
    said = run(capsys, "chat", runs / "qlora" / "checkpoint-13", status=1)
    assert "trainer_state.json cannot be read, which says on which weights" in said


def test_a_run_that_has_been_moved_has_its_own_base(runs, tmp_path, capsys):
    """Not what has come to lie in its old place; of another model, the file that names it is said."""
    shutil.copytree(runs / "lora", tmp_path / "moved")
    assert base_of(str(runs / "lora")) == str(runs / "lora" / "base_model")
    assert base_of(str(tmp_path / "moved")) == str(tmp_path / "moved" / "base_model")
    shutil.copytree(runs / "lora", tmp_path / "moved" / "checkpoint-1", ignore=lambda *_: ["base_model"])
    assert base_of(str(tmp_path / "moved" / "checkpoint-1")) == str(tmp_path / "moved" / "base_model")
    settings = tmp_path / "moved" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "/gone/away"}))
    assert run(capsys, "chat", tmp_path / "moved", status=1).startswith(
        f"logratio: {tmp_path / 'moved'}: the base model that its adapter_config.json names (base_model_name_or_path): "
        "the model /gone/away does not exist"
    )
    assert run(capsys, "chat", "/gone/away", status=1).startswith("logratio: the model /gone/away does not exist")


def likeliest(folder, said, tokens=4):
    """What the model goes on with, a token at a time. said: text, or messages."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if not isinstance(said, str):
        said = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    begun = ids = tokenizer(said).input_ids
    while len(ids) < len(begun) + tokens and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return tokenizer.decode(ids[len(begun) :], skip_special_tokens=True)


def test_a_model_answers(runs, capsys, monkeypatch):
    """In a conversation, which ends with the input; an empty line asks nothing."""
    words = ["chat", runs / "full", "--temperature", "0", "--max_new_tokens", "4"]
    messages, wanted = [], []
    for text in ("3+1=", "5+1="):
        messages.append({"role": "user", "content": text})
        wanted.append(likeliest(runs / "full", messages))
        messages.append({"role": "assistant", "content": wanted[-1]})
    assert all(wanted) and run(capsys, *words, "--prompt", "3+1=").strip() == wanted[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("3+1=\n\n5+1=\n"))
    assert run(capsys, *words).split() == wanted


def test_a_model_without_a_template_goes_on_with_text(runs):
    model, tokenizer = load_trained(str(runs / "full"), "float32", CPU)
    tokenizer.chat_template = None
    options = chat.Options(model="m", temperature=0, max_new_tokens=4)
    assert chat.answer(options, model, tokenizer, [], "3+1=") == likeliest(runs / "full", "3+1=")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder of a model that has learned 12 positions, without a chat template."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=12, **ids)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    return folder


def test_a_chat_that_cannot_be_held_ends_in_a_sentence(gpt2, capsys):
    said = run(capsys, "chat", gpt2, "--prompt", "hi", "--system", "Be kind.", status=1)
    assert said.endswith("has no chat template, which it would be a part of: begin the text with it")
    said = run(capsys, "chat", gpt2, "--prompt", "x" * 20, status=1)
    assert said.endswith("has learned 12 positions, the answer's among them: begin a shorter one")
    run(capsys, "chat", gpt2, "--prompt", "x" * 8, "--max_new_tokens", "99")  # ends at the last position
    model, tokenizer = load_trained(str(gpt2), "float32", CPU)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")  # no token in front
    with pytest.raises(UserError, match="no chat template, so give it some text$"):
        chat.answer(chat.Options(model="m"), model, tokenizer, [], "")
    for template, wrong in {
        "{{ raise_exception('no system') }}": "the chat template does not render this conversation: no system",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "message 0: its 'content' is not in",
    }.items():
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=f"^the conversation.*{wrong}"):
            chat.answer(chat.Options(model="m"), model, tokenizer, [{"role": "system", "content": "Be kind."}], "hi")


def test_bytes_that_are_no_text_are_taken_as_such(runs, capsys, monkeypatch):
    words = ["chat", runs / "full", "--temperature", "0", "--max_new_tokens", "4"]
    wanted = run(capsys, *words, "--prompt", "3+\ufffd1=")
    assert run(capsys, *words, "--prompt", "3+\udcff1=") == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"3+\xff1=\n"), "utf-8"))
    assert run(capsys, *words) == wanted


def test_evaluations_are_held_to_the_models_tables(gpt2, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "completion": "2", "answer": "2"}\n' * 2)
    (tmp_path / "long.jsonl").write_text('{"prompt": "1+1=", "completion": "22222222222222"}\n')
    words = ["--dataset_name", tmp_path / "rows.jsonl", "--reward_funcs", "exact_answer", "--max_completion_length"]
    run(capsys, "eval", gpt2, *words, "7")
    assert run(capsys, "eval", gpt2, *words, "50", status=1).endswith(
        f"more than the 12 positions that '{gpt2}' has learned; lower --max_length or --max_completion_length"
    )
    said = run(capsys, "eval", gpt2, "--dataset_name", tmp_path / "long.jsonl", status=1)
    assert said.endswith(f"more than the 12 positions that '{gpt2}' has learned; lower --max_length")


def test_messages_go_through_the_template(runs, capsys, monkeypatch):
    model, tokenizer = load_trained(str(runs / "full"), "float32", CPU)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    options, messages = chat.Options(model="m", temperature=0, max_new_tokens=4), [{"role": "system", "content": "3"}]
    wanted = likeliest(runs / "full", "3+1=")
    assert chat.answer(options, model, tokenizer, messages, "+1=") == wanted
    assert [m["content"] for m in messages] == ["3", "+1=", wanted]


def test_what_is_pushed(runs, capsys, monkeypatch):
    asked = []

    class Api:
        def create_repo(self, name, **options):
            asked.append((name, options))
            return RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, **options):
            asked.append(options)
            if "gone" in options["repo_id"]:
                raise OSError("no such place")
            return "https://example.org/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert run(capsys, "push", runs / "lora", "me/mine", "--private") == "pushed to https://example.org/commit\n"
    assert asked[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert asked[1]["folder_path"] == runs / "lora"
    more = ["checkpoint-4/model.safetensors", "completions.parquet/step-1.parquet", "skipped_rows.1.jsonl", ".lock"]
    more += ["notes.jsonl", "report.html"]
    files = [path.name for path in (runs / "lora").iterdir() if path.is_file()] + more
    sent = set(filter_repo_objects(files, ignore_patterns=asked[1]["ignore_patterns"]))
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "run_config.json"} <= sent
    assert not sent & {*more, "metrics.jsonl"} and "metrics.jsonl" in files
    assert run(capsys, "push", runs / "lora", "me/gone", status=1).endswith("pushed to me/gone: no such place")
    assert "holds no model" in run(capsys, "push", Path(runs) / "nothing", "me/mine", status=1)
