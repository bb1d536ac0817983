"""What nobody else may see of arguments and recipes: tokens, passwords, keys and the environment."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# Anywhere in a name, or as its last word.
_TELLING = re.compile(r"passw|passphrase|secret|credential|authoriz|(api|access|private)_?key|auth_?token", re.I)
_LAST_WORDS = {"token", "tokens", "key", "pwd", "pass", "pat", "auth", "cookie", "cookies", "env"}
# Tokens of a vocabulary, not of an account; and numbers of them.
_OF_TEXT = {
    *("eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio", "stop", "start", "end", "eot"),
    *("max", "min", "new", "num", "special", "additional", "extra"),
}
_USER_AND_PASSWORD = re.compile(r"(?<=://)[^\s/?#]+(?=@)")
_QUERY = re.compile(r"([?&;](?:[^\s=&#]*(?:token|key|secret|passw|credential|signature)[^\s=&#]*|sig)=)[^\s&#]+", re.I)


def is_secret(name: str, value: Any = None) -> bool:
    """Whether an argument, a key or a variable of this name holds what identifies an account (yes and no do not)."""
    if isinstance(value, bool):
        return False
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)
    words = [word.lower() for word in words] or [""]
    if _TELLING.search(name):
        return True
    of_text = words[-1] in ("token", "tokens") and (isinstance(value, int) or bool({*words} & _OF_TEXT))
    return words[-1] in _LAST_WORDS and not of_text


def without_secrets(value: Any) -> Any:
    """`value` without the entries of mappings, at any depth, that are secrets, and without those in addresses."""
    if isinstance(value, Mapping):
        return {k: without_secrets(entry) for k, entry in value.items() if not is_secret(str(k), entry)}
    if isinstance(value, (list, tuple)):
        return [without_secrets(entry) for entry in value]
    if isinstance(value, str):
        if value.lstrip().startswith("{"):  # as on a command line
            with contextlib.suppress(ValueError):
                return json.dumps(without_secrets(json.loads(value)))
        return _QUERY.sub(rf"\1{HIDDEN}", _USER_AND_PASSWORD.sub(HIDDEN, value))
    return value
