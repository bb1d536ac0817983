"""Where a model's config is, without a network: a folder, the hub's cache, or this package, which has a few."""

from __future__ import annotations

from pathlib import Path

import transformers

PACKAGED = Path(__file__).parents[1] / "configs"


def local_config(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> str | None:
    """What `AutoConfig.from_pretrained` reads `name` from without a network: `name` itself or a folder; None: nothing.

    The package has configs of a few hub ids; a model's variants (`-Instruct`, `-Base`) have the same shapes.
    """
    try:
        transformers.AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except OSError:
        return _packaged(name) if revision == "main" else None
    return name


def _packaged(name: str) -> str | None:
    for suffix in ("", "-Instruct", "-Base"):
        folder = PACKAGED / name.removesuffix(suffix).replace("/", "--")
        if name.count("/") == 1 and (folder / "config.json").is_file():
            return str(folder)
    return None
