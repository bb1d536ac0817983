"""GRPO with a reward of one's own: shorter answers. For rewards of reasoning tasks see `pion-hf grpo`.

python examples/grpo.py --max_steps 3 --per_device_train_batch_size 8 --num_generations 4
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import HfArgumentParser

from pion_hf.integrations.trl import PionGRPOConfig, PionGRPOTrainer


@dataclass
class Data:
    model: str = "models/smollm2-135m-instruct"
    chats: str = "data/reasoning"


def brevity(completions, **columns):
    return [-float(len(answer[-1]["content"])) for answer in completions]


parser = HfArgumentParser((Data, PionGRPOConfig))
parser.set_defaults(learning_rate=1e-4, max_completion_length=24, logging_steps=1)
data, args = parser.parse_args_into_dataclasses()
rows = load_dataset(data.chats, split="train").select_columns(["prompt"])
PionGRPOTrainer(data.model, args=args, reward_funcs=brevity, train_dataset=rows).train()
