"""The oldest releases of other libraries that this package works with, and one way of saying that one is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.version import Version

# As in setup.cfg, which a test compares. (What is installed of this package's own metadata may be older than its code.)
OLDEST = {
    "accelerate": "1.12",
    "datasets": "4.8.5",
    "peft": "0.18.1",
    "torch": "2.9",
    "transformers": "5.0",
    "trl": "1.9",
}
# Needed by some, as the extras of setup.cfg: as there.
OPTIONAL = {"lm_eval": "0.4.12", "optuna": "4.9"}


@contextmanager
def needed(*names: str) -> Iterator[None]:
    """`require`, and then the imports of these libraries, whose own errors say which releases are there."""
    require(*names)
    try:
        yield
    except ImportError as error:
        found = ", ".join(f"{name} {_release(name) or 'of an unknown release'}" for name in names)
        raise ImportError(f"pion_hf does not work with what is installed, {found}: {error}") from error


def require(*names: str) -> None:
    """Raise ImportError, in one line that says what to install, for libraries that are missing or too old.

    It imports none of them, and is called where one is first used: `import pion_hf` needs none.
    """
    from packaging.version import Version

    for name in names:
        oldest, found = {**OLDEST, **OPTIONAL}[name], _release(name)
        if found is None and name not in sys.modules and find_spec(name) is None:
            said = "is not installed"
        # What comes before a release counts as the release: GPU vendors' images have such builds of torch.
        elif found is not None and Version(found.base_version) < Version(oldest):
            said = f"is {found} here"
        else:
            continue
        raise ImportError(f"pion_hf needs {name} {oldest} or newer, which {said}: pip install '{name}>={oldest}'")


def _release(name: str) -> Version | None:
    """Of what is imported, else of what is installed; None where nothing says."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(getattr(sys.modules.get(name), "__version__", None) or metadata.version(name))
    except (metadata.PackageNotFoundError, InvalidVersion):
        return None
