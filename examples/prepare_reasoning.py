"""Seeded chat examples from `reasoning-gym`, and unrelated text to see what training on them makes a model forget.

Writes train.jsonl and validation.jsonl (rows of `prompt` and `completion` messages, generated from different seeds,
with the `task` and, for rewards that score other answers, reasoning-gym's own `entry` as JSON) and the text of Python's
own language documentation, which ships with the interpreter.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import reasoning_gym
from tqdm.auto import tqdm

# reasoning-gym seeds example i of a dataset with seed + i: splits whose seeds are close share examples.
SEED_DISTANCE = 1_000_000
TASKS = ("chain_sum", "basic_arithmetic", "spell_backward", "sentence_reordering")


def examples(count: int, seed: int, tasks: Sequence[str] = TASKS) -> list[dict]:
    """`count` rows, equally many of each task, shuffled."""
    rows = []
    for task in tqdm(tasks, desc=f"Generating (seed {seed})", leave=False):
        for item in reasoning_gym.create_dataset(task, size=count // len(tasks), seed=seed):
            rows.append(
                {
                    "prompt": [{"role": "user", "content": item["question"]}],
                    "completion": [{"role": "assistant", "content": str(item["answer"])}],
                    "task": task,
                    "entry": json.dumps(item, ensure_ascii=False, default=str),  # some hold fractions
                }
            )
    random.Random(seed).shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/reasoning"), help="folder to write to")
    parser.add_argument("--other", type=Path, default=Path("data/python_docs.txt"), help="file of unrelated text")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=f"of reasoning-gym (default: {' '.join(TASKS)})")
    parser.add_argument("--train", type=int, default=800, help="training examples")
    parser.add_argument("--validation", type=int, default=96, help="validation examples")
    parser.add_argument("--seed", type=int, default=1, help="of the training examples; validation uses one far from it")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train = examples(args.train, args.seed, args.tasks)
    seen = {row["prompt"][0]["content"] for row in train}
    held_out = examples(args.validation, args.seed + SEED_DISTANCE, args.tasks)
    validation = [row for row in held_out if row["prompt"][0]["content"] not in seen]
    for name, rows in (("train", train), ("validation", validation)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{args.output / name}.jsonl: {len(rows)} examples")
    other = "\n\n".join(topics[key] for key in sorted(topics))
    args.other.write_text(other, encoding="utf-8")
    print(f"{args.other}: {len(other):,} characters")


if __name__ == "__main__":
    main()
