"""`python -m tests.field`: damaged and hostile inputs of every kind, and one table of what became of them.

`--kind WORDS` tries some kinds only, `--name TEXT` and `--every N` some inputs; `--page FILE` puts the table into a
page of the docs, where the rows of other kinds stay as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from pion_hf._version import __version__
from tests.field import inputs, page
from tests.field.trial import FAULTS, attempt
from tests.field.world import World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.field", description=__doc__)
    parser.add_argument("--kind", default="", help="only kinds whose name holds this")
    parser.add_argument("--name", default="", help="only inputs whose name holds this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth input")
    parser.add_argument("--page", type=Path, help="put the table into this page")
    parser.add_argument("--verbose", action="store_true", help="a line for every input")
    args = parser.parse_args()
    chosen = [i for i in inputs.INPUTS if args.kind in i.kind and args.name in i.name][:: args.every]
    folder = Path(tempfile.mkdtemp(prefix="pion_hf-field-"))
    counts: dict[str, Counter] = {}
    try:
        world = World(folder / "world")
        if not all(given.alone for given in chosen):
            world.make()
        for number, given in enumerate(chosen):
            outcome = attempt(given, world, folder / str(number))
            counts.setdefault(given.kind, Counter())[outcome.verdict] += 1
            if args.verbose or outcome.verdict in FAULTS:
                line = f"{outcome.verdict} [{given.kind}] {given.name} ({outcome.seconds:.1f} s): {outcome.said}"
                print(line, file=sys.stderr, flush=True)
            shutil.rmtree(folder / str(number), ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = {kind: page.Row(__version__, count) for kind, count in counts.items()}
    print(page.table(rows))
    if args.page:
        page.write(args.page, "field", page.table({**page.rows_in(args.page, "field"), **rows}))
    return int(any(count[verdict] for count in counts.values() for verdict in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
