"""Somebody else's Trainer script, with one line added: after `import pion_hf` it takes `--optim pion_ambient`.

    python examples/one_line.py --output_dir out --optim pion_ambient --learning_rate 2e-4 --max_steps 10

Without the line, `pion-hf run script.py ...` does the same.
"""

import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import pion_hf  # noqa: F401  the line: registers the optimizers and schedules

model = "models/smollm2-135m-instruct"
if "--model" in sys.argv:
    position = sys.argv.index("--model")
    model = sys.argv.pop(position + 1)
    del sys.argv[position]
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
tokenizer = AutoTokenizer.from_pretrained(model)
sentences = [f"The square of {i} is {i * i}." for i in range(64)]
Trainer(
    model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
    args=args,
    train_dataset=[tokenizer(sentence) for sentence in sentences],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
).train()
