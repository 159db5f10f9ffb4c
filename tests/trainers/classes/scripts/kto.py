from datasets import Dataset

from logratio.trainers import KTOConfig, KTOTrainer

questions = [f"Is {n} even?" for n in range(12)]
rows = [{"prompt": q, "completion": "yes", "label": n % 2 == 0} for n, q in enumerate(questions)]
args = KTOConfig(
    output_dir="./kto_output",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    num_train_epochs=1,
    learning_rate=5e-5,
    max_length=1024,
    max_prompt_length=512,
    logging_steps=10,
    fp16=True,
)
trainer = KTOTrainer(model="Qwen/Qwen2.5-0.5B", args=args, train_dataset=Dataset.from_list(rows))
trainer.train()
