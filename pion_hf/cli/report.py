"""`pion-hf report`: a page about runs, made from their folders alone."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Writes one HTML page about a run, or about several side by side, from what training left in their folders: what ran,
losses and results before and after, learning rates, sizes of updates and rotation angles, singular values, where the
time went. The pictures are in the page, and as PNGs in a folder beside it. A run that is still going is shown as far as
it came.
"""


def main(argv: list[str]) -> None:
    """Write the page and say where it is."""
    args = _parser().parse_args(argv)
    from pion_hf.report import write_report  # takes seconds, not before the flags are right

    output = args.output or (Path(args.runs[0]) if len(args.runs) == 1 else Path()) / "report.html"
    print(write_report(args.runs, output, args.title, pictures=args.pictures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pion-hf report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output folder of a training run")
    parser.add_argument(
        "--output",
        metavar="PAGE.html",
        type=Path,
        help="the page (default: RUN/report.html of one run, report.html of several)",
    )
    parser.add_argument(
        "--pictures",
        metavar="FOLDER",
        type=Path,
        help="where the PNGs go (default: a folder beside the page, report_files of report.html)",
    )
    parser.add_argument("--title", help="heading of the page (default: the run's name)")
    return parser
