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
    parts = Path(name).parts
    prepared = parts[:1] == ("models",) and len(parts) == 2  # where examples leave a model for the recipes
    known = {folder.name.casefold(): folder for folder in PACKAGED.iterdir() if (folder / "config.json").is_file()}
    if prepared:
        known = {name.partition("--")[2]: folder for name, folder in known.items()}
    wanted = (parts[-1] if prepared else name.replace("/", "--")).casefold() if parts else ""
    for suffix in ("", "-instruct", "-base"):
        folder = known.get(wanted.removesuffix(suffix))
        if folder is not None:
            return str(folder)
    return None
