"""DPO in one file: the library's losses, packing and policy, with a loop of your own.

    python examples/dpo.py

It prints a line a step, and computes what `logratio train dpo` computes with the same options (a test compares them):

    logratio train dpo --lora_r 8 --beta 0.1 --batch_size 16 --micro_batch_tokens 256 \\
        --learning_rate 2e-4 --lr_scheduler_type constant --no-shuffle --max_steps 20

The embedded model has random weights, which do not learn to add in so few steps: what there is to see is the loop.
To change it: `tokenizer` and `model` may be any of transformers', the rows those of a file or a data set with the
columns prompt, chosen and rejected, and the loss any of `logratio.losses`, whose kind decides the columns.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from logratio.losses import DPOLoss
from logratio.trainers.batches.inputs import count_totals, loss_inputs
from logratio.trainers.batches.packing import pack
from logratio.trainers.data.examples import load_rows, prepare
from logratio.trainers.layers.lora_layers import fuse_lora
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference
from logratio.trainers.policy.sharing import share_prompts
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

SEED = 42  # of the adapters, and of the embedded rows' wrong answers
STEPS = 20
BATCH_SIZE = 16  # pairs of an optimizer step
MICRO_BATCH_TOKENS = 256  # of one forward pass: memory and speed, never the result
LEARNING_RATE = 2e-4


def train(steps: int = STEPS) -> tuple[Policy, list[float]]:
    """The trained policy, and the loss of every step."""
    torch.manual_seed(SEED)
    loss = DPOLoss(beta=0.1)

    # Rows -> examples: token ids of a prompt, its chosen and its rejected completion.
    tokenizer = tiny_tokenizer()
    examples, report = prepare(load_rows("arithmetic", loss.kind, seed=SEED), loss.kind, tokenizer, max_length=64)
    print(report)

    # The policy is the model as a function from packed examples to log-probabilities; without adapters, the reference.
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(SEED), lora)
    fuse_lora(model)  # the same numbers with fewer passes; may be left out
    policy = Policy(model, stats=loss.stats)
    share_prompts(policy)  # a prompt is computed once for both completions, where the model can
    reference = AdapterReference(policy)

    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    losses = []
    for step in range(1, steps + 1):
        start = (step - 1) * BATCH_SIZE % len(examples)
        batch = examples[start : start + BATCH_SIZE]
        # What the loss divides by is counted over the whole step, so that micro-batches only add up.
        totals = count_totals(batch, loss)
        value, accurate = torch.zeros(()), torch.zeros(())
        for micro in pack(batch, MICRO_BATCH_TOKENS, **policy.packing):
            output = loss(**loss_inputs(loss, micro, policy(micro), ref=reference(micro)), totals=totals)
            output.loss.backward()
            value += output.loss.detach()
            accurate += output.metrics["rewards/accuracies"].total
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        print(f"step {step}  loss {value:.4f}  accuracy {accurate / len(batch):.3f}  grad_norm {grad_norm:.3f}")
    return policy, losses


if __name__ == "__main__":
    train()
