"""`pion-hf answers`: a model's own answers to instructions, as rows of `keep_data`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

INSTRUCTIONS = Path(__file__).parent / "instructions.txt"
DESCRIPTION = """\
Writes what a model says before it is trained: its own sampled answers to general instructions. An optimizer that is
shown them (--optim_keep_data) keeps what the model makes of them:

  pion-hf answers --model MODEL
  pion-hf sft --model_name_or_path MODEL --optim adamw_routed --optim_keep 96 --optim_keep_data own_answers.jsonl ...

The hundred instructions of the package are of many kinds. Where a model is used for something else, write your own,
one in every line, as it is asked. A model without a chat template goes on with every line.
"""


def main(argv: list[str]) -> None:
    """Sample the answers, write them, and say where they are."""
    args = parser().parse_args(argv)
    instructions = [line for line in map(str.strip, _text(args.instructions).splitlines()) if line]
    if not instructions:
        raise ValueError(f"instructions={str(args.instructions)!r} is empty: write one instruction in every line")
    # These take seconds, not before the flags are right.
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from pion_hf.integrations.kept_data import own_answers
    from pion_hf.runs.files import write_text

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(PartialState().device)
    set_seed(args.seed)
    rows = own_answers(model, tokenizer, instructions, new_tokens=args.new_tokens)
    write_text(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{args.output}: {len(rows)} answers")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"instructions={str(path)!r} cannot be read: {error}") from None


def positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = argparse.ArgumentParser(
        prog="pion-hf answers", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--model", "--model_name_or_path", required=True, help="which is to be trained: a name at the hub or a folder"
    )
    flags.add_argument(
        "--instructions",
        type=Path,
        default=INSTRUCTIONS,
        metavar="FILE.txt",
        help="one in every line (default: a hundred general ones)",
    )
    flags.add_argument(
        "--output",
        type=Path,
        default=Path("own_answers.jsonl"),
        metavar="FILE.jsonl",
        help="file to write (default: %(default)s)",
    )
    flags.add_argument(
        "--new_tokens", type=positive_int, default=80, help="of an answer, at most (default: %(default)s)"
    )
    flags.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    return flags
