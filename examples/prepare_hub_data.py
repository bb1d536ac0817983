"""Data sets of the hub in the columns that TRL reads, for the recipes of larger models.

metamath, magicoder: the instruction data of Pion's paper, as chats (rows of `prompt` and `completion` messages: TRL
renames no columns). openwebmath: mathematical web pages for continued pretraining (rows of `text`), as many as --rows.
Writes train.jsonl and validation.jsonl into a folder for each. Rows of one group, such as all rewordings of one
question of MetaMathQA, are in the same split.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Source:
    """A data set and its columns: those of a question and its answer, or that of a text."""

    path: str
    group: str
    prompt: str = ""
    completion: str = ""
    text: str = ""
    rows: int | None = None

    @property
    def columns(self) -> list[str]:
        """All that are read."""
        return [c for c in (self.prompt, self.completion, self.text, self.group) if c]


SOURCES = {
    "metamath": Source("meta-math/MetaMathQA", "original_question", prompt="query", completion="response"),
    "magicoder": Source(
        "ise-uiuc/Magicoder-Evol-Instruct-110K", "instruction", prompt="instruction", completion="response"
    ),
    "openwebmath": Source("open-web-math/open-web-math", "url", text="text", rows=50_000),
}


def converted(source: Source, rows: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    """Of every row its group, and what TRL reads; rows without a question, an answer or a text are left out."""
    for row in rows:
        missing = [c for c in source.columns if c not in row]
        if missing:
            raise SystemExit(f"{source.path} has no column {missing[0]!r} (it has {', '.join(row)}): see SOURCES")
        if not all((row[c] or "").strip() for c in source.columns if c != source.group):
            continue
        if source.text:
            entry = {"text": row[source.text]}
        else:
            entry = {
                "prompt": [{"role": "user", "content": row[source.prompt]}],
                "completion": [{"role": "assistant", "content": row[source.completion]}],
            }
        yield str(row[source.group]), entry


def split(rows: Iterable[tuple[str, dict]], validation: int, seed: int) -> tuple[list[dict], list[dict]]:
    """`(train, validation)`: shuffled whole groups, the first of them in validation until it has so many rows."""
    groups: dict[str, list[dict]] = {}
    for group, row in rows:
        groups.setdefault(group, []).append(row)
    train, held_out = [], []
    for group in random.Random(seed).sample(sorted(groups), len(groups)):
        (held_out if len(held_out) < validation else train).extend(groups[group])
    random.Random(seed).shuffle(train)
    return train, held_out


def prepare(source: Source, folder: Path, *, rows: int | None, validation: int, seed: int) -> None:
    """Download, convert and split one source."""
    stream = load_dataset(source.path, split="train", streaming=True)
    limit = source.rows if rows is None else rows
    stream = tqdm(itertools.islice(stream, limit), desc=f"Reading {source.path}", total=limit, leave=False)
    parts = dict(zip(("train", "validation"), split(converted(source, stream), validation, seed), strict=True))
    for name, part in parts.items():
        if not part:
            raise SystemExit(f"{folder}: nothing is left for {name}: change --rows or --validation")
    folder.mkdir(parents=True, exist_ok=True)
    left_out = stream.n - sum(map(len, parts.values()))
    if left_out:
        print(f"{folder}: {left_out:,} empty rows left out")
    for name, part in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{folder / name}.jsonl: {len(part):,} rows")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=SOURCES, help="which data")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder in which each has its own")
    parser.add_argument("--rows", type=int, help="read so many (default: all; of openwebmath 50,000)")
    parser.add_argument("--validation", type=int, default=512, help="rows to validate on, or a few more")
    parser.add_argument("--seed", type=int, default=1, help="of the order and of the split")
    args = parser.parse_args(argv)
    for name in args.names:
        prepare(SOURCES[name], args.output / name, rows=args.rows, validation=args.validation, seed=args.seed)


if __name__ == "__main__":
    main()
