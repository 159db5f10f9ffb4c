"""Options of what GRPO and RLOO sample."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

from ..ground.plugins import names_a_model
from .rules import rule
from .verdicts import Asked, Verdict, number

OWN_REWARDS = ("accuracy_reward", "exact_answer", "answer_format", "overlong")
TRL_REWARDS = ("think_format_reward", "reasoning_accuracy_reward")
"""Names that TRL's scripts know beside accuracy_reward, and take from trl.rewards."""
PER_DEVICE = 8  # TRL's default of per_device_train_batch_size


@rule("reward_funcs")
def rewards(a: Asked) -> Verdict:
    """accuracy_reward is ours; think_format_reward and reasoning_accuracy_reward are the installed TRL's; a dotted path
    becomes module:function; a folder, or a name with a slash, is a reward model's, as here."""
    given = [a.value] if isinstance(a.value, str) else list(a.value)
    if not all(isinstance(name, str) for name in given):
        return a.refused("must name functions: module:function")
    if "get_soft_overlong_punishment" in given:
        return a.refused("take overlong, the same with a fifth of max_completion_length as its cache")
    wanting = [name for name in given if name in TRL_REWARDS]
    if wanting and importlib.util.find_spec("trl") is None:
        return a.refused(f"{wanting[0]} is TRL's, which is not installed; pip install trl, or name one of your own")
    became = [reward_named(name) for name in given]
    unknown = [name for name in became if ":" not in name and name not in OWN_REWARDS and not names_a_model(name)]
    if unknown:
        return a.refused(
            f"{unknown[0]} is unknown; name module:function, a reward model, or one of {', '.join(OWN_REWARDS)}"
        )
    became = [*of_model(a), *became]
    return a.taken() if became == given else a.translated(reward_funcs=became)


@rule("reward_model_name_or_path")
def by_model(a: Asked) -> Verdict:
    """The first of reward_funcs."""
    if a.says("reward_funcs") is not None:
        return a.no_effect("it has become the first of reward_funcs")
    return a.translated(reward_funcs=of_model(a))


def of_model(a: Asked) -> list[str]:
    """The reward model that TRL's script names by itself."""
    return [str(name)] if (name := a.says("reward_model_name_or_path")) else []


def reward_named(name: str) -> str:
    """As our command line has it."""
    if names_a_model(name):
        return name
    if name in TRL_REWARDS:
        return f"trl.rewards:{name}"
    module, _, function = name.rpartition(".")
    return f"{module}:{function}" if module and ":" not in name else name


@rule("scale_rewards")
def scaled(a: Asked) -> Verdict:
    """group, batch and none as here; true: group; false: none."""
    if isinstance(a.value, bool):
        return a.translated(scale_rewards="group" if a.value else "none")
    return a.taken()


@rule("top_k", "min_p", "repetition_penalty")
def cut(a: Asked) -> Verdict:
    """As here; null, and -1 of top_k, is the default, which leaves the distribution whole."""
    if a.value is None or (a.key == "top_k" and a.value == -1):
        return a.no_effect("nothing is cut off or penalized by default")
    return a.taken()


@rule("steps_per_generation")
def generated(a: Asked) -> Verdict:
    """As here, in micro-steps: a multiple of gradient_accumulation_steps is so many optimizer steps; as many (TRL's
    default), or a part that they are a multiple of, is one."""
    if a.says("generation_batch_size"):
        return a.refused("generation_batch_size says it too; leave one out, as TRL asks for")
    return micro_steps(a, a.number(), a.taken) if not a.ours else a.taken()


@rule("generation_batch_size")
def generation(a: Asked) -> Verdict:
    """steps_per_generation: this / (per_device_train_batch_size x processes)."""
    device = int(number(a.says("per_device_train_batch_size", PER_DEVICE))) * int(os.environ.get("WORLD_SIZE", "1"))
    if a.number() % device:
        return a.refused(f"must be a multiple of per_device_train_batch_size x processes, {device}, in TRL too")
    count = int(a.number()) // device
    return micro_steps(a, count, lambda reason: a.translated(reason, steps_per_generation=count))


def micro_steps(a: Asked, count: float, taken: Callable[[str], Verdict]) -> Verdict:
    """On so many of them a generation. taken: what is said where they are several optimizer steps."""
    step = int(number(a.says("gradient_accumulation_steps", 1)))
    if count > step and count % step == 0:
        return taken(f"{int(count // step)} optimizer steps, each with whole groups")
    if count < 1 or step % count:
        return a.refused(f"no whole number of steps; make it a multiple of gradient_accumulation_steps, {step}")
    if count < step and number(a.says("num_iterations", 1)) > 1:
        return a.refused("with num_iterations TRL learns twice from a part of a step; leave it out")
    return a.no_effect("every optimizer step samples for itself")


VLLM_PLACE = "http://0.0.0.0:8000"
"""Where TRL looks for a vLLM server by itself."""
UNREAD = "read only with use_vllm: true and vllm_mode: server"


def uses_vllm(a: Asked) -> bool:
    """Whether a server of vLLM's samples."""
    server = a.says("use_vllm") and a.says("vllm_mode", "colocate") == "server"
    return bool(server) or a.says("rollout_engine") == "vllm"


@rule("use_vllm")
def vllm(a: Asked) -> Verdict:
    """true with vllm_mode server: rollout_engine vllm, at vllm_server_base_url; within the trainer (vllm_mode colocate,
    TRL's default) our own engine samples."""
    if not a.value:
        return a.no_effect("as in any case")
    if a.says("vllm_mode", "colocate") != "server":
        return a.translated(
            "within the trainer our own engine samples; vLLM does as a server: vllm_mode: server with "
            "vllm_server_base_url",
            rollout_engine="in_process",
        )
    host, port = a.says("vllm_server_host"), a.says("vllm_server_port")
    place = VLLM_PLACE if host is None and port is None else f"http://{host or '0.0.0.0'}:{port or 8000}"
    place = str(a.says("vllm_server_base_url", place))
    return a.translated(rollout_engine="vllm", vllm_server_base_url=place)


@rule("vllm_mode", "vllm_server_host", "vllm_server_port")
def of_vllm(a: Asked) -> Verdict:
    """Where use_vllm looks."""
    return a.no_effect("use_vllm has become what it says" if uses_vllm(a) else UNREAD)


@rule("vllm_server_base_url", "vllm_server_timeout")
def place_of_vllm(a: Asked) -> Verdict:
    """As here, with use_vllm: true and vllm_mode: server."""
    return a.taken() if uses_vllm(a) else a.no_effect(UNREAD)
