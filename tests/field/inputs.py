"""All inputs, by kind."""

from __future__ import annotations

from tests.field import checkpoints, commands, data, models, optimizers, options, recipes, records
from tests.field.trial import Input

KINDS = (recipes, commands, data, models, records, checkpoints, options, optimizers)
INPUTS: list[Input] = [given for kind in KINDS for given in kind.INPUTS]
