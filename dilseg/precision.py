# SPDX-License-Identifier: Apache-2.0
"""The precision of float32 convolutions on tensor cores."""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch

# Registers torch.ops.dilseg.
from dilseg import ops as ops

__all__ = ["get_float32_conv_precision", "set_float32_conv_precision"]

Float32ConvPrecision = Literal["ieee", "bf16x3", "tf32"]


# A setting inside a compiled function must not become part of the graph, where nothing uses it.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def set_float32_conv_precision(precision: Float32ConvPrecision | None) -> None:
    """Sets how :func:`dilseg.functional.dilated_conv2d` forms products of float32 on a GPU.

    Args:
        precision: Relative rms errors are of sums of 4608 products of normal values.

            - ``"ieee"``: as exact as float32 (3e-7): three bfloat16 parts of a number, six products
              on the tensor cores;
            - ``"bf16x3"``: two parts, three products: 4e-6, the counterpart of torch's ``"high"``;
            - ``"tf32"``: one product of 11-bit numbers: 3e-4;
            - None: what torch's switch for convolutions says,
              ``torch.backends.cudnn.conv.fp32_precision``, which is ``"tf32"`` unless
              ``torch.backends.cudnn.allow_tf32 = False`` or the like was said.

    The setting holds for the process, for calls from now on. The CPU always computes as
    ``"ieee"``.

    Raises:
        ValueError: ``precision`` is none of these.

    Difference from torch:
        torch has no ``"bf16x3"`` for convolutions.

    Example:
        >>> import dilseg
        >>> dilseg.set_float32_conv_precision("bf16x3")
        >>> dilseg.get_float32_conv_precision()
        'bf16x3'
        >>> dilseg.set_float32_conv_precision(None)
    """
    if precision is not None and precision not in get_args(Float32ConvPrecision):
        raise ValueError(
            "dilseg.set_float32_conv_precision: expected precision to be 'ieee', 'bf16x3', 'tf32' "
            f"or None, but got {precision!r}."
        )
    torch.ops.dilseg._set_float32_conv_precision(precision or "")


def get_float32_conv_precision() -> Float32ConvPrecision | None:
    """Returns what :func:`set_float32_conv_precision` has set: None, torch's switch, at first."""
    return cast(Float32ConvPrecision | None, torch.ops.dilseg._get_float32_conv_precision() or None)
