"""The command `pion-hf`: sft, cpt, grpo, run, plan, answers, report, compare."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from pion_hf._version import __version__

COMMANDS = {
    "sft": "fine-tune on chat or text data: TRL's own script and flags, a recipe with --config",
    "cpt": "continue pretraining on packed plain text, or start from scratch: the same flags and more",
    "grpo": "reinforcement learning from rewards of the model's own answers: every flag of trl grpo",
    "run": "run an unmodified Hugging Face script with --optim pion available",
    "plan": "show which rule would update what, and what it costs, without training",
    "answers": "a model's own answers before it is trained, for --optim_keep_data: what must not be forgotten",
    "report": "a page of pictures about one run, or several side by side, from their folders",
    "compare": "the same recipe with every optimizer, learning rate and seed: a table of who learns and who forgets",
}
TRAINING = ("sft", "cpt", "grpo")  # of them, those that train by a recipe
INTERRUPTED = 130  # the exit status, as shells have it


def main(argv: list[str] | None = None) -> None:
    """The command line `pion-hf COMMAND [ARGS...]`: `pion_hf.cli.<command>.main` with the rest of it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
        print(f"usage: pion-hf COMMAND [ARGS...]\n\n{listing}\n\npion-hf COMMAND --help says more.")
        return
    if argv[0] == "--version":
        print(f"pion-hf {__version__}")
        return
    name = argv[0]
    if name not in COMMANDS:
        from pion_hf.errors import unknown

        raise SystemExit(f"pion-hf: {unknown('command', name, COMMANDS)}")
    try:
        _dispatch(name, argv[1:])
    except KeyboardInterrupt:
        print(f"pion-hf {name}: interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        from pion_hf.cli import faults

        # A script's own errors keep their traceback, as those of any other code of the user's.
        if name == "run" or faults.is_of_user(error) or os.environ.get(faults.TRACEBACK):
            raise
        raise SystemExit(f"pion-hf {name}: {faults.one_line(error, argv)}") from error


def _dispatch(name: str, argv: list[str]) -> None:
    if name in (*TRAINING, "plan"):
        from pion_hf.needs import OLDEST, require

        require(*OLDEST)
        if not {"-h", "--help"}.isdisjoint(argv):  # before the command is imported, which takes seconds more
            import_module("pion_hf.cli.flags").parser(name).parse_args(["--help"])  # ends the process
    import_module(f"pion_hf.cli.{name}").main(argv)
