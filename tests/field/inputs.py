"""All inputs, by kind."""

from __future__ import annotations

from tests.field import recipes
from tests.field.trial import Input

INPUTS: list[Input] = [*recipes.INPUTS]
