"""GRPO in one file: rollouts, a reward of your own, advantages, and the loss.

    python examples/grpo.py

It prints a line a step, and computes what `logratio train grpo` computes with the same options (a test compares them):

    PYTHONPATH=examples logratio train grpo --reward_funcs grpo:digits --num_generations 8 --max_completion_length 12 \\
        --batch_size 8 --micro_batch_tokens 512 --learning_rate 1e-3 --lr_scheduler_type constant --no-shuffle \\
        --max_steps 20

The embedded model starts from random weights and cannot add, so the reward asks for what it can find by chance: digits.
To change it: `tokenizer` and `model` may be any of transformers', the rows a file's or a data set's with the column
prompt, and the reward any function of the completions.
"""

from __future__ import annotations

from typing import Any

import torch

from logratio.losses import GRPOLoss
from logratio.losses.advantages import advantages_of
from logratio.trainers.batches.inputs import count_totals, loss_inputs
from logratio.trainers.batches.packing import pack, split_groups
from logratio.trainers.data.examples import Completion, Example, load_rows, prepare_prompts
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.sharing import share_prompts
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.rollout.generation import completion_seed, generate

SEED = 42
STEPS = 20
PROMPTS = 8  # of an optimizer step
GROUP = 8  # completions of each
MAX_NEW_TOKENS = 12
MICRO_BATCH_TOKENS = 512  # of one forward pass: memory and speed, never the result
LEARNING_RATE = 1e-3


def digits(completions: list[str], **_: Any) -> list[float]:
    """The share of digits in each completion."""
    return [sum(c in "0123456789" for c in text) / max(1, len(text)) for text in completions]


def train(steps: int = STEPS) -> tuple[Policy, list[float]]:
    """The trained policy, and the loss of every step."""
    loss = GRPOLoss(max_completion_length=MAX_NEW_TOKENS)

    tokenizer = tiny_tokenizer()
    prompts, report = prepare_prompts(load_rows("arithmetic", loss.kind), tokenizer, max_length=64)
    print(report)

    policy = Policy(tiny_model(SEED), temperature=1.0, stats=loss.stats)
    share_prompts(policy)  # a prompt is computed once for its whole group, where the model can
    trained = list(policy.parameters())
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    losses = []
    for step in range(1, steps + 1):
        start = (step - 1) * PROMPTS % len(prompts)
        batch = prompts[start : start + PROMPTS]

        # Sample, reward, and compare every completion with the others of its prompt.
        repeated = [prompt for prompt in batch for _ in range(GROUP)]
        # every completion has random numbers of its own, whatever is sampled beside it
        seeds = [completion_seed("train", SEED, step - 1, prompt.row, k) for prompt in batch for k in range(GROUP)]
        sampled = generate(policy, tokenizer, repeated, max_new_tokens=MAX_NEW_TOKENS, seeds=seeds, temperature=1.0)
        texts = tokenizer.batch_decode([s.ids for s in sampled], skip_special_tokens=True)
        rewards = torch.tensor(digits(texts), dtype=torch.float64).view(len(batch), GROUP)
        advantages = advantages_of(rewards, "group").tolist()
        examples = [
            Example(
                prompt.prompt_ids,
                [Completion(s.ids) for s in sampled[i * GROUP : (i + 1) * GROUP]],
                advantages=tuple(advantages[i]),
            )
            for i, prompt in enumerate(batch)
        ]

        # One step on them. Groups that do not fit a micro-batch are divided: their advantages are known by now.
        totals = count_totals(examples, loss)
        value = torch.zeros(())
        for micro in pack(
            split_groups(examples, MICRO_BATCH_TOKENS, policy.shared), MICRO_BATCH_TOKENS, **policy.packing
        ):
            output = loss(**loss_inputs(loss, micro, policy(micro)), totals=totals)
            output.loss.backward()
            value += output.loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        print(f"step {step}  reward {rewards.mean():.3f}  loss {value:.4f}  grad_norm {grad_norm:.3f}")
    return policy, losses


if __name__ == "__main__":
    train()
