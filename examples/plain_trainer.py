"""transformers' Trainer with Pion on plain text: typed options, and a report of what rotations must not change.

python examples/plain_trainer.py --optim_side in --max_steps 10
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, HfArgumentParser

from pion_hf import PionTrainer, PionTrainingArguments


@dataclass
class Data:
    model: str = "models/smollm2-135m-instruct"
    text: str = "data/python_docs.txt"


data, args = HfArgumentParser((Data, PionTrainingArguments)).parse_args_into_dataclasses()
tokenizer = AutoTokenizer.from_pretrained(data.model)
rows = load_dataset("text", data_files=data.text, split="train").filter(lambda row: len(row["text"]) > 40)
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns="text")

trainer = PionTrainer(
    model=AutoModelForCausalLM.from_pretrained(data.model, dtype="float32"),
    args=args,
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
print(trainer.train().metrics)  # among them spectrum_drift and optimizer_share
