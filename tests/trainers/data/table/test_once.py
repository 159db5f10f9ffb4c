"""Two processes: one tokenizes, both map the same file; an error of the one ends both. And as if on two nodes."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Counts what each process did in turn for each list of words, and what it saw.
WORKER = """
import json, os, sys, time
from pathlib import Path
import datasets
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from logratio.trainers.processes import once
from logratio.trainers.options import parse_train
from logratio.trainers.data.examples import Preparation
from logratio.trainers.data.table import making
from logratio.trainers.data.table.load import load_data
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

alone = Accelerator()
assert (alone.num_processes, alone.distributed_type) == (2, DistributedType.MULTI_CPU)
once.ASKED_AGAIN_S = 0.05
tokenized, make, seen = [], making.Preparation.made, []

def made(self, *args):
    tokenized.append(len(self.rows))
    time.sleep(0.3)  # the other is asked again a few times
    yield from make(self, *args)

Preparation.made = made
for number, words in enumerate(json.loads(sys.argv[1])):
    tokenized.clear()
    if number >= 4:  # each is the first process of a node
        PartialState().local_process_index = alone.state.local_process_index = 0
        assert alone.is_local_main_process
    if number == 5:  # and each node has a disk
        datasets.config.HF_DATASETS_CACHE = Path(f"cache{alone.process_index}")
    try:
        data = load_data(parse_train(words), tiny_tokenizer(), alone)
        row = [data.fingerprint, [e.row for e in data.train], data.notes, data.skipped, str(data.train.tables[0].about)]
    except UserError as error:
        row = str(error)
    seen.append([list(tokenized), row])
Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""
# What a launcher tells its processes: those of another launch are none of ours.
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Of each process, for good rows, the same again, and bad ones: rows it tokenized, and what it got."""
    folder = tmp_path_factory.mktemp("two")
    rows = [{"prompt": f"{i}+1=", "chosen": str(i), "rejected": "no"} for i in range(20)]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "q"}]))
    good, bad = (["dpo", "--dataset_name", str(folder / f"{name}.jsonl")] for name in ("good", "bad"))
    good2, good3 = ([*good, "--max_length", length] for length in ("50", "51"))
    skipping = [*bad, "--on_bad_row", "skip", "--dataset_num_proc", "2"]
    asked = [good, good, bad, skipping, good2, good3]
    (folder / "work.py").write_text(WORKER)
    inherited = {k: v for k, v in os.environ.items() if k not in TOLD and not k.startswith("TORCHELASTIC")}
    env = {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": LOOPBACK}
    env |= {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(folder / "cache")}
    here = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *here, "work.py", json.dumps(asked)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_one_process_tokenizes_and_both_see_the_same(seen):
    main, other = seen
    assert [tokenized for tokenized, _ in main[:3]] == [[20], [], [21]]
    assert [tokenized for tokenized, _ in other[:4]] == [[]] * 4
    assert [row for _, row in main] == [row for _, row in other]
    assert main[0][1] == main[1][1] and main[0][1][1] == list(range(20))
    assert [entry["line"] for entry in main[3][1][3]] == [21]


def test_an_error_of_the_main_process_is_raised_by_both(seen):
    assert all(
        of[2][1].endswith("bad.jsonl, line 21 lacks 'chosen', which the first row has: fill it in or remove the row")
        for of in seen
    )


def test_the_first_process_of_a_node_finds_the_table_on_a_shared_disk_and_else_makes_its_own(seen):
    main, other = ([tokenized for tokenized, _ in of[4:]] for of in seen)
    assert main == [[20], [20]] and other == [[], [20]]
