# SPDX-License-Identifier: Apache-2.0
"""VGG-shaped trunks: the published layer table as data, and the module that runs it.

One table of ``Layer`` entries drives a network three times: ``TrunkModel`` builds and runs its
modules, ``grids`` computes strides, centres and receptive fields, and ``output_size`` the map
sizes. Names are the published ones (conv1_1 ... conv5_3, fc6, fc7), so state dicts read like the
papers.

Source: Simonyan & Zisserman 2014 (configuration D); Long et al. 2015, section 4.1 (fully
convolutional form); Yu & Koltun 2016, section 4 (front end).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dilseg.models.base import SegmentationModel
from dilseg.models.geometry import PIXELS, Grid
from dilseg.nn import DilatedConv2d

__all__ = [
    "BACKBONES",
    "Backbone",
    "Conv2dReLU",
    "Layer",
    "TrunkModel",
    "conv_relu",
    "find_backbone",
    "grids",
    "output_size",
]


@dataclass(frozen=True)
class Backbone:
    """The widths and the padding of a VGG-shaped classifier.

    Attributes:
        name: What commands and error messages call it.
        stages: Output channels of each 3x3 convolution of each stage; stages end in a 2x2 pooling.
        fc_kernel: Side of fc6, the first fully connected layer made convolutional.
        fc_channels: Default width of fc6 and fc7.
        fcn_image_padding: Zeros around the image (the padding of conv1_1) in the FCN family.
        fcn_fc_padding: Padding of fc6 in the FCN family.

    Example:
        >>> BACKBONES["vgg16"].fcn_image_padding
        100
    """

    name: str
    stages: tuple[tuple[int, ...], ...]
    fc_kernel: int
    fc_channels: int
    fcn_image_padding: int
    fcn_fc_padding: int

    def conv_names(self) -> list[str]:
        """Names of the 3x3 convolutions, in order."""
        return [
            f"conv{stage}_{index}"
            for stage, widths in enumerate(self.stages, start=1)
            for index in range(1, len(widths) + 1)
        ]


BACKBONES: dict[str, Backbone] = {
    # Padding 100 lets fc6, which has no padding of its own, answer for every image size >= 1.
    "vgg16": Backbone(
        name="vgg16",
        stages=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
        fc_kernel=7,
        fc_channels=4096,
        fcn_image_padding=100,
        fcn_fc_padding=0,
    ),
    # Same strides, seven convolutions, and "same" padding throughout: padding by 100 would triple
    # the side of a 96-pixel image. The crops follow from the padding, see `FCN`.
    "demo": Backbone(
        name="demo",
        stages=((16,), (32,), (64, 64), (96, 96), (128,)),
        fc_kernel=3,
        fc_channels=128,
        fcn_image_padding=1,
        fcn_fc_padding=1,
    ),
}
"""The backbones that have a name."""


def find_backbone(backbone: str | Backbone) -> Backbone:
    """Look a backbone up by name; a ``Backbone`` is returned as it is.

    Raises:
        ValueError: No backbone has this name.
    """
    if isinstance(backbone, Backbone):
        return backbone
    try:
        return BACKBONES[backbone]
    except KeyError:
        raise ValueError(
            f"dilseg.models: expected backbone one of {sorted(BACKBONES)}, but got {backbone!r}. "
            "Pass one of these names, or a dilseg.models.Backbone of your own."
        ) from None


@dataclass(frozen=True)
class Layer:
    """One row of a layer table; ``channels`` is None for a pooling.

    Every convolution has a bias and a ReLU; every pooling is a maximum and rounds its size up, as
    Caffe does.
    """

    name: str
    kernel: int
    channels: int | None = None
    stride: int = 1
    padding: int = 0
    dilation: int = 1


def grids(layers: Sequence[Layer]) -> dict[str, Grid]:
    """Compute the grid of every layer's output, by name.

    Example:
        >>> grids([Layer("conv", 3, 8), Layer("pool", 2, stride=2)])["pool"].receptive_field
        4
    """
    found = {}
    grid = PIXELS
    for layer in layers:
        grid = grid.window(
            layer.kernel, stride=layer.stride, padding=layer.padding, dilation=layer.dilation
        )
        found[layer.name] = grid
    return found


def output_size(layers: Sequence[Layer], size: int) -> int:
    """Compute the side of the last map for an image of side ``size``; below 1 if it is too small.

    Example:
        >>> output_size([Layer("conv", 3, 8), Layer("pool", 2, stride=2)], 9)
        4
    """
    for layer in layers:
        if size < 1:
            return 0
        steps = size + 2 * layer.padding - layer.dilation * (layer.kernel - 1) - 1
        size = (-(-steps // layer.stride) if layer.channels is None else steps // layer.stride) + 1
    return size


class Conv2dReLU(nn.Conv2d):
    """``nn.Conv2d`` whose output passes a ReLU in place: the negative half is never kept.

    Example:
        >>> import torch
        >>> bool((Conv2dReLU(2, 4, 1)(torch.randn(1, 2, 5, 5)) >= 0).all())
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve, add the bias, apply ReLU; shapes as ``nn.Conv2d``."""
        return F.relu(super().forward(input), inplace=True)


def conv_relu(
    c_in: int, c_out: int, kernel: int, *, padding: int = 0, dilation: int = 1
) -> nn.Conv2d:
    """Make a convolution with bias and ReLU: this package's own where it is dilated.

    Example:
        >>> type(conv_relu(8, 8, 3, padding=2, dilation=2)).__name__
        'DilatedConv2d'
    """
    if dilation == 1:
        return Conv2dReLU(c_in, c_out, kernel, padding=padding)
    return DilatedConv2d(c_in, c_out, kernel, padding=padding, dilation=dilation, activation="relu")


class TrunkModel(SegmentationModel):
    """A segmentation model that begins with a layer table.

    Convolutions are attributes named as in the table (He initialisation, zero biases); dropout
    follows fc6 and fc7, element-wise as in Caffe.

    Args:
        num_classes: Channels of the logits.
        backbone: Where the widths come from.
        layers: The table, from the image to fc7.
        dropout: Probability of dropping an element of fc6 and of fc7.
        output_stride: See ``SegmentationModel``.
        margin: See ``SegmentationModel``.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        layers: Sequence[Layer],
        *,
        dropout: float,
        output_stride: int,
        margin: int,
    ) -> None:
        """Build the layers; see the class."""
        super().__init__(num_classes, output_stride=output_stride, margin=margin)
        self.backbone = backbone
        self.layers = tuple(layers)
        channels = 3
        for layer in layers:
            if layer.channels is None:
                continue
            conv = conv_relu(
                channels,
                layer.channels,
                layer.kernel,
                padding=layer.padding,
                dilation=layer.dilation,
            )
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            setattr(self, layer.name, conv)
            channels = layer.channels
        self.fc_channels = channels
        self.dropout = nn.Dropout(dropout)

    def extract(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the layer table.

        Args:
            images: ``[n, 3, h, w]``, normalised.
            taps: Names of poolings whose outputs are wanted too.

        Returns:
            The output of the last layer, and the wanted outputs by name.
        """
        tapped: dict[str, Tensor] = {}
        x = images
        for layer in self.layers:
            if layer.channels is None:
                x = F.max_pool2d(x, layer.kernel, layer.stride, layer.padding, ceil_mode=True)
            else:
                x = getattr(self, layer.name)(x)
                if layer.name.startswith("fc"):
                    x = self.dropout(x)
            if layer.name in taps:
                tapped[layer.name] = x
        return x, tapped
