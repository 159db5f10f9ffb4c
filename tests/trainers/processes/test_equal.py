"""Two and three processes train as one does, with whole weights (DDP) and sharded ones (FSDP2)."""

import math

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from logratio.losses import ADVANTAGES
from logratio.trainers import loop
from logratio.trainers.processes.optimizer_state import load_optimizer_state, optimizer_state

from . import _worker
from ._compared import FAR, assert_alike, assert_equal, jobs_of
from ._jobs import METHODS, STEPS, WAYS, words_for
from ._launch import differences, log_of, said_by, work, work_of_one_import

# Of the two examples that are evaluated, one is trained on, so that its reference log-probs are stored.
STORED = ("--precompute_ref_log_probs", "--dataset_test_split", "test", "--eval_steps", "2")
SYNC = ("--sync_ref_model", "--ref_model_sync_steps", "1")
TEACHER = ("--teacher_model_name_or_path", "tiny")
DDP = {
    "sft": ("sft", "qlora"),
    "dpo": ("dpo", "lora", *STORED),
    "dpo-full": ("dpo", "full"),
    "kto": ("kto", "lora", *SYNC),
    "orpo": ("orpo", "full"),
    "cpo": ("cpo", "lora"),
    "tpo": ("tpo", "qlora"),
    "grpo": (  # the second process evaluates nothing
        *("grpo", "lora", "--eval_size", "1", "--num_generations_eval", "4"),
        *("--loss_aggregation", "prompt_mean", "--positive_nll_coef", "0.1"),
    ),
}
THREE = ("sft", "dpo-full", "kto", "grpo-three")
FSDP2 = {
    "sft": ("sft", "full", "--gradient_checkpointing"),
    "gkd": ("sft", "full", "--loss_type", "gkd", *TEACHER, "--dataset_test_split", "test", "--eval_steps", "2"),
    "asft": ("sft", "lora", "--loss_type", "asft", "--dataset_test_split", "test", "--eval_steps", "2"),
    "dpo": ("dpo", "lora"),
    "dpo-full": ("dpo", "full", *STORED, "--save_steps", "2"),
    "kto": ("kto", "qlora"),
    "grpo": ("grpo", "lora", "--num_iterations", "2", "--reward_kl_coef", "0.1", *TEACHER),
}
TWO = tuple(DDP)
DDP["grpo-three"] = ("grpo", "lora", "--scale_rewards", "batch", "--loss_type", "target_po", "--num_iterations", "2")
# Left after so many steps, in the middle of a set of rollouts, and gone on with by any number of processes.
KEPT = {
    "ddp": (
        *("grpo", "lora", "--steps_per_generation", "2", "--num_iterations", "2", "--beta", "0.1"),
        *("--dynamic_sampling", "3", "--reward_funcs", "_worker:now_and_then", "--save_steps", "3"),
    ),
    "fsdp2": ("dpo", "full", "--save_steps", "2"),
}
LONG = {f"every-{method}-{way}": (method, way) for method in METHODS for way in WAYS}


def kept(folder, kind, name="whole"):
    return folder / "kept" / kind / name / "out"


def going_on(folder, kind, name):
    """The job of going on with what two processes have left."""
    checkpoint = kept(folder, kind) / f"checkpoint-{KEPT[kind][-1]}"
    words = words_for(*KEPT[kind][:2], folder, kept(folder, kind, name), *KEPT[kind][2:])
    return {"words": [*words, "--resume_from_checkpoint", str(checkpoint)], "kind": kind, "do": "sample"}


@pytest.fixture(scope="module")
def two(folder):
    """A launch takes longer than its work, so there is one for all that two processes are asked for."""
    jobs = jobs_of({name: DDP[name] for name in TWO}, folder, "ddp", 2) + jobs_of(FSDP2, folder, "fsdp2", 2)
    sampling = words_for("grpo", "full", folder, folder / "sampled" / "out")
    jobs += [{"words": sampling, "kind": "fsdp2", "do": "sample"}]
    rough = words_for("dpo", "full", folder, folder / "rough" / "out", "--mixed_precision", "bf16")
    jobs += [{"words": rough, "kind": "fsdp2"}]
    for way in ("lora", "full"):  # of which the second leaves the files
        trip = words_for("dpo", way, folder, folder / f"trip-{way}" / "out")
        jobs += [{"words": trip, "kind": "fsdp2", "do": "round_trip"}]
    for kind, setting in KEPT.items():
        whole = words_for(*setting[:2], folder, kept(folder, kind), *setting[2:])
        jobs += [{"words": whole, "kind": kind, "do": "sample"}, going_on(folder, kind, "two")]
    jobs += [{"words": [], "do": "compare"}, {"words": [], "do": "sums"}]
    apart = words_for("dpo", "lora", folder, folder / "apart")
    jobs += [{"words": apart, "do": "differ"}, {"words": apart, "do": "end"}]
    done = work_of_one_import(2, jobs, folder / "work2")
    assert done.returncode == 0 and "returned a view tensor" not in done.stderr, done.stderr
    ranks = said_by(done, 2, folder / "work2")
    names = [*(f"ddp-{name}" for name in TWO), *(f"fsdp2-{name}" for name in FSDP2)]
    names += ["sampled", "rough", "trip-lora", "trip"]
    names += [*(f"{kind}-{name}" for kind in KEPT for name in ("whole", "two")), "compare", "sums", "differ", "end"]
    return [dict(zip(names, said, strict=True)) for said in ranks]


@pytest.fixture(scope="module")
def three_done(folder, two):
    """What is left of three, whose last run fails; they go on with what two have left."""
    jobs = jobs_of({name: DDP[name] for name in THREE}, folder, "ddp", 3)
    jobs += [going_on(folder, "ddp", "three")]
    jobs += [{"words": ["raise", *words_for("dpo", "lora", folder, folder / "failed")], "do": "fail"}]
    return work(3, jobs, folder / "work3")


@pytest.fixture(scope="module")
def three(three_done, folder):
    names = [*THREE, "going on"]
    return [dict(zip(names, said, strict=True)) for said in said_by(three_done, 3, folder / "work3")]


@pytest.mark.parametrize("name", TWO)
def test_two_processes_train_as_one_does(name, two, alone, folder):
    assert_equal(alone(name, DDP[name]), folder / "ddp2" / name / "out")
    assert_alike(two, f"ddp-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE)
def test_three_processes_train_as_one_does(name, three, alone, folder):
    assert_equal(alone(name, DDP[name]), folder / "ddp3" / name / "out")
    assert_alike(three, name)


@pytest.mark.parametrize("name", FSDP2)
def test_two_processes_with_sharded_weights_train_as_one_does(name, two, alone, folder):
    assert_equal(alone(f"fsdp2-{name}", FSDP2[name]), folder / "fsdp22" / name / "out")
    assert_alike(two, f"fsdp2-{name}")


def test_sharded_weights_are_saved_on_the_way_too(two, alone, folder):
    runs = alone("fsdp2-dpo-full", FSDP2["dpo-full"]), folder / "fsdp22" / "dpo-full" / "out"
    assert differences(*(run / "checkpoint-2" for run in runs)).max() < FAR


def test_sharded_weights_are_held_in_parts(two):
    for rank in two:
        for name in ("fsdp2-sft", "fsdp2-dpo", "fsdp2-dpo-full"):
            assert 0.45 < rank[name]["held"]["policy"] < 0.55
        assert 0.45 < rank["fsdp2-dpo-full"]["held"]["reference"] < 0.55
        assert rank["ddp-dpo-full"]["held"] == {"policy": 1, "reference": 1}


def test_mixed_precision_of_sharded_weights_is_that_of_whole_ones(two, alone, folder):
    """Up to the rounding of norms and embeddings; what layers add up, and log-probabilities, are in float32."""
    exact = log_of(alone("dpo-full", DDP["dpo-full"]))[0]
    one = log_of(alone("rough", ("dpo", "full", "--mixed_precision", "bf16")))[0]
    sharded = log_of(folder / "rough" / "out")[0]
    assert sharded["loss"] == pytest.approx(math.log(2), abs=1e-6), "policy and reference compute alike"
    for name in ("grad_norm", "logps/chosen", "logps/rejected"):
        assert abs(sharded[name] - exact[name]) < 3 * abs(one[name] - exact[name]) + 2e-3 * abs(exact[name]), name
    assert_alike(two, "rough")
    assert two[0]["rough"]["dtypes"] == {"logps": "torch.float32", "embedded": "torch.float32"}


@pytest.mark.slow
def test_three_processes_ran_out_of_examples(three):
    assert any(rank["kto"]["cut"][2] == [1, 1] for rank in three), "two examples for three processes"


def test_processes_ran_out_of_examples(two):
    """Or what they do then has not been tested."""
    assert two[1]["ddp-dpo"]["cut"][2] == [1, 1], "the second process had nothing at all in the last step of an epoch"
    for name in ("ddp-dpo", "ddp-kto", "fsdp2-dpo", "fsdp2-sft"):
        zero, one = (rank[name]["cut"] for rank in two)
        assert any(a[1] != b[1] for a, b in zip(zero, one, strict=True)), name


def test_sharded_weights_are_gathered_for_what_the_policy_samples(two, folder):
    assert [row["step"] for row in log_of(folder / "sampled" / "out")] == [1, 2, 3, 4]
    assert_alike(two, "sampled")


def test_what_trained_moved(alone, folder):
    """By about the learning rate a step; else equal weights would say nothing."""
    weights = load_file(alone("dpo", DDP["dpo"]) / "adapter_model.safetensors")
    assert max(p.abs().max().item() for name, p in weights.items() if "lora_B" in name) > 2e-4
    assert differences(alone("dpo-full", DDP["dpo-full"]), folder / "model").max() > 2e-4


def assert_same_state(one, other, **tolerance):
    """Of two optimizers, by the names of the parameters."""
    assert one["state"].keys() == other["state"].keys()
    for name, values in one["state"].items():
        assert values.keys() == other["state"][name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in values.items():
            torch.testing.assert_close(value, other["state"][name][key], **tolerance)
    assert one["param_groups"] == other["param_groups"]


def test_weights_and_the_optimizers_state_are_one_for_any_number_of_processes(two, folder):
    main, other = (rank["trip"] for rank in two)
    for trip in (main, two[0]["trip-lora"]):
        assert trip["names"] > 10 and trip["weights"] == trip["reloaded"] > 10
    assert other == {"names": 0, "weights": 0, "reloaded": 0}, "the main process alone has them"
    sharded, again = (torch.load(folder / "work2" / f"{name}.pt") for name in ("optimizer", "optimizer-again"))
    assert_same_state(sharded, again, rtol=0, atol=0)

    trained, fresh = (_worker.built(words_for("dpo", "full", folder, folder / "trip" / name)) for name in "ab")
    loop.train_run(trained, quiet=True)
    own = optimizer_state(trained.policy, trained.optimizer, trained.accelerator)
    assert_same_state(own, sharded, rtol=1e-4, atol=1e-8)
    assert {float(values["step"]) for values in own["state"].values()} == {STEPS}

    load_optimizer_state(fresh.policy, fresh.optimizer, fresh.accelerator, sharded)
    names = {p: name for name, p in fresh.policy.named_parameters()}
    for p, values in fresh.optimizer.state.items():
        for key, value in values.items():
            assert torch.equal(value, sharded["state"][names[p]][key])
    assert len(fresh.optimizer.state) == len(sharded["state"])


def test_rollouts_are_compared_with_those_of_all_processes(two):
    one = _worker.compare([])
    assert one["reward_std"] > 1
    assert [rank["compare"]["reward_std"] for rank in two] == pytest.approx([one["reward_std"]] * 2)
    assert len(one["advantages"]) == len(ADVANTAGES) + 3
    for options, rows in one["advantages"].items():
        first, second = (rank["compare"]["advantages"][options] for rank in two)
        assert first.keys() == {"0", "2"} and second.keys() == {"1"}
        for i, row in (first | second).items():
            assert row == pytest.approx(rows[i], rel=1e-9, abs=1e-12), options
        assert any(abs(x) > 0.1 for row in rows.values() for x in row)


def test_gradients_are_added_up_and_what_no_process_has_stays_away(two):
    for rank in two:
        said = rank["sums"]
        assert set(sum(said["begun"].values(), [])) == {1.0}, "all begin with the main process's values"
        assert said["buckets"] == [[6], [1, 2], [2], [3]], "one of a dtype, four values, or one that is larger"
        assert said["summed"] == {
            "both": [10.0, 12.0, 14.0, 16.0, 18.0, 20.0],
            "second": [10.0],
            "none": None,
            "narrow": [10.0, 12.0],
            "after": [10.0, 12.0, 14.0],
        }


@pytest.mark.parametrize("kind", KEPT)
def test_as_many_processes_go_on_with_the_same_bits(kind, two, folder):
    assert differences(kept(folder, kind), kept(folder, kind, "two")).max() == 0
    assert log_of(kept(folder, kind))[-1]["hash"] == log_of(kept(folder, kind, "two"))[-1]["hash"]


@pytest.mark.parametrize("kind", KEPT)
def test_one_process_goes_on_with_what_two_have_left(kind, two, folder):
    """Of sharded weights too; the order of the data, and the completions, are the same."""
    job = going_on(folder, kind, "one")
    _worker.train(job["words"])
    assert_equal(kept(folder, kind), kept(folder, kind, "one"))


@pytest.mark.slow
def test_three_processes_go_on_with_what_two_have_left(three, folder):
    assert_equal(kept(folder, "ddp"), kept(folder, "ddp", "three"))


def test_two_processes_sample_what_one_does(two, alone, folder):
    """Every completion has random numbers of its own, whichever process asks for it."""
    _worker.train(words_for(*KEPT["ddp"][:2], folder, kept(folder, "ddp", "alone"), *KEPT["ddp"][2:]))
    assert_equal(kept(folder, "ddp", "alone"), kept(folder, "ddp"))
    one, other = (pq.read_table(kept(folder, "ddp", name) / "completions.parquet") for name in ("alone", "whole"))
    columns = ["step", "row", "prompt", "completion", "reward", "policy_version"]
    assert one["advantage"].null_count >= 3 and one.num_rows - one["advantage"].null_count == 18
    assert one.select(columns).equals(other.select(columns))


@pytest.mark.slow
def test_a_process_that_raises_ends_the_others_which_name_it(three_done, folder):
    said = three_done.stderr
    for rank in (0, 2):
        ends = f"logratio: process {rank} of 3 ends, because process 1 failed: ZeroDivisionError: of all things\n"
        assert said.count(ends) == 1, said
    assert said.count('raise ZeroDivisionError("of all things")') == 1, "its own traceback, and no other"
    assert three_done.returncode != 0 and not (folder / "failed" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 3)])
def test_every_method_in_every_way(kind, world, alone, folder):
    done = work(world, jobs_of(LONG, folder, kind, world), folder / f"work-{kind}{world}")
    assert done.returncode == 0, done.stderr
    ranks = said_by(done, world, folder / f"work-{kind}{world}")
    for name, said in zip(LONG, zip(*ranks, strict=True), strict=True):
        assert_equal(alone(name, LONG[name]), folder / f"{kind}{world}" / name / "out")
        assert_alike([{name: one} for one in said], name)


def test_processes_that_were_given_other_things_are_told_apart(two):
    """All say so, and none waits for the others."""
    for rank in two:
        assert rank["differ"] == {
            "options": "process 1 has other options than process 0 (learning_rate 0.0002, of process 0 0.0001): give "
            "all the same",
            "begun": "process 1 has other options than process 0 (resume_from_checkpoint latest, of process 0 None): "
            "give all the same",
            "rows": "the rows that process 1 was given are not those of process 0: give all processes the same data "
            "set, whole and in one order; a step's examples are dealt to them here",
        }


def test_a_run_ends_on_all_processes_where_one_ends_it(two, folder):
    """By a callback that looks at the clock, say. All write where the main process does."""
    for rank in two:
        assert rank["end"]["row"]["step"] == 2
        assert rank["end"]["output_dir"] == str(folder / "apart-0")
    assert len(log_of(folder / "apart-0")) == 2 and not (folder / "apart-1").exists()
