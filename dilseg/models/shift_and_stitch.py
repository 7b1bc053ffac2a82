# SPDX-License-Identifier: Apache-2.0
"""Dense predictions of a net that subsamples, in two ways that agree: the bridge of the two papers.

Shift-and-stitch runs the net on every shifted image and interlaces the results. Removing the
strides and dilating what follows by them computes the same numbers in one run: Long et al. show it
of "filter rarefaction" and leave it aside, Yu & Koltun build their front end that way.

Source: Long et al. 2015, section 3.2; Yu & Koltun 2016, sections 2 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dilseg.models.backbones import Conv2dReLU
from dilseg.models.convolutionalize import ELEMENTWISE_MODULES
from dilseg.nn import DilatedConv2d

__all__ = ["remove_stride", "shift_and_stitch"]

_CONVOLUTIONS = (nn.Conv2d, Conv2dReLU, DilatedConv2d)  # not their other subclasses
# One position of the map at a time, so strides mean nothing to them.
_POINTWISE = (*ELEMENTWISE_MODULES, nn.Dropout2d, nn.BatchNorm2d, nn.LocalResponseNorm)


def shift_and_stitch(
    net: Callable[[Tensor], Tensor], images: Tensor, stride: int, *, step: int = 1
) -> Tensor:
    """Run a net on the shifted images and interlace its outputs into one dense map.

    Cell ``(y, x)`` of the result is what the net gives in its first cell for the images without
    their first ``step * y`` rows and ``step * x`` columns. That takes ``(stride / step)^2`` runs.

    Args:
        net: Maps ``[n, c, h, w]`` to ``[n, k, rows, columns]`` of the given stride.
        images: ``[n, c, h, w]``, large enough for the net after ``stride - step`` rows and columns
            are taken away.
        stride: Pixels between neighbouring cells of the net, along both axes.
        step: Pixels between neighbouring cells of the result; divides ``stride``.

    Returns:
        ``[n, k, rows, columns]`` of stride ``step``: all positions without a gap before them.

    Raises:
        ValueError: ``step`` does not divide ``stride``, or one is below 1.

    Difference from torch: torch has no such function. The paper shifts zeros in at the top and
    left; here rows and columns are left out instead, so that no result depends on pixels that are
    not there.

    Source: Long et al. 2015, section 3.2 (shift-and-stitch).

    Example:
        >>> import torch
        >>> halve = nn.MaxPool2d(1, 2)  # every other pixel
        >>> image = torch.arange(9.0).view(1, 1, 3, 3)
        >>> torch.equal(shift_and_stitch(halve, image, 2), image)
        True
    """
    if step < 1 or stride < 1 or stride % step:
        raise ValueError(
            f"dilseg.models.shift_and_stitch: expected a step >= 1 that divides the stride, but "
            f"got step {step} and stride {stride}. Use step=1 for a cell per pixel."
        )
    shifts = stride // step
    parts = [
        [net(images[:, :, step * y :, step * x :]) for x in range(shifts)] for y in range(shifts)
    ]
    # Of shift y, cell i belongs to row shifts * i + y; the first row that is missing ends the map.
    rows = min(shifts * line[0].shape[-2] + y for y, line in enumerate(parts))
    columns = min(shifts * part.shape[-1] + x for x, part in enumerate(parts[0]))
    first = parts[0][0]
    stitched = first.new_empty((*first.shape[:2], rows, columns))
    for y, line in enumerate(parts):
        for x, part in enumerate(line):
            places = stitched[:, :, y::shifts, x::shifts]
            places.copy_(part[:, :, : places.shape[-2], : places.shape[-1]])
    return stitched


def remove_stride(net: nn.Sequential, *, keep: int = 1) -> nn.Sequential:
    """Make the net that computes ``shift_and_stitch(net, ...)`` in one run.

    A convolution or pooling of stride s gets stride 1, and the windows of every layer after it are
    dilated by s. Convolutions dilated above 1 become ``dilseg.DilatedConv2d``, with a ReLU fused
    where there was one.

    Args:
        net: Convolutions (``nn.Conv2d`` and this package's), ``nn.MaxPool2d``, element-wise layers
            and batch norms, in order; ``nn.Sequential`` inside it too.
        keep: Stride that stays: the first layers, up to this stride in all, keep theirs. 8 of a
            VGG-16 leaves the strides of pool1 to pool3 alone.

    Returns:
        A net of stride ``keep`` with the names, the mode and the very parameters of ``net``.
        ``shift_and_stitch(net, images, stride, step=keep)`` equals it on all its cells within
        rounding, if no layer pads up to the last one that had a stride. Padding (scaled along with
        the dilation) after that is the same too; before that, cells near the border differ, since a
        shifted image has its padding elsewhere. A pooling that rounds up (``ceil_mode``) may answer
        for windows that hang over the edge: shift-and-stitch then has more cells.

    Raises:
        ValueError: ``keep`` is no stride that the net has on its way, or a layer steps unequally
            along the two axes, or pads other than by a number of zeros.
        NotImplementedError: Another kind of layer (the message names it), or a pooling that returns
            positions, or pads where it is to be dilated.

    Difference from torch: torch has no such function.

    Source: Long et al. 2015, section 3.2 ("shift-and-stitch is filter rarefaction"); the algorithme
    a trous. With the poolings that lose their stride left out, it makes Yu & Koltun's front end of
    VGG-16.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3))
        >>> dense = remove_stride(net)
        >>> dense[2].stride, dense[3].dilation, dense[3].weight is net[3].weight
        (1, (2, 2), True)
        >>> images = torch.rand(1, 3, 13, 16)
        >>> torch.allclose(dense(images), shift_and_stitch(net, images, 2), atol=1e-6)
        True
    """
    dense, kept, _ = _without_stride(net, "", keep, 1, 1)
    if kept != keep:
        raise ValueError(
            "dilseg.models.remove_stride: expected keep to be a stride that the net has on its "
            f"way, but got {keep}; the largest up to it is {kept}. Use keep={kept}."
        )
    return dense


def _without_stride(
    net: nn.Sequential, prefix: str, keep: int, kept: int, dilation: int
) -> tuple[nn.Sequential, int, int]:
    """The new layers, and what the strides that were kept and those removed so far come to."""
    dense = nn.Sequential()
    dense.training = net.training
    for name, layer in net.named_children():
        path = f"{prefix}{name}"
        if isinstance(layer, nn.Sequential):
            layer, kept, dilation = _without_stride(layer, f"{path}.", keep, kept, dilation)
        elif isinstance(layer, nn.MaxPool2d) or type(layer) in _CONVOLUTIONS:
            assert isinstance(layer, nn.Conv2d | nn.MaxPool2d)
            stride = _pair(layer.stride)
            if stride[0] != stride[1]:
                raise ValueError(
                    "dilseg.models.remove_stride: expected equal strides along both axes, but got "
                    f"{stride} in {path}. The cells of such a net have no one distance."
                )
            if dilation == 1 and kept * stride[0] <= keep:
                kept *= stride[0]
            else:
                layer = _dilated(path, layer, dilation)
                dilation *= stride[0]
        elif not isinstance(layer, _POINTWISE):
            raise NotImplementedError(
                "dilseg.models.remove_stride: expected convolutions, max poolings, element-wise "
                f"layers and batch norms, but got {path} ({type(layer).__name__}). Make a "
                "classifier's linear layers convolutions first (convolutionalize)."
            )
        dense.add_module(name, layer)
    return dense, kept, dilation


def _dilated(path: str, layer: nn.Module, dilation: int) -> nn.Module:
    """The layer with stride 1 and its window dilated; parameters are shared."""
    if isinstance(layer, nn.MaxPool2d):
        if layer.return_indices or (dilation > 1 and _pair(layer.padding) != (0, 0)):
            raise NotImplementedError(
                "dilseg.models.remove_stride: expected a pooling that pads nothing where it is to "
                f"be dilated, and returns its maxima alone, but got {path} = {layer}. Pad by a "
                "layer or by the images instead."
            )
        own = _pair(layer.dilation)
        pooling = nn.MaxPool2d(
            layer.kernel_size, 1, layer.padding, (own[0] * dilation, own[1] * dilation)
        )
        pooling.training = layer.training
        return pooling
    assert isinstance(layer, nn.Conv2d)
    padding = _zeros_around(path, layer)
    # One tap has no neighbour to be apart from.
    dilations = tuple(
        own * dilation if size > 1 else 1
        for own, size in zip(_pair(layer.dilation), layer.kernel_size, strict=True)
    )
    relu = isinstance(layer, Conv2dReLU) or getattr(layer, "activation", None) == "relu"
    arguments: dict[str, Any] = {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "padding": (padding[0] * dilation, padding[1] * dilation),
        "dilation": dilations,
        "groups": layer.groups,
        "bias": layer.bias is not None,
        "device": "meta",
    }
    conv: nn.Conv2d
    if dilations != (1, 1):
        conv = DilatedConv2d(**arguments, activation="relu" if relu else None)
    else:
        conv = (Conv2dReLU if relu else nn.Conv2d)(**arguments)
    conv.weight, conv.bias = layer.weight, layer.bias
    conv.training = layer.training
    return conv


def _zeros_around(path: str, conv: nn.Conv2d) -> tuple[int, int]:
    """Zeros on each side of the map, per axis.

    Raises:
        ValueError: It pads by other values than zeros, or by other numbers on the two sides.
    """
    padding = conv.padding
    if padding == "same" and all(size % 2 for size in conv.kernel_size):
        own = _pair(conv.dilation)
        padding = (own[0] * (conv.kernel_size[0] // 2), own[1] * (conv.kernel_size[1] // 2))
    padding = (0, 0) if padding == "valid" else padding
    if isinstance(padding, str) or (conv.padding_mode != "zeros" and padding != (0, 0)):
        raise ValueError(
            f"dilseg.models.remove_stride: expected padding by equal numbers of zeros, but {path} "
            f"has padding={conv.padding!r}, padding_mode={conv.padding_mode!r} and a kernel of "
            f"{conv.kernel_size}. Pad the images instead."
        )
    return _pair(padding)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
