"""torchvision without its operators: a build for GPUs beside a torch without does not even let itself be imported.

Imported before transformers (`pytest -p tests.gallery.operators`), it declares those that torchvision's Python names.
None of the scripts calls them.
"""

from __future__ import annotations

import sys

import torch

NAMED = ("nms", "qnms")
DECLARED = torch.library.Library("torchvision", "FRAGMENT")


def import_torchvision() -> bool:
    """Import torchvision if it is there; returns whether its operators are missing."""
    try:
        import torchvision
    except ImportError:
        return False
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in NAMED:
            DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return not torchvision.extension._has_ops()


MISSING = import_torchvision()
