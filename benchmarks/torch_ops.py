# SPDX-License-Identifier: Apache-2.0
"""The operators of dilseg.functional in plain torch: what a network without this package runs on.

    with torch_ops():
        loss = model.scores(images).cross_entropy(labels, ignore_index=255)

runs FCN and DilatedNet, weights and geometry unchanged, on `F.conv2d`, `F.interpolate`,
`F.cross_entropy` and `argmax` alone. Each is written as one would who has torch only and cares for
speed: ReLU in place, and of the scores only the cells that the image sees are upsampled. The fixed
deconvolution of the papers is `F.interpolate` of scores in a ring of zeros: the same map, without a
transposed convolution of as many groups as classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilseg import functional

_Scale = float | Sequence[float] | None


def _dilated_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *geometry: Any,
    activation: str | None = None,
    **options: Any,
) -> Tensor:
    output = F.conv2d(input, weight, bias, *geometry, **options)
    return F.relu(output, inplace=True) if activation == "relu" else output


def _step(n: int, scale: float, align_corners: bool) -> int:
    """Pixels from one of `n` cells to the next.

    Raises:
        ValueError: they are no whole number, as they are in every network of dilseg.models.
    """
    step = (math.floor(n * scale) - 1) / (n - 1) if align_corners else scale
    if step != int(step):
        raise ValueError(f"torch_ops: expected upsampling by a whole factor, but got {step}")
    return int(step)


def _upsample(
    input: Tensor,
    *,
    scale_factor: _Scale = None,
    size: Sequence[int] | None = None,
    align_corners: bool = False,
    border: str = "clamp",
    origin: Sequence[int] = (0, 0),
) -> Tensor:
    """The window of the upsampled map that these arguments of `upsample_add` name."""
    if scale_factor is None:
        return F.interpolate(input, size=size, mode="bilinear", align_corners=align_corners)
    scales = scale_factor if isinstance(scale_factor, Sequence) else (scale_factor,) * 2
    steps = [
        _step(n, scale, align_corners) for n, scale in zip(input.shape[-2:], scales, strict=True)
    ]
    if size is None:
        size = [math.floor(n * scale) for n, scale in zip(input.shape[-2:], scales, strict=True)]
    ring = int(border == "zero")
    if ring:
        input = F.pad(input, (1, 1, 1, 1))
    full, starts = [], []
    for axis, step, length, start in zip((-2, -1), steps, size, origin, strict=True):
        start += ring * step
        # Pixel y mixes two cells of y // step - 1, y // step and y // step + 1.
        first = max(start // step - 1, 0)
        count = min((start + length - 1) // step + 2, input.shape[axis]) - first
        input = input.narrow(axis, first, count)
        full.append(step * (count - 1) + 1 if align_corners else step * count)
        starts.append(start - first * step)
    output = F.interpolate(input, size=full, mode="bilinear", align_corners=align_corners)
    (top, left), (height, width) = starts, size
    return output[..., top : top + height, left : left + width]


def _upsample_add(
    input: Tensor, skip: Tensor | None, *, offset: Sequence[int] = (0, 0), **options: Any
) -> Tensor:
    output = _upsample(input, **options)
    if skip is None:
        return output
    (top, left), (height, width) = offset, output.shape[-2:]
    return output + skip[..., top : top + height, left : left + width]


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
) -> Tensor:
    return F.cross_entropy(input, target.long(), weight, **options)


def _upsample_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **upsampling: Any,
) -> Tensor:
    logits = _upsample(input, size=target.shape[-2:], **upsampling)
    return F.cross_entropy(
        logits,
        target.long(),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _upsample_argmax(
    input: Tensor,
    *,
    dtype: torch.dtype = torch.int64,
    confidence: bool = False,
    **upsampling: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    logits = _upsample(input.detach(), **upsampling)
    labels = logits.argmax(1).to(dtype)
    if not confidence:
        return labels
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return labels, logits.softmax(1, dtype=wide).amax(1)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "dilated_conv2d": _dilated_conv2d,
    "upsample_add": _upsample_add,
    "cross_entropy": _cross_entropy,
    "upsample_cross_entropy": _upsample_cross_entropy,
    "upsample_argmax": _upsample_argmax,
}


@contextlib.contextmanager
def torch_ops() -> Iterator[None]:
    """Lets the networks of dilseg.models, and all else that calls dilseg.functional, run on torch.

    What was recorded for a backward pass inside stays torch's outside. In all threads at once.
    """
    operators = vars(functional)
    own = {name: operators[name] for name in _OPERATORS}
    operators.update(_OPERATORS)
    try:
        yield
    finally:
        operators.update(own)
