"""The divergence from the reference as a part of the reward."""

import math

import pytest
import torch

from logratio.losses import GRPOLoss
from logratio.reference import oracle
from logratio.trainers import loop, setup
from logratio.trainers.batches.packing import pack
from logratio.trainers.config import DataConfig, RolloutConfig, RunConfig, TrainConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.resume import Progress
from logratio.trainers.rollout.sets.windows import reward_kl
from logratio.trainers.window import MicroBatch


@torch.no_grad()
def plain_logps(model, prompt_ids, ids):
    """[tokens], at temperature 0.7."""
    logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0].double() / 0.7
    return logits.log_softmax(-1)[len(prompt_ids) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("micro_batch_tokens", [1000, 12])
@pytest.mark.parametrize(("estimator", "iterations"), [("k1", 1), ("k2", 2), ("k3", 1)])
def test_the_divergence_comes_off_the_reward(tmp_path, estimator, iterations, micro_batch_tokens):
    """R - 0.5 sum_t k(d) before groups are compared, also of groups that micro-batches divide."""
    config = RunConfig(
        method="grpo",
        loss=GRPOLoss(max_completion_length=5),
        data=DataConfig(shuffle=False),
        train=TrainConfig(batch_size=3, micro_batch_tokens=micro_batch_tokens, output_dir=str(tmp_path)),
        rollout=RolloutConfig(
            num_generations=3,
            temperature=0.7,
            num_iterations=iterations,
            scale_rewards="none",
            reward_kl_coef=0.5,
            reward_kl_estimator=estimator,
        ),
    )
    run = setup.build(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0
    run.rollouts.rewards = {"r": lambda completion_ids, **_: [float(ids[0] % 3) for ids in completion_ids]}
    window = next(loop.steps(run, Progress()))
    examples, metrics, micros = window.examples, window.metrics, window.micros
    parts = [e for micro in micros for e in micro.batch.examples]
    assert window.dealt and len(examples) == 3 and (len(parts) > 3) == (micro_batch_tokens == 12)

    ref = run.step.reference.policy.model
    kl, tokens, penalized = [], 0, []
    for e in examples:
        for c in e.completions:
            old, other = (plain_logps(m, e.prompt_ids, c.ids) for m in (run.policy.model, ref))
            kl.append(float(oracle.kl_estimate(old, other, estimator).sum()))
            tokens += len(c.ids)
            penalized.append(c.ids[0] % 3 - 0.5 * kl[-1])
    assert max(map(abs, kl)) > 0.01
    wanted = [a for row in oracle.advantages([penalized[i : i + 3] for i in (0, 3, 6)], "none") for a in row]
    assert [a for e in examples for a in e.advantages] == pytest.approx(wanted, abs=1e-4)
    whole, packed = (
        {id(c): a for e in some for c, a in zip(e.completions, e.advantages, strict=True)} for some in (examples, parts)
    )
    assert packed == whole and len(whole) == 9, "the micro-batches have the advantages too"
    assert float(metrics["kl"].total / metrics["kl"].count) == pytest.approx(sum(kl) / tokens, rel=1e-3)
    assert all((micro.old is None) == (iterations == 1) and micro.ref is not None for micro in micros)


def test_a_masked_completion_diverges_by_nothing_and_an_infinite_divergence_is_an_error():
    one, two = Completion([5, 6]), Completion([7, 8, 9], [False] * 3)
    examples = [Example([3], [one, two], row=4), Example([4], [Completion([6])], row=8)]
    batches = pack(examples, 4) + [pack(examples[:1], 9)[0].unscored()]
    micros = [
        MicroBatch(b, ref=torch.full(b.scored.shape, -2.0), old=torch.full(b.scored.shape, -1.5)) for b in batches
    ]
    sums, mean = reward_kl(examples, micros, "k1")
    assert sums.tolist() == [1.0, 0.0, 0.5]
    assert mean.total == 1.5 and mean.count == 3
    micros[1].old = torch.full(micros[1].batch.scored.shape, math.inf)
    with pytest.raises(UserError, match=r"^the divergence from the reference is not finite \(row 8 of the data set\)"):
        reward_kl(examples, micros, "k1")
