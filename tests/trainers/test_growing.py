"""`--micro_batch_tokens auto` takes as many tokens as a device has room for, and changes nothing else."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from logratio.benchmarks.peers import randoms
from logratio.trainers import growing, loop, setup
from logratio.trainers.errors import UserError
from logratio.trainers.growing import Growth, make_growth
from logratio.trainers.memory import Memory
from logratio.trainers.options import parse_train

MIB = 2**20
GRADIENTS = 3 * MIB


class Device:
    """Of so many bytes, of which a token of a pass takes some, and weights the rest."""

    def __init__(self, room, weights, each):
        self.all, self.weights, self.each, self.tokens = room, weights, each, 0

    def allocated(self):
        return self.weights

    def peak(self):
        return self.weights + GRADIENTS + self.each * self.tokens

    def room(self):
        return self.all


def growth(device, tokens, before=1000):
    accelerator = SimpleNamespace(gather=lambda x: x, device=torch.device("cpu"), num_processes=1)
    memory = Memory(accelerator, [torch.nn.Parameter(torch.zeros(GRADIENTS // 4))], None, before)
    grown = Growth(memory, device)
    grown.before()
    device.tokens = max(tokens)
    micros = [SimpleNamespace(batch=SimpleNamespace(input_ids=torch.zeros(1, n))) for n in tokens]
    grown.after(micros)
    return grown


def test_what_fits_is_what_is_left_over_what_a_token_takes():
    """850 MiB that may be used, less 247 of weights and 3 of gradients, at 0.05 MiB a token: 12,000, in whole 1024."""
    grown = growth(Device(1000 * MIB, 247 * MIB, MIB // 20), [900, 1000, 4])
    assert grown.memory.micro_batch_tokens == 11 * 1024
    assert grown.memory.take() == [
        "--micro_batch_tokens auto: 11264 from here on; 1000 took 50 MiB beside weights, gradients and optimizer "
        "state, and 600 MiB are free for them"
    ]
    grown.after([None, None])  # it is over
    assert grown.memory.micro_batch_tokens == 11 * 1024


def test_a_step_in_one_micro_batch_is_no_trial():
    grown = growth(Device(1000 * MIB, 0, 1), [900])
    assert grown.memory.micro_batch_tokens == 1000 and grown.meter is not None and grown.memory.take() == []


def test_it_never_shrinks():
    grown = growth(Device(100 * MIB, 60 * MIB, MIB // 20), [1000, 1000])
    assert grown.memory.micro_batch_tokens == 1000 and "auto: 1000 as before; 1000 took" in grown.memory.take()[0]


def test_of_several_processes_the_fullest_counts():
    grown = growth(Device(1000 * MIB, 0, 1), [900])
    grown.memory.accelerator.gather = lambda x: torch.tensor([int(x), 2048])
    grown.meter.tokens = 1000
    grown.after([SimpleNamespace(batch=SimpleNamespace(input_ids=torch.zeros(1, 1000)))] * 2)
    assert grown.memory.micro_batch_tokens == 2048


def test_sharded_processes_are_refused(monkeypatch):
    monkeypatch.setattr(growing, "meet_inside", lambda accelerator: True)
    with pytest.raises(UserError, match="auto: processes with sharded weights or gradients cannot try again"):
        make_growth("auto", None, None)


@pytest.fixture
def words(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in randoms.random_rows("dpo", 7, 24)))
    return ["dpo", "--dataset_name", str(tmp_path / "rows.jsonl"), "--lora_r", "4", "--batch_size", "8"]


def test_a_run_that_grows_trains_what_another_does(words, tmp_path, monkeypatch):
    """Small micro-batches first, whole steps after the first; the step that is packed ahead is packed again."""
    seen = {}
    for name, tokens in (("grown", "auto"), ("given", "8192")):
        config = parse_train([*words, "--max_steps", "3", "--micro_batch_tokens", tokens, "--output_dir", name])
        monkeypatch.chdir(tmp_path)
        run = setup.build(config)
        if tokens == "auto":
            assert run.notes[-1] == "--micro_batch_tokens auto: 8192, where there is no GPU to fill"
            run.step.micro_batch_tokens = 200
            run.growth.meter = Device(10**11, 0, 1)
            run.growth.meter.tokens = 200
        sizes = seen[name] = []
        call = type(run.step).__call__

        def counted(step, micros, *args, call=call, sizes=sizes, **kwargs):
            sizes.append(len(micros))
            return call(step, micros, *args, **kwargs)

        monkeypatch.setattr(type(run.step), "__call__", counted)
        loop.train_run(run, quiet=True)
        monkeypatch.setattr(type(run.step), "__call__", call)
    assert seen["given"] == [1, 1, 1] and seen["grown"][0] > 2 and seen["grown"][1:] == [1, 1]
    grown, given = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("grown", "given"))
    for name, value in given.items():
        torch.testing.assert_close(grown[name], value, rtol=1e-5, atol=1e-6)


def test_a_run_that_has_grown_goes_on_so(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words += ["--micro_batch_tokens", "auto", "--max_steps", "2", "--save_steps", "1", "--output_dir", "out"]
    run = setup.build(parse_train(words))
    run.step.micro_batch_tokens = 12_345
    loop.train_run(run, quiet=True)
    again = setup.build(parse_train([*words, "--resume_from_checkpoint", "out/checkpoint-1"]))
    again.growth.meter = Device(10**9, 0, 1)
    loop.restore(again)
    assert again.step.micro_batch_tokens == 12_345 and again.growth.meter is None
