"""The policy's adapter at the servers: written beside its place, given by a name of its own for every version.

A server that is told to load another adapter under a name it knows reads files again whenever it likes, and its prefix
cache would hold what the old one computed. So every version has a name; the one before, or as many as may still be
sampled from, stay loaded for requests that still run, and what is unloaded keeps its files for one sync more.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file

from ...checkpoints.folder import set_aside
from ...config.rollout import NEEDS_ADAPTERS
from ...errors import UserError
from ...policy.policy import Policy
from ...processes.once import on_main
from ...processes.sharding import full_weights
from .server import Refused, Server, Unavailable

GOODBYE_S = 5.0  # that a server may take to forget an adapter when the run ends
BELIEVED = 3
"""Times that a server fails to load an adapter until it is believed: it answers so where the rank is too large, too."""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""init_lora_weights of PEFT that leave the base model's weights as they are."""


def check_adapter(policy: Policy) -> None:
    """Raise UserError where the policy is no base model with a plain LoRA adapter, which is all that vLLM loads."""
    if not policy.has_adapters:
        raise UserError(NEEDS_ADAPTERS)
    config: Any = policy.model.peft_config["default"]
    kind = getattr(config.peft_type, "value", config.peft_type)
    found = {
        f"is of type {kind}": kind != "LORA",
        "trains whole modules too (modules_to_save)": getattr(config, "modules_to_save", None),
        "is DoRA (use_dora)": getattr(config, "use_dora", False),
        "trains biases (bias)": getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False),
        "has ranks of its own for some modules (rank_pattern)": getattr(config, "rank_pattern", None),
        "has scales of its own for some modules (alpha_pattern)": getattr(config, "alpha_pattern", None),
        "trains tokens (trainable_token_indices)": getattr(config, "trainable_token_indices", None),
        "is on parameters (target_parameters)": getattr(config, "target_parameters", None),
        "changed the base model's weights when it began (init_lora_weights)": (
            getattr(config, "init_lora_weights", True) not in PLAIN_STARTS
        ),
    }
    if wrong := next((what for what, is_so in found.items() if is_so), None):
        raise UserError(
            f"--rollout_engine vllm: the adapter {wrong}, which vLLM does not take: train a plain LoRA adapter "
            "(--lora_r 16), or leave the engine out"
        )


def write_adapter(policy: Policy, weights: Any, folder: Path) -> None:
    """The trained adapter as PEFT saves it, whole or not at all. weights: of a sharded policy, from `full_weights`."""
    from peft import get_peft_model_state_dict

    partial = folder.with_name(f".{folder.name}.partial")
    with set_aside(partial, f"the adapter could not be written for the vLLM servers to {folder}"):
        options: dict[str, Any] = {"adapter_name": "default", "save_embedding_layers": False}
        tensors = get_peft_model_state_dict(policy.model, state_dict=weights, **options)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        policy.model.peft_config["default"].save_pretrained(str(partial))
        shutil.rmtree(folder, ignore_errors=True)  # where an attempt before went no further
        partial.rename(folder)


def name_of(run: str, version: int) -> str:
    return f"logratio-{run}-{version}"


def version_of(name: str) -> int:
    return int(name.rpartition("-")[2])


class Adapters:
    """The versions that the servers have. folder: of this run alone, for their files; emptied first.
    behind: see `VLLM`.

    With several processes the main one writes and tells the servers, and all have what became of it.
    """

    def __init__(
        self,
        policy: Policy,
        servers: Sequence[Server],
        folder: Path,
        accelerator: Accelerator,
        *,
        behind: int = 1,
    ) -> None:
        check_adapter(policy)
        self.kept = behind + 1  # versions, with the last
        self.policy, self.servers, self.accelerator = policy, servers, accelerator
        self.folder = folder.resolve()
        self.rank = int(policy.model.peft_config["default"].r)
        self.run = secrets.token_hex(4)  # a run before may have left its adapters at the servers
        self.loaded: list[str] = []  # the last at the end
        self.name = ""  # of the last

    def push(self, version: int) -> None:
        """Let every server know the policy as it is. Called on all processes; raises UserError on all."""
        weights = full_weights(self.policy, self.accelerator)
        self.name = on_main(self.accelerator, lambda: self._push(version, weights))

    def _push(self, version: int, weights: Any) -> str:
        name = name_of(self.run, version)
        if not self.loaded:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        write_adapter(self.policy, weights, self.folder / name)
        known = [*self.loaded, name]
        gone, self.loaded = known[: -self.kept], known[-self.kept :]
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(lambda server: self.give(server, name), self.servers))
            for old in gone:
                list(pool.map(lambda server, old=old: self.take(server, old), self.servers))  # type: ignore[misc]
        for path in self.folder.iterdir():
            if path.name not in (*gone, *self.loaded):
                shutil.rmtree(path, ignore_errors=True)
        return name

    def give(self, server: Server, name: str, stop: threading.Event | None = None) -> None:
        """Load an adapter whose files are there. Raises UserError where the server does not take it."""
        path = self.folder / name
        try:
            body = {"lora_name": name, "lora_path": str(path)}
            server.ask("/v1/load_lora_adapter", body, stop=stop, failures=BELIEVED)
        except Refused as refused:
            said = refused.reason.lower()
            if "already" in said:  # the answer to an earlier attempt was lost
                return
            raise UserError(self._why(server, path, refused)) from refused
        finally:
            server.given[name] = time.monotonic()

    def _why(self, server: Server, path: Path, refused: Refused) -> str:
        begin = f"the vLLM server {server.url}"
        if refused.status in (401, 403):
            return f"{begin} wants a key ({refused}): set the variable VLLM_API_KEY to the one that it was started with"
        if refused.status in (404, 405) and refused.reason.lower() in ("not found", "method not allowed"):
            return (
                f"{begin} was started without adapters at run time: start it with the variable "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and the options --enable-lora --max-lora-rank {self.rank}"
            )
        if refused.status == 404:
            return (
                f"{begin} does not find the adapter in {path} ({refused}): --output_dir must be on a disk that the "
                "server sees under the same path"
            )
        return (
            f"{begin} does not take the adapter ({refused}): it needs the options --enable-lora --max-lora-rank "
            f"{self.rank}, and the base model that is trained"
        )

    def give_again(self, server: Server, name: str, since: float, stop: threading.Event) -> None:
        """Load an adapter that the server does not know, unless another thread has done so after `since`."""
        with server.lock:
            if server.given.get(name, -float("inf")) < since:
                self.give(server, name, stop)

    def take(self, server: Server, name: str) -> None:
        """Unload an adapter, if it is there: a server that has begun anew does not know it."""
        with contextlib.suppress(Refused, Unavailable):
            server.ask("/v1/unload_lora_adapter", {"lora_name": name}, once=GOODBYE_S)
        server.given.pop(name, None)

    def close(self) -> None:
        """Leave nothing behind, neither at the servers nor on the disk."""
        if self.accelerator.is_main_process:
            for server in self.servers:
                for name in self.loaded:
                    self.take(server, name)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.loaded = []
