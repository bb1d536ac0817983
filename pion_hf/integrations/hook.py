"""Acting on a module as soon as it is imported, by whomever, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from itertools import dropwhile
from types import ModuleType
from typing import Any

_actions: dict[str, Callable[[ModuleType], None]] = {}


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with the module `name`: now, if it is there, and whenever it is imported or reloaded.

    It is called before anyone else can use the module, perhaps more than once and by several threads.
    """
    _actions[name] = action
    if FINDER not in sys.meta_path:
        others = [f for f in sys.meta_path if type(f).__module__ != __name__]  # none of an earlier import of this file
        sys.meta_path[:] = [FINDER, *others]
    if sys.modules.get(name) is not None:
        action(import_module(name))  # which waits where another thread is still at it


class _Finder:
    """Finds what the finders after it do, and has the modules of `when_imported` acted on when they are executed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _actions:
            return None
        later = dropwhile(lambda finder: finder is not self, list(sys.meta_path))
        next(later, None)  # itself
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in later)), None)
        if hasattr(getattr(spec, "loader", None), "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """A module's own loader, which it has again when it is executed, and then the action."""

    def __init__(self, loader: Any) -> None:
        self.own = loader

    def __getattr__(self, name: str) -> Any:
        if name == "own":  # of a copy that has none yet
            raise AttributeError(name)
        return getattr(self.own, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        _actions[module.__name__](module)


FINDER = _Finder()
