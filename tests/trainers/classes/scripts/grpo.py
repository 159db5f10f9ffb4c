import re

from datasets import load_dataset

from logratio.trainers import GRPOConfig, GRPOTrainer


def format_reward(completions, **kwargs):
    """1 for a completion that marks its answer."""
    return [1.0 if re.search(r"<answer>.*?</answer>", text, re.DOTALL) else 0.0 for text in completions]


def length_reward(completions, **kwargs):
    """More for a shorter completion."""
    return [max(0.0, 1.0 - len(text) / 500) for text in completions]


args = GRPOConfig(
    output_dir="./grpo_output",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    num_train_epochs=1,
    learning_rate=5e-6,
    num_generations=8,
    max_completion_length=512,
    logging_steps=10,
    fp16=True,
)
trainer = GRPOTrainer(
    model="Qwen/Qwen2.5-0.5B",
    args=args,
    train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    reward_funcs=[format_reward, length_reward],
)
trainer.train()
