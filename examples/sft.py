"""TRL's SFTTrainer with TEON: the matrices of two consecutive layers take orthogonalised steps together.

python examples/sft.py --max_steps 10
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import HfArgumentParser

from pion_hf.integrations.trl import PionSFTConfig, PionSFTTrainer


@dataclass
class Data:
    model: str = "models/smollm2-135m-instruct"
    chats: str = "data/reasoning"


parser = HfArgumentParser((Data, PionSFTConfig))
parser.set_defaults(optim="teon", learning_rate=3e-4, optim_adamw_lr=3e-5)
data, args = parser.parse_args_into_dataclasses()
rows = load_dataset(data.chats, split="train").select_columns(["prompt", "completion"])
PionSFTTrainer(data.model, args=args, train_dataset=rows).train()
