"""`pion-hf run`: see `pion_hf.run`, which launchers can name as a module."""

from pion_hf.run import main

__all__ = ["main"]
