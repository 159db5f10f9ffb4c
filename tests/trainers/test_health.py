"""What is said of a run whose numbers are finite and tell of nothing good, and what ends it."""

import json
import math

import pytest
import torch

from logratio.losses import DPOLoss, GRPOLoss, SFTLoss
from logratio.trainers import cli
from logratio.trainers.errors import UserError
from logratio.trainers.health import STEPS, VANISHED, Health

VOCABULARY = 1000  # blind guessing costs 6.9 nats


def watched(losses=None, norms=None, *, loss=None, clip=1.0, folder="nowhere", through=None):
    """What is told after each step of a run with these values."""
    made = Health(loss or SFTLoss(), VOCABULARY, clip, folder)
    count = len(losses or norms)
    losses, norms = losses or [1.0] * count, norms or [1.0] * count
    told = []
    for step, (value, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        if step == through:
            state = json.loads(json.dumps(made.state_dict()))
            made = Health(loss or SFTLoss(), VOCABULARY, clip, folder)
            made.load_state_dict(state)
        told.append(made.after(step, {"loss": value, "grad_norm": norm}, last=step == count))
    return told


HEALTHY = {
    "falls": (SFTLoss(), [8.0, 6.0, 4.0, 2.0] + [1.0] * 20),
    "random weights, and worse at first": (SFTLoss(), [7.0, 9.0, 30.0, 20.0] + [7.0] * 20),
    "the first step an easy one": (SFTLoss(), [1e-3] + [9.0] * 20),
    "a spike": (SFTLoss(), [2.0] * 10 + [1e4] * (STEPS - 1) + [2.0] * 10),
    "other data": (SFTLoss(), [0.1] * 20 + [6.0] * 20),
    "near 0, of both signs": (GRPOLoss(), [1e-9, -1e-7, 0.0, 3e-3, -0.2] * 5 + [0.5] * 9),
    "large from the beginning": (DPOLoss(loss_type="ipo", beta=0.01), [2500.0, 2600.0, 9000.0] + [2400.0] * 20),
    "weighed by length": (GRPOLoss(loss_type="luspo"), [0.0] * 5 + [2000.0, -3000.0] * 9),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_loss_is_told_nothing_of(name):
    loss, values = HEALTHY[name]
    assert not any(watched(values, loss=loss))


@pytest.mark.parametrize(
    ("loss", "began", "exploded"),
    [
        (SFTLoss(), [6.0, 4.0], [200.0, 9e4, 9e4, 8e4, 1e5]),
        (SFTLoss(), [6.0], [9e4] * 5),  # from the first update on
        (DPOLoss(), [0.69] * 30, [1e3 * 1.5**i for i in range(5)]),
        (GRPOLoss(), [0.0] * 30, [-1e9] * 5),
    ],
)
def test_a_loss_that_exploded_ends_the_run(loss, began, exploded, tmp_path):
    with pytest.raises(UserError) as caught:
        watched(began + exploded, loss=loss, folder=tmp_path)
    far = 10 if isinstance(loss, SFTLoss) else 100
    assert str(caught.value) == (
        f"step {len(began) + STEPS}: the loss is {exploded[-1]:.3g}, more than {far} times what it began with and "
        "blind guessing costs, for 5 steps on end: there is no checkpoint from before (--save_steps); "
        "lower --learning_rate, or add --warmup_steps"
    )
    with pytest.raises(UserError):
        watched(began + exploded, loss=loss, folder=tmp_path, through=len(began) + 3)


def test_a_loss_cannot_creep_up_under_its_bound():
    with pytest.raises(UserError, match="^step 43:"):
        watched([2.0 * 1.1**i for i in range(100)])


@pytest.mark.parametrize(("saved", "good"), [([2, 4], 4), ([2, 4, 5], 4), ([2, 4, 5, 6, 8], 4), ([5, 10], None)])
def test_the_last_good_checkpoint_is_named(saved, good, tmp_path):
    """Losses of steps 6 to 10 are far off: those of the weights that step 5 left, and checkpoint-5 has."""
    for number in saved:
        (tmp_path / f"checkpoint-{number}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(UserError) as caught:
        watched([2.0] * 5 + [1e6] * 5, folder=tmp_path)
    named = f"the last good checkpoint is {tmp_path / f'checkpoint-{good}'};" if good else "there is no checkpoint from"
    assert named in str(caught.value)


def test_a_run_that_ends_before_it_is_sure_says_so():
    told = watched([2.0] * 5 + [1e6] * 2)
    assert told[:-1] == [[]] * 6
    assert told[-1] == [
        "step 7, the last: the loss is 1e+06, more than 10 times what it began with and blind guessing costs; "
        "what is saved may be of no use"
    ]


STEEP = "the gradient's norm is 5e+03, more than 1000 times what it began with and it is clipped to"


@pytest.mark.parametrize(
    ("norms", "clip", "said"),
    [
        ([1.0] * 9 + [5e3] * 20, 1.0, 14),
        ([1.0] * 9 + [5e3] * 4 + [1.0] + [5e3] * 9, 1.0, 19),
        ([1e-6] * 9 + [1.0] * 20, 1.0, None),  # rewards that were alike, and then were not
        ([40.0] * 9 + [5e3] * 20, 1.0, None),
        ([1.0] * 9 + [5e3] * 20, 10.0, None),
        ([1.0] * 9 + [5e3] * 20, 0.0, 14),
        ([5e3] * 20, 1.0, None),
        ([1.0] + [math.inf] * 9 + [1.0] * 9, 1.0, None),  # of a gradient scaler
    ],
)
def test_a_steep_gradient_is_said_once(norms, clip, said):
    told = watched(norms=norms, clip=clip)
    assert [step for step, notes in enumerate(told, start=1) if notes] == ([said] if said else [])
    if said:
        assert told[said - 1][0].startswith(f"up to step {said}, for 5 steps on end, {STEEP}")


def test_gradients_of_zero_are_said_once():
    told = watched(norms=[1.0] * 3 + [0.0] * 4 + [1e-30] + [0.0] * 20 + [1.0] + [0.0] * 9)
    assert [step for step, notes in enumerate(told, start=1) if notes] == [13]
    assert told[12] == [
        "up to step 13, for 5 steps on end, the gradient is exactly 0, and nothing is learned: "
        "is --learning_rate too high?"
    ]


def test_saturated_margins_are_said_once():
    """sigmoid(17) is 1 in float32, sigmoid(16) is not; what a sigmoid's loss is then, is below 2^-24."""
    done, left = (float(-torch.nn.functional.logsigmoid(torch.tensor(x))) for x in (17.0, 16.0))
    assert torch.sigmoid(torch.tensor(17.0)) == 1 > torch.sigmoid(torch.tensor(16.0)) and done < VANISHED < left
    told = watched([0.7] * 3 + [left] * 9 + [done] * 20, loss=DPOLoss())
    assert [step for step, notes in enumerate(told, start=1) if notes] == [17]
    assert "the loss is 0 in float32" in told[16][0]
    assert not any(watched([0.0] * 9, loss=GRPOLoss())) and not any(watched([-1.0] * 9, loss=DPOLoss()))


@pytest.mark.parametrize("through", range(2, 20))
def test_a_run_that_goes_on_says_nothing_twice(through):
    norms = [1.0] * 3 + [0.0] * 6 + [1.0] + [0.0] * 9
    assert watched(norms=norms, through=through) == watched(norms=norms)


def train(method, folder, *words):
    return cli.main(["train", method, "--output_dir", str(folder), "--batch_size", "4", *words])


def test_a_run_with_a_learning_rate_of_50_ends_and_names_a_checkpoint(tmp_path, capsys):
    """Its first steps have a warm-up; nothing is saved over what was good."""
    words = ["--learning_rate", "50", "--max_steps", "40", "--save_steps", "1", "--warmup_steps", "39"]
    assert train("sft", tmp_path / "out", *words) == 1
    error = capsys.readouterr().err.strip()
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    at = log[-1]["step"]
    assert error.startswith(f"logratio: step {at}: the loss is ") and at < 40
    assert all(row["loss"] > 10 * math.log(259) for row in log[-STEPS:])
    good = tmp_path / "out" / f"checkpoint-{at - STEPS - 1}"
    assert f"the last good checkpoint is {good};" in error and good.is_dir()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_is_found_is_said_by_the_run(tmp_path, capsys):
    """Margins of thousands, of which no sigmoid has a slope any more."""
    assert train("kto", tmp_path / "out", "--learning_rate", "50", "--max_steps", "9") == 0
    said = capsys.readouterr().out
    assert said.count("up to step 6, for 5 steps on end, the gradient is exactly 0") == 1, said


@pytest.mark.parametrize(("correction", "told"), [("none", True), ("token_truncate", False)])
def test_a_sampler_that_is_not_the_policy_is_said_once_unless_it_is_corrected(correction, told):
    health = Health(GRPOLoss(sampling_correction=correction), VOCABULARY, 1.0, "nowhere")
    rows = [{"loss": 0.1, "grad_norm": 1.0, "sampling/logp_diff_mean": d} for d in [0.3] * 4 + [0.01] + [0.2] * 9]
    said = [health.after(step, row) for step, row in enumerate(rows, start=1)]
    assert said[:9] == [[]] * 9 and said[10:] == [[]] * 4
    assert said[9] == (
        [
            "up to step 10, for 5 steps on end, tokens were sampled with log-probabilities that differ from those "
            "trained by 0.2 nats on average: --keep_sampling_mask where top_p, top_k or min_p cut some off, else "
            "--sampling_correction"
        ]
        if told
        else []
    )
