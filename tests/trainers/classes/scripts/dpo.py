from datasets import load_dataset
from peft import LoraConfig

from logratio.trainers import DPOConfig, DPOTrainer

train_dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
adapters = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
args = DPOConfig(
    output_dir="./dpo_output",
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
DPOTrainer(model="Qwen/Qwen2.5-0.5B", args=args, train_dataset=train_dataset, peft_config=adapters).train()
