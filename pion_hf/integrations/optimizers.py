"""What an optimizer inside accelerate's wrapper says of itself."""

from __future__ import annotations

from typing import Any

from pion_hf.optim import MatrixOptimizer


def unwrap(optimizer: Any) -> MatrixOptimizer | None:
    """This package's optimizer inside accelerate's wrapper, or None."""
    while optimizer is not None and not isinstance(optimizer, MatrixOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The learning rate of every kind of group, as log entries.

    For this package's optimizers `learning_rate/<rule>`; where the groups of a rule differ, one entry for each with
    its index: `learning_rate/<rule>/<index>`. For others `learning_rate/<index>`, and none if all groups agree.
    """
    inner = unwrap(optimizer)
    kinds: dict[str, dict[int, dict]] = {}
    for index, group in enumerate(getattr(inner or optimizer, "param_groups", [])):
        kinds.setdefault(f"/{group['rule']}" if inner else "", {})[index] = group
    found = {}
    for kind, groups in kinds.items():
        # With the rate a schedule starts from: groups that differ keep their names where both are at 0.
        rates = {i: (float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for i, group in groups.items()}
        distinct = set(rates.values())
        if len(distinct) > 1:
            found.update({f"learning_rate{kind}/{i}": rate for i, (rate, _) in rates.items()})
        elif inner:
            found[f"learning_rate{kind}"] = distinct.pop()[0]
    return found


def class_name(optimizer: Any) -> str:
    """What is put for a rule where an optimizer is not of this package: `adamw`, `muon`."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__.lower()
