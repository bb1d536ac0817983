"""The oldest releases of other libraries that this package works with, and one way of saying that one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# As in setup.cfg, which a test compares. (What is installed of this package's own metadata may be older than its code.)
OLDEST = {
    "accelerate": "1.12",
    "datasets": "4.8.5",
    "peft": "0.18.1",
    "torch": "2.9",
    "transformers": "5.0",
    "trl": "1.9",
}


@contextmanager
def needed(*names: str) -> Iterator[None]:
    """`require`, and then the imports of these libraries, whose own errors say which releases are there."""
    require(*names)
    try:
        yield
    except ImportError as error:
        found = ", ".join(f"{name} {_installed(name)}" for name in names)
        raise ImportError(f"pion_hf does not work with what is installed, {found}: {error}") from error


def require(*names: str) -> None:
    """Raise ImportError, in one line that says what to install, for libraries of `OLDEST` that are missing or too old.

    It imports none of them, and is called where one is first used: `import pion_hf` needs none.
    """
    from packaging.version import Version

    for name in names:
        oldest = OLDEST[name]
        installed = _installed(name)
        if installed is None and find_spec(name) is not None:  # code without metadata, of no known version
            continue
        # What comes before a release counts as the release: GPU vendors' images have such builds of torch.
        if installed is None or Version(Version(installed).base_version) < Version(oldest):
            found = "is not installed" if installed is None else f"is {installed} here"
            raise ImportError(f"pion_hf needs {name} {oldest} or newer, which {found}: pip install '{name}>={oldest}'")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
