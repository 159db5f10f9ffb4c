"""Our trainer, as `check_trainer` asks it: every method, one process and two, going on from a checkpoint.

`our_trainer("dpo")` is its `fn`: `logratio train` on a tiny model. Two processes are launched for each run:
`torchrun --nproc_per_node 2 -m logratio.benchmarks.peers.trainers.ours JOB`, a JSON file that says what to do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logratio.reference.trainer_laws import Trained, adamw
from logratio.trainers.ground.given import giving
from logratio.trainers.loop import train_run
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.setup import build

from .theirs import Rows, copied, gradient_of, ids_of, text_of, text_rows

EPS = 1e-3
"""AdamW's: at its default the rounding of a gradient that is 0 would move weights."""
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.2}
ROLLOUT, REWARD = "object:rollout_func:laws", "object:reward:laws"
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def our_trainer(method: str, *options: str) -> Callable[..., Trained]:
    """Our trainer of a method. options: more words of `logratio train`."""

    def fn(
        rows: Rows,
        *,
        batch_size: int,
        steps: int,
        micro_batch_size: int,
        processes: int,
        seed: int,
        learning_rate: float = 1e-3,
        stop_after: int | None = None,
    ) -> Trained:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            tiny_model(3, **SMALL).save_pretrained(folder / "model")
            tiny_tokenizer().save_pretrained(folder / "model")
            asked = text_rows(rows) if method != "grpo" else [prompt_of(row) for row in rows]
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
            words = [method, "--model_name_or_path", str(folder / "model"), "--dataset_name", f"{folder}/rows.jsonl"]
            words += ["--output_dir", f"{folder}/out", "--lora_r", "2", "--max_steps", str(steps), "--seed", str(seed)]
            words += ["--batch_size", str(batch_size), "--micro_batch_tokens", str(tokens_of(rows, micro_batch_size))]
            words += ["--learning_rate", str(learning_rate), "--lr_scheduler_type", "constant", "--max_grad_norm", "0"]
            words += ["--adam_epsilon", str(EPS), "--weight_decay", "0.1", *options]
            if method == "grpo":
                each = str(len(rows[0]["completions"]))
                words += ["--rollout_func", ROLLOUT, "--reward_funcs", REWARD, "--num_generations", each]
            if stop_after is not None:
                words += ["--save_steps", str(stop_after)]
            job = {"words": words, "rows": rows, "stop_after": stop_after, "out": str(folder / "done.pt")}
            if processes == 1:
                done = do(job)
            else:
                launch(processes, job, folder)
                done = torch.load(folder / "done.pt")
            formula = adamw(learning_rate, eps=EPS, weight_decay=0.1)
            return Trained(**done, update=formula)

    return fn


def prompt_of(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": f"{row['row']}:{text_of(row['prompt'])}"}


def tokens_of(rows: Rows, micro_batch_size: int) -> int:
    """As many as so many of the longest rows take, every completion with a prompt and an end of its own."""
    parts = ("completion", "chosen", "rejected", "reference")
    said = [[row[part] for part in parts if part in row] or row["completions"] for row in rows]
    each = [sum(len(row["prompt"]) + 3 + len(c) + 1 for c in cs) for row, cs in zip(rows, said, strict=True)]
    return micro_batch_size * max(each)


def do(job: dict[str, Any]) -> dict[str, Any]:
    """The run, or, where it is to stop, the two; what `Trained` is made of."""
    words, stop = job["words"], job["stop_after"]
    done = once(words, job["rows"], stop)
    if stop is not None:
        assert len(done["losses"]) == stop, "a run that did not stop has nothing to go on with"
        rest = once([*words, "--resume_from_checkpoint", "latest"], job["rows"], None)
        done |= {"losses": done["losses"] + rest["losses"], "end": rest["end"]}
    return done


def once(words: list[str], rows: Rows, stop: int | None) -> dict[str, Any]:
    """Silent. stop: end behind this step, with a checkpoint."""
    objects = {ROLLOUT: lambda prompts, turns: said_in(rows, prompts), REWARD: rewards_in(rows)}
    losses: list[float] = []
    gradient: dict[str, Tensor] = {}
    with giving(objects), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        run = build(parse_train(words))

        def keep(*_: Any) -> None:
            if not gradient:
                gradient.update(gradient_of(run.policy))

        run.optimizer.optimizer.register_step_pre_hook(keep)  # type: ignore[attr-defined]
        start, trained = copied(run.policy), list(gradient_of(run.policy))
        told = lambda row, saved: losses.append(row["loss"])  # noqa: E731
        train_run(run, until=lambda run, row: row["step"] == stop, told=told, quiet=True)
    return {"losses": losses, "start": start, "end": copied(run.policy), "trained": trained, "gradient": gradient}


def said_in(rows: Rows, prompts: list[str]) -> dict[str, Any]:
    """The completions that the rows have, of each prompt in turn."""
    seen: dict[str, int] = {}
    eos, ids = tiny_tokenizer().eos_token_id, []
    for prompt in prompts:
        row = row_of(rows, prompt)
        ids.append([*ids_of(row["completions"][seen.get(prompt, 0) % len(row["completions"])]), eos])
        seen[prompt] = seen.get(prompt, 0) + 1
    return {"completion_ids": ids, "logprobs": [[-1.0] * len(said) for said in ids]}  # read by nothing but a check


def rewards_in(rows: Rows) -> Callable[..., list[float]]:
    """The reward function that knows them from the rows."""

    def laws(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        found = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            row = row_of(rows, prompt)
            firsts = [ids_of(said)[0] for said in row["completions"]]  # they differ in these
            found.append(row["rewards"][firsts.index(ids[0])])
        return found

    return laws


def row_of(rows: Rows, prompt: str) -> dict[str, Any]:
    return next(row for row in rows if prompt_of(row)["prompt"] == prompt)


def launch(processes: int, job: dict[str, Any], folder: Path) -> None:
    """Let so many processes do it, which meet on the loopback interface."""
    (folder / "job.json").write_text(json.dumps(job))
    here = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", "torch.distributed.run", *here, "-m", __name__, str(folder / "job.json")]
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith("TORCHELASTIC")}
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    told = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": loopback}
    environment = {**inherited, **told, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        # what a process says comes before the launcher's account of its end
        raise RuntimeError(f"{processes} processes failed: {done.stderr[:4000]}")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    done = do(job)
    if os.environ["RANK"] == "0":
        torch.save(done, job["out"])


if __name__ == "__main__":
    main()
