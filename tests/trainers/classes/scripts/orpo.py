from datasets import load_dataset

from logratio.trainers import ORPOConfig, ORPOTrainer

args = ORPOConfig(
    output_dir="./orpo_output",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    num_train_epochs=1,
    learning_rate=5e-5,
    beta=0.1,
    max_length=1024,
    max_prompt_length=512,
    logging_steps=10,
    fp16=True,
)
trainer = ORPOTrainer(
    model="Qwen/Qwen2-0.5B-Instruct",
    args=args,
    train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
)
trainer.train()
