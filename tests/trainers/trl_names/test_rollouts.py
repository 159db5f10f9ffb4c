"""Judgements of what GRPO and RLOO sample, by what they make of a file."""

import pytest

from logratio.losses import GRPOLoss
from logratio.trainers.rollout.rewards import REWARDS
from logratio.trainers.trl_names import Kind, consider
from logratio.trainers.trl_names.rollouts import OWN_REWARDS

from ._judged import options, verdict

BECOMES = [
    ("grpo", {"reward_funcs": ["accuracy_reward", "a.b.c"]}, {"reward_funcs": ["accuracy_reward", "a.b:c"]}),
    ("grpo", {"reward_funcs": "my_module:reward"}, {"reward_funcs": "my_module:reward"}),
    ("grpo", {"reward_funcs": ["a/b-1.5", "a.b.c"]}, {"reward_funcs": ["a/b-1.5", "a.b:c"]}),
    ("grpo", {"reward_model_name_or_path": "a/b.c"}, {"reward_funcs": ["a/b.c"]}),
    (
        "rloo",
        {"reward_model_path": "a/b", "reward_funcs": ["accuracy_reward"]},
        {"loss_type": "rloo", "advantage_type": "rloo", "reward_funcs": ["a/b", "accuracy_reward"]},
    ),
    ("grpo", {"scale_rewards": True}, {"scale_rewards": "group"}),
    ("grpo", {"scale_rewards": False}, {"scale_rewards": "none"}),
    ("grpo", {"num_generations_eval": 4, "num_generations": 4}, {"num_generations_eval": 4, "num_generations": 4}),
    ("grpo", {"num_generations_eval": None}, {}),
    ("grpo", {"steps_per_generation": 2, "gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 4}),
    (
        "grpo",
        {"steps_per_generation": 8, "gradient_accumulation_steps": 4},
        {"steps_per_generation": 8, "gradient_accumulation_steps": 4},
    ),
    ("grpo", {"generation_batch_size": 24}, {"steps_per_generation": 3}),
    ("grpo", {"generation_batch_size": 8}, {}),
    (
        "grpo",
        {"steps_per_generation": 8, "gradient_accumulation_steps": 3, "batch_size": 2},
        {"steps_per_generation": 8, "gradient_accumulation_steps": 3, "batch_size": 2},
    ),
    ("grpo", {"steps_per_generation": 4, "gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 4}),
    (
        "grpo",
        {"generation_batch_size": 16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ),
    ("grpo", {"use_vllm": False, "vllm_mode": "server", "vllm_server_base_url": "http://a"}, {}),
    ("grpo", {"use_vllm": True, "vllm_server_base_url": "http://a"}, {"rollout_engine": "in_process"}),
    (
        "grpo",
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_tensor_parallel_size": 2},
        {"rollout_engine": "in_process"},
    ),
    (
        "grpo",
        {"use_vllm": True, "vllm_mode": "server"},
        {"rollout_engine": "vllm", "vllm_server_base_url": "http://0.0.0.0:8000"},
    ),
    (
        "grpo",
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "gpu", "vllm_server_port": 81},
        {"rollout_engine": "vllm", "vllm_server_base_url": "http://gpu:81"},
    ),
    (
        "grpo",
        {
            **{"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://a:1", "vllm_server_port": 81},
            **{"vllm_server_timeout": 9, "vllm_gpu_memory_utilization": 0.5},
        },
        {"rollout_engine": "vllm", "vllm_server_base_url": "http://a:1", "vllm_server_timeout": 9},
    ),
    (
        "grpo",
        {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2},
        {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2},
    ),
    ("grpo", {"top_k": -1, "min_p": None}, {}),
    ("grpo", {"log_completions": False, "num_completions_to_print": 4}, {"log_completions": False}),
]


@pytest.mark.parametrize(("method", "given", "expected"), BECOMES, ids=str)
def test_what_a_file_becomes(method, given, expected):
    assert options(method, **given) == expected


def test_the_names_of_rewards_are_those_that_there_are():
    assert set(OWN_REWARDS) == REWARDS.keys()


def test_rewards_of_trls_scripts_are_the_installed_trls(monkeypatch):
    pytest.importorskip("trl")
    from logratio.trainers.rollout.rewards import load_reward

    (name,) = options("grpo", reward_funcs=["think_format_reward"])["reward_funcs"]
    completions = [[{"content": "<think>a</think>b"}], [{"content": "b"}]]
    assert name == "trl.rewards:think_format_reward" and load_reward(name)(completions) == [1.0, 0.0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (refused,) = consider("grpo", {"reward_funcs": ["think_format_reward"]}).refused
    assert refused.reason == (
        "think_format_reward is TRL's, which is not installed; pip install trl, or name one of your own"
    )


VLLM = "vllm_importance_sampling_{}".format


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({VLLM("mode"): "token_truncate"}, {"sampling_correction": "token_truncate"}),
        ({VLLM("correction"): True}, {"sampling_correction": "sequence_mask"}),
        ({VLLM("correction"): False, VLLM("mode"): "token_mask"}, {"sampling_correction": "none"}),
        ({VLLM("clip_max"): 2}, {"sampling_correction": "sequence_mask", "sampling_clip_max": 2}),
        (
            {VLLM("mode"): "token_mask", VLLM("cap"): "1e1", VLLM("clip_min"): 0.5},
            {"sampling_correction": "token_mask", "sampling_clip_max": 10.0, "sampling_clip_min": 0.5},
        ),
        ({}, {}),
    ],
    ids=str,
)
def test_corrections_for_what_vllm_sampled(given, expected):
    """Here of any engine; without vLLM TRL has none."""
    became = consider("grpo", {"use_vllm": True, **given}).options
    assert {name: value for name, value in became.items() if name.startswith("sampling_")} == expected
    GRPOLoss(**expected)
    without = consider("grpo", given)
    assert without.options == {} and {v.kind for v in without.verdicts} <= {Kind.NO_EFFECT}


def test_what_trl_corrects_by_default_is_said():
    def absent(**given):
        return {v.key: v.reason for v in consider("grpo", given).absent}.get(VLLM("mode"))

    assert absent(use_vllm=True) == ("TRL's default is sequence_mask, at 3, here none: nothing is corrected for")
    assert absent() is None and absent(use_vllm=True, **{VLLM("correction"): False}) is None
    (refused,) = (v for v in consider("grpo", {"use_vllm": True, VLLM("mode"): "tis"}).refused if v.key != "use_vllm")
    assert refused.reason.startswith("tis is unknown; must be one of none, token_truncate, ")
    assert verdict(VLLM("clip_min"), "grpo", **{VLLM("clip_min"): 0.5}).reason == "read only with use_vllm: true"
