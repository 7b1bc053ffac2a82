# SPDX-License-Identifier: Apache-2.0
"""Hand-written CUDA kernels for dense prediction, with FCN and DilatedNet built on them.

The four lines of a swap::

    import dilseg

    report = dilseg.swap_conv2d(model)  # dilated nn.Conv2d -> dilseg.DilatedConv2d, in place
    print(report)

Operators are in :mod:`dilseg.functional` and, for traced code, ``torch.ops.dilseg``; modules here;
whole networks in :mod:`dilseg.models`; datasets in :mod:`dilseg.data`; ``python -m dilseg --help``
lists the commands.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

# First, because it says in one sentence what is missing: torch, or a binary that fits it.
from dilseg._extension import build_info

# isort: split
from dilseg import functional
from dilseg.nn import CrossEntropyLoss, DilatedConv2d, UpsampleAdd, UpsampleCrossEntropyLoss
from dilseg.precision import get_float32_conv_precision, set_float32_conv_precision
from dilseg.swap import SwapReport, restore_conv2d, swap_conv2d

if TYPE_CHECKING:
    from dilseg import data, models

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "DilatedConv2d",
    "SwapReport",
    "UpsampleAdd",
    "UpsampleCrossEntropyLoss",
    "__version__",
    "build_info",
    "data",
    "functional",
    "get_float32_conv_precision",
    "models",
    "restore_conv2d",
    "set_float32_conv_precision",
    "swap_conv2d",
]

# Imported on first use: they bring NumPy and image code that operators do without.
_LAZY_MODULES = ("data", "models")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"dilseg.{name}")
    raise AttributeError(f"module 'dilseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
