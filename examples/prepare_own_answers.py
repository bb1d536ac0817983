"""A model's own answers to instructions, as rows of `keep_data`: what it says before it is trained.

Answers are sampled from the model at temperature 1; those that do not end are cut behind their last full sentence.
Instructions are lines of a text file, as general as what the model is used for; a hundred are enough for SmolLM2-135M.

    python examples/prepare_own_answers.py --model models/smollm2-135m-instruct --instructions examples/instructions.txt
    pion-hf sft --config ... --optim adamw_routed --optim_keep 96 --optim_keep_soft --optim_keep_data own_answers.jsonl
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

BATCH = 50


@torch.no_grad()
def own_answers(model: nn.Module, tokenizer: Any, instructions: Sequence[str], new_tokens: int) -> list[dict[str, Any]]:
    """A row of `prompt` and `completion` messages for every instruction, in their order."""
    tokenizer.padding_side = "left"
    rows = []
    for start in tqdm(range(0, len(instructions), BATCH), desc="Answering"):
        chats = [[{"role": "user", "content": text}] for text in instructions[start : start + BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        made = model.generate(
            **inputs.to(model.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens
        )
        for chat, text in zip(
            chats,
            tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
            strict=True,
        ):
            end = max(map(text.rfind, ".!?\n"))
            answer = text[: end + 1].strip() or text
            rows.append({"prompt": chat, "completion": [{"role": "assistant", "content": answer}]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="name or folder, with its tokenizer")
    parser.add_argument("--instructions", type=Path, required=True, help="a text file, one in every line")
    parser.add_argument("--output", type=Path, default=Path("own_answers.jsonl"), help="file to write")
    parser.add_argument("--new_tokens", type=int, default=80, help="of an answer, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    args = parser.parse_args()
    instructions = [line.strip() for line in args.instructions.read_text(encoding="utf-8").splitlines() if line.strip()]
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = own_answers(AutoModelForCausalLM.from_pretrained(args.model), tokenizer, instructions, args.new_tokens)
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.output}: {len(rows)} answers")


if __name__ == "__main__":
    main()
