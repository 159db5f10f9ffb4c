"""A model as a reward: the numbers of the installed TRL, whatever the batch, and what is no such model."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers import LlamaForSequenceClassification as Classifier

from logratio.trainers import cli
from logratio.trainers.errors import UserError
from logratio.trainers.ground.given import giving
from logratio.trainers.policy.tiny import tiny_config, tiny_model, tiny_tokenizer
from logratio.trainers.rollout.calling.asked import Asked, RewardLog, TrainerState
from logratio.trainers.rollout.calling.calls import Calls
from logratio.trainers.rollout.reward_model import OwnReward, RewardModel, batches
from logratio.trainers.rollout.rewards import load_reward, load_rewards

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2}
PROMPTS = ["2+2=", "2+2=", "a longer prompt, of more words: ", "x"]
COMPLETIONS = ["4", "five, I think", "z" * 20, "<|im_end|>"]


def classifier(labels=1, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(tiny_config(**SMALL, num_labels=labels, **options)).float()


def conversations():
    prompts = [[{"role": "system", "content": "add"}, {"role": "user", "content": text}] for text in PROMPTS]
    return prompts, [[{"role": "assistant", "content": text}] for text in COMPLETIONS]


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "judge-1.5", classifier(), tiny_tokenizer())


def called(reward, prompts=None, completions=None):
    return reward(prompts=prompts or PROMPTS, completions=completions or COMPLETIONS, completion_ids=[], answer=[])


# Its numbers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_trl(folder, tmp_path_factory):
    """TRL's GRPOTrainer with the reward model, which asks it as it does in training."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    args = trl.GRPOConfig(
        str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none", num_generations=4
    )
    trainer = trl.GRPOTrainer(
        tiny_model(), [folder], args, Dataset.from_list([{"prompt": "x"}]), processing_class=tiny_tokenizer()
    )

    def asked(prompts, completions):
        inputs = [{"prompt": prompt} for prompt in prompts]
        return trainer._calculate_rewards(inputs, prompts, completions, [[1]] * len(prompts))[:, 0].tolist()

    return trainer, asked


def test_its_numbers_are_trls(of_trl, folder):
    trainer, theirs = of_trl
    rewards = load_rewards([folder], [])
    assert list(rewards) == trainer.reward_func_names == ["judge-1.5"]
    (reward,) = rewards.values()
    for prompts, completions in ((PROMPTS, COMPLETIONS), conversations()):
        found = called(reward, prompts, completions)
        assert found == pytest.approx(theirs(prompts, completions), abs=1e-5)
        assert len({round(score, 4) for score in found}) == 4


def test_they_do_not_depend_on_the_batch(folder):
    reward = load_reward(folder)
    whole = called(reward)
    alone = [called(reward, [p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for tokens in (1, 60, 100):
        reward.tokens = tokens
        assert called(reward) == pytest.approx(whole, abs=1e-6)
    assert alone == pytest.approx(whole, abs=1e-6)


def test_a_batch_has_as_many_tokens_as_it_may():
    assert list(batches([3, 9, 4, 1, 5], 10)) == [[1], [4, 2], [0, 3]]
    assert list(batches([3, 9, 4, 1, 5], 100)) == [[1, 4, 2, 0, 3]]
    assert list(batches([3, 9], 1)) == [[1], [0]] and list(batches([], 9)) == []


def test_padding_is_what_its_tokenizer_says_or_eos(tmp_path):
    """A pooled score is that of the last token which is none of padding: so the two must agree."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    model = classifier(pad_token_id=7)
    reward = RewardModel(model, tokenizer, "mine")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    whole = called(reward)
    assert whole == pytest.approx([called(reward, [p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])


def test_an_encoder_is_scored_too(tmp_path):
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id}
    config = BertConfig(**small, **sizes, num_labels=1)
    torch.manual_seed(0)
    reward = RewardModel(AutoModelForSequenceClassification.from_config(config).train(), tokenizer, "")
    assert reward.__name__ == "BertForSequenceClassification" and not reward.model.training
    whole = called(reward, PROMPTS[:2], COMPLETIONS[:2])
    reward.tokens = 1
    assert called(reward, PROMPTS[:2], COMPLETIONS[:2]) == pytest.approx(whole, abs=1e-6)
    with torch.no_grad():
        ids = torch.tensor([tokenizer(PROMPTS[1] + COMPLETIONS[1])["input_ids"]])
        assert whole[1] == pytest.approx(float(reward.model(input_ids=ids).logits), abs=1e-6)


def test_it_has_the_dtype_that_is_asked_for(folder):
    reward = load_reward(folder, CPU, "bfloat16")
    assert reward.model.dtype == torch.bfloat16 and not reward.model.training
    assert called(reward) == pytest.approx(called(load_reward(folder)), abs=0.1)


# What cannot be scored -----------------------------------------------------------------------------------------------


def test_what_is_longer_than_its_positions_is_refused_with_its_row(folder):
    asked = Asked(["p" * 124, "p" * 124], ["abcd", "abcde"], [[1], [1]], {}, [7, 9])
    with pytest.raises(UserError) as caught:
        Calls()({"judge": load_reward(folder)}, asked, max_completion_length=9, state=TrainerState(), log=RewardLog(2))
    assert str(caught.value) == (
        "the reward 'judge': completion 0 of row 9 of the data set, 'abcde': with its prompt it has 129 tokens, and "
        "this reward model takes up to 128: lower --max_length and --max_completion_length, or take another reward "
        "model"
    )


def test_nothing_cannot_be_scored(folder):
    with pytest.raises(UserError, match="with its prompt it has no token to score"):
        called(load_reward(folder), ["", "a"], ["", "b"])


def test_a_conversation_needs_a_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="its tokenizer has no chat template to write them with"):
        called(RewardModel(classifier(), tokenizer, "mine"), *conversations())
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(UserError, match="it: the chat template does not render this conversation: no system"):
        called(RewardModel(classifier(), tokenizer, "mine"), *conversations())


MODULE = """
import torch
from logratio.trainers.policy.tiny import tiny_config, tiny_tokenizer
from transformers import LlamaForSequenceClassification as Classifier
linear = torch.nn.Linear(2, 2)
judge = Classifier(tiny_config(hidden_size=32, num_hidden_layers=1, num_labels=1))
"""


def test_what_is_no_reward_model_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "some_models.py").write_text(MODULE)
    save(tmp_path / "three", classifier(3), tiny_tokenizer())
    save(tmp_path / "causal", tiny_model(**SMALL), tiny_tokenizer())
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    classifier().save_pretrained(tmp_path / "alone")
    messages = {
        "three": "the reward model 'three' has 3 labels, and a reward is one number: take one with a single label "
        "(num_labels=1), or write a function that makes a number of its labels",
        "causal": "'causal' is no reward model: its files have no score.weight for one label, which would be random; "
        "name a classifier with a single label, trained to score",
        "empty": "--reward_funcs empty holds no model: the folder has no config.json",
        "./file": "--reward_funcs ./file is a file; give the folder that it lies in",
        "./nowhere": f"--reward_funcs ./nowhere does not exist (looked in {tmp_path})",
        "nobody/nothing": "no reward model could be loaded from 'nobody/nothing', which is no folder here (looked in ",
        "alone": "no tokenizer could be loaded from the reward model 'alone', whose files should have one: ",
        "nothing": "the reward 'nothing' is unknown, expected one of exact_answer, accuracy_reward, answer_format, "
        "overlong, module:function, or a reward model: its folder, or its name on the Hub (OWNER/NAME)",
        "some_models:linear": "the reward Linear is no classifier of transformers: write a function of completions "
        "that calls it",
        "some_models:judge": "a reward model came from no files, so none says which tokenizer it has: "
        "reward_processing_classes=",
        "torch.nn:Linear": "reward='torch.nn:Linear' is a class of models: name a model, or write a function that "
        "calls it",
    }
    for name, message in messages.items():
        with pytest.raises(UserError) as caught:
            load_reward(name)
        assert str(caught.value).startswith(message), name
    sys.modules.pop("some_models")


def test_an_object_is_a_reward_with_its_own_tokenizer_or_that_of_its_files(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    expected = called(load_reward(folder))
    for own in (OwnReward(model), OwnReward(model, tiny_tokenizer()), OwnReward(folder, tiny_tokenizer()), model):
        with giving({"object:reward0:judge": own}):
            assert list(load_rewards(["object:reward0:judge"], [])) == ["judge-1.5"]
            assert called(load_reward("object:reward0:judge")) == expected


# In a run ------------------------------------------------------------------------------------------------------------


def test_a_run_is_rewarded_by_it(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "train grpo --dataset_name rows.jsonl --max_steps 2 --batch_size 2 --num_generations 2 --lora_r 2"
    words += f" --max_completion_length 4 --output_dir out --reward_timeout 60 --reward_funcs {folder} overlong"
    assert cli.main(words.split()) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and {"rewards/judge-1.5/mean", "rewards/overlong/mean"} <= lines[0].keys()


def test_what_hangs_ends_a_run_with_the_step_before_it_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "hanging.py").write_text(
        "import time\ndef never(completions, trainer_state, **_):\n    time.sleep(30 * trainer_state.global_step)\n"
        "    return [0.0 for _ in completions]\n"
    )
    words = "train grpo --max_steps 3 --batch_size 2 --num_generations 2 --max_completion_length 4 --lora_r 2"
    assert (
        cli.main([*words.split(), *"--output_dir out --reward_funcs hanging:never --reward_timeout 0.5".split()]) == 1
    )
    said = capsys.readouterr().err
    assert "logratio: step 2: the reward 'never' has not answered within 0.5 s (--reward_timeout)" in said
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint-1"]
    sys.modules.pop("hanging")
