"""All inputs, by kind."""

from __future__ import annotations

from tests.field import checkpoints, commands, data, optimizers, options, recipes, records
from tests.field.trial import Input

INPUTS: list[Input] = [
    given for kind in (recipes, commands, data, records, checkpoints, options, optimizers) for given in kind.INPUTS
]
