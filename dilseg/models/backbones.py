# SPDX-License-Identifier: Apache-2.0
"""The classifiers that networks are made of: layer tables as data, and the module that runs one.

One table drives a network three times: ``TrunkModel`` builds and runs its modules, ``grids``
computes strides, centres and receptive fields, and ``output_size`` the map sizes. A ``Backbone`` is
the pattern that VGG's tables follow, a ``TableBackbone`` a table written out. Names are the
published ones (conv1_1 ... conv5_3, fc6, fc7; inception_3a/1x1), so state dicts read like the
papers.

Source: Simonyan & Zisserman 2014 (configuration D); Krizhevsky et al. 2012, as Caffe's reference
CaffeNet; Szegedy et al. 2015, as Caffe's GoogLeNet; Long et al. 2015, section 4.1 (fully
convolutional form); Yu & Koltun 2016, section 4 (front end).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilseg.models.base import SegmentationModel
from dilseg.models.geometry import PIXELS, Grid
from dilseg.nn import DilatedConv2d

__all__ = [
    "BACKBONES",
    "Backbone",
    "Conv2dReLU",
    "Inception",
    "Layer",
    "TableBackbone",
    "TrunkModel",
    "conv_relu",
    "find_backbone",
    "grids",
    "output_size",
    "single_layers",
]


@dataclass(frozen=True)
class Layer:
    """One row of a layer table; ``channels`` is None for a pooling or a normalisation.

    Every convolution has a bias and a ReLU; every pooling is a maximum and rounds its size up, as
    Caffe does; a ``normalizes`` row (kernel 1) divides by the local response of AlexNet: over 5
    channels, alpha 1e-4, beta 0.75, k 1.
    """

    name: str
    kernel: int
    channels: int | None = None
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    normalizes: bool = False


@dataclass(frozen=True)
class Inception:
    """One row of a layer table: branches side by side on one map, their channels concatenated."""

    name: str
    branches: tuple[tuple[Layer, ...], ...]

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return sum(branch[-1].channels or 0 for branch in self.branches)


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

    def fcn_layers(self, fc_channels: int | None = None) -> list[Layer | Inception]:
        """Write down the trunk of an FCN, image to fc7."""
        layers: list[Layer | Inception] = []
        for stage, widths in enumerate(self.stages, start=1):
            for index, channels in enumerate(widths, start=1):
                first = stage == 1 and index == 1
                padding = self.fcn_image_padding if first else 1
                layers.append(Layer(f"conv{stage}_{index}", 3, channels, padding=padding))
            layers.append(Layer(f"pool{stage}", 2, stride=2))
        width = fc_channels or self.fc_channels
        layers.append(Layer("fc6", self.fc_kernel, width, padding=self.fcn_fc_padding))
        layers.append(Layer("fc7", 1, width))
        return layers


@dataclass(frozen=True)
class TableBackbone:
    """A classifier whose layers follow no pattern, written out as the trunk of its FCN.

    Attributes:
        name: What commands and error messages call it.
        layers: The rows, from the image to the map that scores are read from.

    Example:
        >>> grids(BACKBONES["alexnet"].fcn_layers())["fc7"].receptive_field
        355
    """

    name: str
    layers: tuple[Layer | Inception, ...]

    def fcn_layers(self, fc_channels: int | None = None) -> list[Layer | Inception]:
        """Return the rows; ``fc_channels`` changes the width of fc6 and fc7.

        Raises:
            ValueError: ``fc_channels`` is given, and there are no such layers.
        """
        if fc_channels is None:
            return list(self.layers)
        if not any(layer.name == "fc6" for layer in self.layers):
            raise ValueError(
                f"dilseg.models: expected fc_channels None for {self.name!r}, which has no fully "
                f"connected layers before its scores, but got {fc_channels}. Leave it out."
            )
        return [
            replace(layer, channels=fc_channels)
            if isinstance(layer, Layer) and layer.name.startswith("fc")
            else layer
            for layer in self.layers
        ]


def _norm(name: str) -> Layer:
    return Layer(name, 1, normalizes=True)


def _inception(
    name: str, one: int, reduce3: int, three: int, reduce5: int, five: int, pooled: int
) -> Inception:
    """An inception block of GoogLeNet, its widths in the order of the paper's table 1."""
    return Inception(
        name,
        (
            (Layer(f"{name}/1x1", 1, one),),
            (Layer(f"{name}/3x3_reduce", 1, reduce3), Layer(f"{name}/3x3", 3, three, padding=1)),
            (Layer(f"{name}/5x5_reduce", 1, reduce5), Layer(f"{name}/5x5", 5, five, padding=2)),
            (Layer(f"{name}/pool", 3, padding=1), Layer(f"{name}/pool_proj", 1, pooled)),
        ),
    )


BACKBONES: dict[str, Backbone | TableBackbone] = {
    # Padding 100 lets fc6, which has no padding of its own, answer for every image size >= 1.
    "vgg16": Backbone(
        name="vgg16",
        stages=((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
        fc_kernel=7,
        fc_channels=4096,
        fcn_image_padding=100,
        fcn_fc_padding=0,
    ),
    # CaffeNet, which torchvision's AlexNet is not: grouped convolutions, pooling before the
    # normalisation.
    "alexnet": TableBackbone(
        name="alexnet",
        layers=(
            Layer("conv1", 11, 96, stride=4, padding=100),
            Layer("pool1", 3, stride=2),
            _norm("norm1"),
            Layer("conv2", 5, 256, padding=2, groups=2),
            Layer("pool2", 3, stride=2),
            _norm("norm2"),
            Layer("conv3", 3, 384, padding=1),
            Layer("conv4", 3, 384, padding=1, groups=2),
            Layer("conv5", 3, 256, padding=1, groups=2),
            Layer("pool5", 3, stride=2),
            Layer("fc6", 6, 4096),
            Layer("fc7", 1, 4096),
        ),
    ),
    # How the paper padded its FCN-GoogLeNet is not known; 18 is ours: the least padding that
    # answers every image size >= 1, with cell 0 on pixel 15, in the middle of the first 32. The
    # average pooling behind inception_5b is dropped, as in the paper.
    "googlenet": TableBackbone(
        name="googlenet",
        layers=(
            Layer("conv1/7x7_s2", 7, 64, stride=2, padding=18),
            Layer("pool1/3x3_s2", 3, stride=2),
            _norm("pool1/norm1"),
            Layer("conv2/3x3_reduce", 1, 64),
            Layer("conv2/3x3", 3, 192, padding=1),
            _norm("conv2/norm2"),
            Layer("pool2/3x3_s2", 3, stride=2),
            _inception("inception_3a", 64, 96, 128, 16, 32, 32),
            _inception("inception_3b", 128, 128, 192, 32, 96, 64),
            Layer("pool3/3x3_s2", 3, stride=2),
            _inception("inception_4a", 192, 96, 208, 16, 48, 64),
            _inception("inception_4b", 160, 112, 224, 24, 64, 64),
            _inception("inception_4c", 128, 128, 256, 24, 64, 64),
            _inception("inception_4d", 112, 144, 288, 32, 64, 64),
            _inception("inception_4e", 256, 160, 320, 32, 128, 128),
            Layer("pool4/3x3_s2", 3, stride=2),
            _inception("inception_5a", 256, 160, 320, 32, 128, 128),
            _inception("inception_5b", 384, 192, 384, 48, 128, 128),
        ),
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


def find_backbone(backbone: str | Backbone | TableBackbone) -> Backbone | TableBackbone:
    """Look a backbone up by name; a backbone is returned as it is.

    Raises:
        ValueError: No backbone has this name.
    """
    if isinstance(backbone, Backbone | TableBackbone):
        return backbone
    try:
        return BACKBONES[backbone]
    except KeyError:
        raise ValueError(
            f"dilseg.models: expected backbone one of {sorted(BACKBONES)}, but got {backbone!r}. "
            "Pass one of these names, or a dilseg.models.Backbone of your own."
        ) from None


def single_layers(layers: Sequence[Layer | Inception]) -> list[Layer]:
    """List the rows of a table with those inside inception blocks in their place.

    Example:
        >>> len(single_layers(BACKBONES["googlenet"].layers))
        72
    """
    found: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Inception):
            found += [inner for branch in layer.branches for inner in branch]
        else:
            found.append(layer)
    return found


def grids(layers: Sequence[Layer | Inception], start: Grid = PIXELS) -> dict[str, Grid]:
    """Compute the grid of every layer's output, by name; of an inception block, the widest one's.

    Example:
        >>> grids([Layer("conv", 3, 8), Layer("pool", 2, stride=2)])["pool"].receptive_field
        4
    """
    found = {}
    grid = start
    for layer in layers:
        if isinstance(layer, Inception):
            inner = [grids(branch, grid) for branch in layer.branches]
            ends = [branch[row[-1].name] for branch, row in zip(inner, layer.branches, strict=True)]
            found.update({name: each for branch in inner for name, each in branch.items()})
            grid = max(ends, key=lambda end: end.receptive_field)
        else:
            grid = grid.window(
                layer.kernel, stride=layer.stride, padding=layer.padding, dilation=layer.dilation
            )
        found[layer.name] = grid
    return found


def output_size(layers: Sequence[Layer | Inception], size: int) -> int:
    """Compute the side of the last map for an image of side ``size``; below 1 if it is too small.

    Example:
        >>> output_size([Layer("conv", 3, 8), Layer("pool", 2, stride=2)], 9)
        4
    """
    for layer in layers:
        if size < 1:
            return 0
        if isinstance(layer, Inception):  # whose branches agree
            size = output_size(layer.branches[0], size)
            continue
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
    c_in: int,
    c_out: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """Make a convolution with bias and ReLU: this package's own where it is dilated.

    Example:
        >>> type(conv_relu(8, 8, 3, padding=2, dilation=2)).__name__
        'DilatedConv2d'
    """
    if dilation == 1:
        return Conv2dReLU(c_in, c_out, kernel, stride, padding, groups=groups)
    return DilatedConv2d(
        c_in, c_out, kernel, stride, padding, dilation, groups=groups, activation="relu"
    )


class TrunkModel(SegmentationModel):
    """A segmentation model that begins with a layer table.

    Convolutions are attributes named as in the table (He initialisation, zero biases); dropout
    follows fc6 and fc7, element-wise as in Caffe.

    Args:
        num_classes: Channels of the logits.
        backbone: Where the table comes from.
        layers: The table, from the image to the map that scores are read from.
        dropout: Probability of dropping an element of fc6 and of fc7.
        output_stride: See ``SegmentationModel``.
        margin: See ``SegmentationModel``.
        in_channels: See ``SegmentationModel``.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone | TableBackbone,
        layers: Sequence[Layer | Inception],
        *,
        dropout: float,
        output_stride: int,
        margin: int,
        in_channels: int = 3,
    ) -> None:
        """Build the layers; see the class."""
        super().__init__(
            num_classes, output_stride=output_stride, margin=margin, in_channels=in_channels
        )
        self.backbone = backbone
        self.layers = tuple(layers)
        self.feature_channels = self._build(self.layers, in_channels)
        self.dropout = nn.Dropout(dropout)

    def _build(self, layers: Sequence[Layer | Inception], channels: int) -> int:
        """Make the convolutions of some rows; return how many channels come out of the last."""
        for layer in layers:
            if isinstance(layer, Inception):
                channels = sum(self._build(branch, channels) for branch in layer.branches)
            elif layer.channels is not None:
                conv = conv_relu(
                    channels,
                    layer.channels,
                    layer.kernel,
                    stride=layer.stride,
                    padding=layer.padding,
                    dilation=layer.dilation,
                    groups=layer.groups,
                )
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
                setattr(self, layer.name, conv)
                channels = layer.channels
        return channels

    def extract(
        self, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the layer table.

        Args:
            images: ``[n, in_channels, h, w]``, normalised.
            taps: Names of poolings whose outputs are wanted too.

        Returns:
            The output of the last layer, and the wanted outputs by name.
        """
        tapped: dict[str, Tensor] = {}
        return self._run(self.layers, images, taps, tapped), tapped

    def _run(
        self,
        layers: Sequence[Layer | Inception],
        x: Tensor,
        taps: Collection[str],
        tapped: dict[str, Tensor],
    ) -> Tensor:
        for layer in layers:
            if isinstance(layer, Inception):
                x = torch.cat([self._run(row, x, taps, tapped) for row in layer.branches], dim=1)
            elif layer.normalizes:
                x = F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=1.0)
            elif layer.channels is None:
                x = F.max_pool2d(x, layer.kernel, layer.stride, layer.padding, ceil_mode=True)
            else:
                x = getattr(self, layer.name)(x)
                if layer.name.startswith("fc"):
                    x = self.dropout(x)
            if layer.name in taps:
                tapped[layer.name] = x
        return x
