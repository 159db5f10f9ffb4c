"""Two and three processes under DeepSpeed's ZeRO-2 train as one does; where DeepSpeed is installed."""

import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from logratio.trainers.errors import UserError
from logratio.trainers.processes.sharding import wrap

from . import _worker
from ._compared import assert_alike, assert_equal, jobs_of
from ._jobs import words_for
from ._launch import differences, log_of, said_by, work
from .test_equal import LONG, STORED, SYNC

ZERO2 = {
    "sft": ("sft", "full", "--gradient_checkpointing"),
    "dpo-full": ("dpo", "full", *STORED, "--weight_decay", "0.1", "--save_steps", "2"),
    "kto": ("kto", "lora", *SYNC, "--max_grad_norm", "0"),
    "tpo": ("tpo", "qlora"),
    "grpo": ("grpo", "lora", "--num_iterations", "2", "--reward_kl_coef", "0.1", "--save_steps", "3"),
}
GO_ON = {"dpo-full": "checkpoint-2", "grpo": "checkpoint-3"}
ROUGH = ("dpo", "full", "--mixed_precision", "bf16")
installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def zero_work(world, jobs, folder):
    """accelerate takes DeepSpeed for DDP where it is told to use CPUs."""
    asked = {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    done = work(world, jobs, folder, **asked)
    assert done.returncode == 0, done.stderr
    assert "sharded over" in done.stdout and "(DeepSpeed ZeRO-2)" in done.stdout
    return said_by(done, world, folder)


def words_to_go_on(name, folder, output):
    words = words_for(*ZERO2[name][:2], folder, output, *ZERO2[name][2:])
    return [*words, "--resume_from_checkpoint", str(folder / "zero22" / name / "out" / GO_ON[name])]


@pytest.fixture(scope="module")
def two(folder):
    jobs = jobs_of(ZERO2, folder, "zero2", 2)
    jobs += [
        {"words": words_to_go_on(name, folder, folder / "again" / name / "out"), "kind": "zero2"} for name in GO_ON
    ]
    jobs += [{"words": words_for(*ROUGH[:2], folder, folder / "rough" / "out", *ROUGH[2:]), "kind": "zero2"}]
    jobs += [{"words": words_for("dpo", "full", folder, folder / "spoilt"), "kind": "zero2", "do": "spoil"}]
    ranks = zero_work(2, jobs, folder / "work")
    names = [*ZERO2, *(f"{name}-again" for name in GO_ON), "rough", "spoilt"]
    return [dict(zip(names, said, strict=True)) for said in ranks]


@installed
@pytest.mark.parametrize("name", ZERO2)
def test_two_processes_train_as_one_does(name, two, alone, folder):
    assert_equal(alone(name, ZERO2[name]), folder / "zero22" / name / "out")
    assert_alike(two, name)


@installed
def test_a_step_took_several_micro_batches_and_an_uneven_one(two):
    """Or what becomes of the sum has not been tested."""
    assert any(count > 1 for count, _ in two[0]["sft"]["cut"])
    assert any(rank["sft"]["cut"][2] == [1, 1] for rank in two), "nothing at all in the last step of an epoch"


@installed
@pytest.mark.parametrize("name", GO_ON)
def test_as_many_processes_go_on_with_the_same_bits(name, two, folder):
    whole, again = folder / "zero22" / name / "out", folder / "again" / name / "out"
    assert differences(whole, again).max() == 0
    assert log_of(whole)[-1]["hash"] == log_of(again)[-1]["hash"]


@installed
@pytest.mark.parametrize("name", GO_ON)
def test_one_process_goes_on_with_what_two_have_left(name, two, folder):
    output = folder / "one-again" / name / "out"
    _worker.train(words_to_go_on(name, folder, output))
    assert_equal(folder / "zero22" / name / "out", output)


@installed
@pytest.mark.parametrize("name", GO_ON)
def test_the_optimizers_state_is_that_of_one_process(name, two, alone, folder):
    """By the names of the parameters; one whose gradient was always 0 has none."""
    one, other = (
        load_file(run / GO_ON[name] / "optimizer.safetensors")
        for run in (alone(name, ZERO2[name]), folder / "zero22" / name / "out")
    )
    assert one.keys() == other.keys() and len(one) > 10
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-8)


@installed
def test_mixed_precision_is_that_of_one_process(two, alone, folder):
    one, other = log_of(alone("rough", ROUGH))[0], log_of(folder / "rough" / "out")[0]
    exact = log_of(alone("exact", ROUGH[:2]))[0]
    assert other["loss"] == pytest.approx(math.log(2), abs=1e-6), "policy and reference compute alike"
    for name in ("grad_norm", "logps/chosen", "logps/rejected"):
        assert abs(other[name] - exact[name]) < 3 * abs(one[name] - exact[name]) + 2e-3 * abs(exact[name]), name
    assert abs(other["logps/chosen"] - exact["logps/chosen"]) > 1e-5 * abs(exact["logps/chosen"]), "it is rounded"
    assert two[0]["rough"]["dtypes"] == {"logps": "torch.float32", "embedded": "torch.float32"}


@installed
def test_a_gradient_that_is_not_finite_changes_nothing(two, folder):
    for rank in two:
        assert rank["spoilt"]["said"].startswith("step 2: the gradient is not finite, though the loss is (rows ")
        assert rank["spoilt"]["moved"] == 0
    assert not (folder / "spoilt" / "model.safetensors").exists()


class Adam8bit(torch.optim.AdamW):
    __module__ = "bitsandbytes.optim.adamw"


@pytest.mark.parametrize(
    ("precision", "made", "said"),
    [
        ("no", Adam8bit, "--optim: bitsandbytes' optimizers have not been tried with DeepSpeed; use adamw_torch"),
        ("fp16", torch.optim.AdamW, "--mixed_precision fp16 has not been tried with DeepSpeed; use bf16"),
    ],
)
def test_what_has_not_been_tried_is_refused(precision, made, said, monkeypatch):
    refused(monkeypatch, made([torch.nn.Parameter(torch.zeros(2))]), f"^{said}$", precision)


def test_trained_weights_of_16_bits_are_refused(monkeypatch):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
    refused(monkeypatch, optimizer, "^DeepSpeed would train float32 copies of 16-bit weights, .* --dtype float32")


def test_an_old_deepspeed_is_refused(monkeypatch):
    """It would not know that backward passes are to be added up, and ignore that it was told to."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    refused(monkeypatch, optimizer, "^DeepSpeed 0.15.0 is too old: pip install 'deepspeed>=0.19.8'$", knows=())


def refused(monkeypatch, optimizer, said, precision="no", knows=("managed_gradient_accumulation",)):
    engine = SimpleNamespace(**dict.fromkeys(knows))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(DeepSpeedEngine=engine, __version__="0.15.0"))
    accelerator = SimpleNamespace(mixed_precision=precision, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match=said):
        wrap(None, optimizer, accelerator, 1.0)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_method_in_every_way(world, alone, folder):
    ranks = zero_work(world, jobs_of(LONG, folder, "zero2", world), folder / f"work{world}")
    for name, said in zip(LONG, zip(*ranks, strict=True), strict=True):
        assert_equal(alone(name, LONG[name]), folder / f"zero2{world}" / name / "out")
        assert_alike([{name: one} for one in said], name)
