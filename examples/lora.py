"""LoRA with rotating adapters: the factor A rotates, and B takes orthogonalised steps.

python examples/lora.py --max_steps 10
"""

from dataclasses import dataclass

from datasets import load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser

from pion_hf.integrations.trl import PionSFTConfig, PionSFTTrainer


@dataclass
class Data:
    model: str = "models/smollm2-135m-instruct"
    chats: str = "data/reasoning"
    rank: int = 16


parser = HfArgumentParser((Data, PionSFTConfig))
parser.set_defaults(optim="pion_lora", learning_rate=1.2e-3)
data, args = parser.parse_args_into_dataclasses()
trainer = PionSFTTrainer(
    data.model,
    args=args,
    train_dataset=load_dataset(data.chats, split="train").select_columns(["prompt", "completion"]),
    peft_config=LoraConfig(r=data.rank, lora_alpha=2 * data.rank, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
