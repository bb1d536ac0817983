"""`python -m tests.field`: damaged and hostile inputs of every kind, and one table of what became of them.

`--kind WORD WORD` tries some kinds only, `--name TEXT` and `--every N` some inputs; `--page FILE` puts the table into a
page of the docs, where the rows of other kinds stay as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from pion_hf._version import __version__
from tests.field import inputs, page
from tests.field.page import Row
from tests.field.trial import FAULTS, Input, attempt
from tests.field.world import World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.field", description=__doc__)
    parser.add_argument("--kind", nargs="+", default=[""], help="only kinds whose name holds one of these")
    parser.add_argument("--name", default="", help="only inputs whose name holds this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth input")
    parser.add_argument("--page", type=Path, help="put the table into this page")
    parser.add_argument("--verbose", action="store_true", help="a line for every input")
    args = parser.parse_args()
    chosen = [i for i in inputs.INPUTS if any(kind in i.kind for kind in args.kind) and args.name in i.name][
        :: args.every
    ]
    folder = Path(tempfile.mkdtemp(prefix="pion_hf-field-"))
    rows: dict[str, Row] = {}
    try:
        world = World(folder / "world")
        if not all(given.alone for given in chosen):
            world.make()
        for kind, inputs_of in groupby(sorted(chosen, key=attrgetter("kind")), attrgetter("kind")):
            rows[kind] = Row(__version__, try_all(inputs_of, world, folder, verbose=args.verbose))
            if args.page:
                page.write(args.page, "field", page.table({**page.rows_in(args.page, "field"), **rows}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(page.table(rows))
    return int(any(row.count[verdict] for row in rows.values() for verdict in FAULTS))


def try_all(given: Iterable[Input], world: World, folder: Path, *, verbose: bool) -> Counter:
    """Inputs of a kind, each in a folder that goes afterwards: how many had which outcome."""
    count: Counter = Counter()
    for one in given:
        outcome = attempt(one, world, folder / "input")
        count[outcome.verdict] += 1
        if verbose or outcome.verdict in FAULTS:
            line = f"{outcome.verdict} [{one.kind}] {one.name} ({outcome.seconds:.1f} s): {outcome.said}"
            print(line, file=sys.stderr, flush=True)
        shutil.rmtree(folder / "input", ignore_errors=True)
    return count


if __name__ == "__main__":
    sys.exit(main())
