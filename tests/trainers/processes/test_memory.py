"""Several processes run out of memory: they try again together, or end."""

import json

import pytest
import torch
from safetensors.torch import load_file

from logratio.benchmarks.peers import truths

from ._launch import launch

WORKER = """
import json, os, sys
import torch
from pathlib import Path
from logratio.trainers import cli
from logratio.trainers.policy.policy import Policy

rank, forward, limit, where = int(os.environ["RANK"]), Policy.forward, 10**6, "forward"
failed = 0

def check(tokens):
    global failed
    if rank == 1 and tokens > limit:
        failed += 1
        raise torch.OutOfMemoryError("CUDA out of memory")

def limited(policy, batch):
    if where == "forward":
        check(batch.input_ids.numel())
    out = forward(policy, batch)
    if where == "backward" and torch.is_grad_enabled():
        out.logps.register_hook(lambda grad: check(batch.input_ids.numel()))
    return out

Policy.forward = limited
counts = {}
for name, limit, where, words in json.loads(sys.argv[1]):
    failed = 0
    status = cli.main(words)
    counts[name] = [status, failed]
    Path(f"rank{rank}.json").write_text(json.dumps(counts))
    if status:
        sys.exit(status)
"""


def same_bits(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


CASES = [("sft", "backward"), ("dpo", "forward"), ("kto", "backward"), ("grpo", "backward")]


@pytest.mark.slow
def test_all_processes_try_again_where_one_ran_out(tmp_path):
    """In a forward pass or a backward one, the last of a step among them, whose next one is packed already."""
    (tmp_path / "worker.py").write_text(WORKER)
    shared = ["--lora_r", "2", "--lora_dropout", "0.2", "--batch_size", "8", "--max_steps", "2"]
    todo = []
    for method, where in CASES:
        rows = truths.random_rows(method, 7, 16)
        path = tmp_path / f"{method}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["train", method, *shared, "--dataset_name", str(path)]
        if method == "grpo":
            words = ["train", method, *shared, "--num_generations", "4", "--max_completion_length", "8"]
            words += ["--num_iterations", "2", "--beta", "0.1"]
        for name, limit, budget in (("found", 70, 200), ("given", 10**6, 50)):
            folder = ["--micro_batch_tokens", str(budget), "--output_dir", str(tmp_path / f"{method}-{name}")]
            todo.append((f"{method}-{name}", limit, where, [*words, *folder]))
    done = launch(2, ["worker.py", json.dumps(todo)], tmp_path, ACCELERATE_USE_CPU="true")
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for method, _ in CASES:
        assert [r[f"{method}-given"] for r in ranks] == [[0, 0], [0, 0]], done.stderr
        (status, failed), (other_status, other_failed) = (r[f"{method}-found"] for r in ranks)
        assert status == other_status == failed == 0 < other_failed <= 2
        found, given = (
            load_file(tmp_path / f"{method}-{name}" / "adapter_model.safetensors") for name in ("found", "given")
        )
        assert same_bits(found, given), method
    assert done.returncode == 0 and done.stdout.count("; 50 from here on, which changes nothing else") == len(CASES)
