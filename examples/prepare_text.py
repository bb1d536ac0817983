"""Text for continued pretraining, without a hub: Python's own documentation, which ships with the interpreter.

Documents are the topics of the language reference and, for every public module of the standard library, its
docstrings. A paragraph that several documents share is kept in the first of them, so that no text of the validation
documents is trained on. Writes train.jsonl and validation.jsonl (rows of `text` and `source`, split by whole
documents) and, as text of another domain, source code of a few modules without docstrings and comments.
"""

import argparse
import ast
import inspect
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

from tqdm.auto import tqdm

STDLIB = Path(sysconfig.get_path("stdlib"))
NOT_PUBLIC = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
SHORTEST_DOCUMENT = 500  # characters
LONGEST_PHRASE = 60  # characters: what is shorter may stand in several documents ("Example:")
CODE = ("argparse", "dataclasses", "difflib", "pathlib", "pickle", "shutil", "statistics", "subprocess")


def module_files(stdlib: Path) -> list[tuple[str, Path]]:
    """`(name, file)` of every public module below `stdlib`, by name."""
    found = []
    for file in stdlib.rglob("*.py"):
        parts = file.relative_to(stdlib).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and all(p.isidentifier() and p[0] != "_" and p not in NOT_PUBLIC for p in parts):
            found.append((".".join(parts), file))
    return sorted(found)


def docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """The docstring of `node` and of every public class and function in it, each below its name."""
    text = ast.get_docstring(node)
    if text:
        yield f"{name}\n\n{text.strip()}"
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            yield from docstrings(child, f"{name}.{child.name}")


def documents(stdlib: Path) -> list[dict[str, str]]:
    """Rows of `text` and `source`: first the topics, then the modules, each in alphabetical order."""
    texts = {f"topic {name}": inspect.cleandoc(topics[name]) for name in sorted(topics)}
    for name, file in tqdm(module_files(stdlib), desc="Reading modules", leave=False):
        texts[f"module {name}"] = "\n\n".join(docstrings(ast.parse(file.read_bytes()), name))
    seen: set[str] = set()
    rows = []
    for source, text in texts.items():
        paragraphs = [p for p in re.split(r"\n(?:[ \t]*\n)+", text) if _words(p) not in seen]
        seen.update(words for words in map(_words, paragraphs) if len(words) > LONGEST_PHRASE)
        text = "\n\n".join(paragraphs).strip()
        if len(text) >= SHORTEST_DOCUMENT:
            rows.append({"text": text, "source": source})
    return rows


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def split(rows: list[dict[str, str]], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Shuffled `(train, validation)`: whole documents, of which validation has about `share` of the characters."""
    rows = random.Random(seed).sample(rows, len(rows))
    wanted = share * sum(len(row["text"]) for row in rows)
    train, validation = [], []
    for row in rows:
        # A document of which less than half is still wanted goes to training.
        if wanted > len(row["text"]) / 2:
            validation.append(row)
            wanted -= len(row["text"])
        else:
            train.append(row)
    return train, validation


def code(names: Sequence[str], stdlib: Path) -> str:
    """The source of modules without docstrings and comments."""
    sources = []
    for name in tqdm(names, desc="Reading code", leave=False):
        tree = ast.parse((stdlib / f"{name}.py").read_bytes())
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [s for s in node.body if not _is_string(s)] or [ast.Pass()]
        sources.append(ast.unparse(tree))  # has no comments
    return "\n\n\n".join(sources) + "\n"


def _is_string(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{path}: {len(rows):,} documents, {sum(len(row['text']) for row in rows):,} characters")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/docs"), help="folder to write to")
    parser.add_argument("--other", type=Path, default=Path("data/python_code.txt"), help="file of unrelated text")
    parser.add_argument("--validation", type=float, default=0.02, help="share of the characters to validate on")
    parser.add_argument("--seed", type=int, default=1, help="of the order and of the split")
    args = parser.parse_args(argv)
    if not 0 < args.validation < 1:
        parser.error(f"--validation must be between 0 and 1, got {args.validation}")
    train, validation = split(documents(STDLIB), args.validation, args.seed)
    other = code(CODE, STDLIB)
    args.output.mkdir(parents=True, exist_ok=True)
    args.other.parent.mkdir(parents=True, exist_ok=True)
    write_rows(args.output / "train.jsonl", train)
    write_rows(args.output / "validation.jsonl", validation)
    args.other.write_text(other, encoding="utf-8", newline="\n")
    print(f"{args.other}: {len(other):,} characters")


if __name__ == "__main__":
    main()
