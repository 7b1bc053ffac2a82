# SPDX-License-Identifier: Apache-2.0
"""DilatedNet: a front end that keeps stride 8 by dilation, and a context module on its scores.

    front end:  VGG-16 without pool4 and pool5, no padding; conv5 dilation 2, fc6 7x7 dilation 4
    context:    3x3 convolutions of dilation 1 1 2 4 8 16 1 and a 1x1, on the class scores
    N pixels -> (N - 372) / 8 cells; cell i is centred on the 8x8 block that starts at 186 + 8 i

Source: Yu & Koltun 2016, sections 3 and 4; the authors' published code and prototxts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dilseg.models.backbones import (
    Backbone,
    Layer,
    TableBackbone,
    TrunkModel,
    conv_relu,
    find_backbone,
    grids,
    output_size,
)
from dilseg.models.base import SegmentationModel
from dilseg.models.scores import Scores

__all__ = [
    "ContextModule",
    "DilatedFrontEnd",
    "DilatedNet",
    "dilatednet",
    "identity_init_",
    "reflect_pad",
]

_STRIDE = 8


def reflect_pad(images: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Pad by reflection about the border pixels (reflect-101), by any amount.

    The border pixel is not repeated: ``c b | a b c | b a``. Beyond one reflection the pattern goes
    on with period ``2 * (size - 1)``, so images smaller than the padding work; one of size 1
    repeats.

    Args:
        images: ``[..., h, w]``, any dtype, h and w >= 1.
        top: Rows to add above; likewise ``bottom``, ``left``, ``right``; all >= 0.
        bottom: Rows to add below.
        left: Columns to add on the left.
        right: Columns to add on the right.

    Returns:
        ``[..., top + h + bottom, left + w + right]``.

    Example:
        >>> reflect_pad(torch.tensor([[0, 1, 2]]), 0, 0, 3, 4)
        tensor([[1, 2, 1, 0, 1, 2, 1, 0, 1, 2]])

    Difference from torch: ``F.pad(mode="reflect")`` requires the padding to be below the size.
    Source: the border rule of the published code (OpenCV's BORDER_REFLECT_101).
    """
    for dim, (before, after) in ((-2, (top, bottom)), (-1, (left, right))):
        if before == 0 and after == 0:
            continue
        size = images.shape[dim]
        period = max(2 * (size - 1), 1)
        index = torch.arange(-before, size + after, device=images.device).remainder(period)
        images = images.index_select(dim, torch.minimum(index, period - index))
    return images


def _front_end_layers(backbone: Backbone, fc_channels: int) -> list[Layer]:
    """Write down the trunk of the front end, image to fc7; every convolution is valid."""
    layers = []
    for stage, widths in enumerate(backbone.stages, start=1):
        dilation = 2 if stage == 5 else 1
        for index, channels in enumerate(widths, start=1):
            layers.append(Layer(f"conv{stage}_{index}", 3, channels, dilation=dilation))
        if stage <= 3:
            layers.append(Layer(f"pool{stage}", 2, stride=2))
    layers.append(Layer("fc6", backbone.fc_kernel, fc_channels, dilation=4))
    layers.append(Layer("fc7", 1, fc_channels))
    return layers


class DilatedFrontEnd(TrunkModel):
    """The front end: dense class scores of stride 8 without any padding.

    Args:
        num_classes: Channels of the scores.
        backbone: "vgg16", "demo", or a ``Backbone``.
        fc_channels: Width of fc6 and fc7; None takes the backbone's (VGG-16: 4096).
        dropout: Probability of dropping an element of fc6 and of fc7.

    Attributes:
        margin: Pixels per side that the scores do not cover (VGG-16: 186).
        output_stride: 8.
        receptive_field: Pixels seen by one cell (VGG-16: 380).
        smallest_input: The smallest side that ``forward`` accepts (VGG-16: 373).

    Raises:
        ValueError: An unknown backbone, or one that is not VGG-shaped.

    Example:
        >>> model = DilatedFrontEnd(4, "demo")
        >>> model.margin
        75
        >>> model(torch.zeros(1, 3, 2 * 75 + 24, 2 * 75 + 16)).shape  # exactly 3 x 2 cells
        torch.Size([1, 4, 3, 2])
        >>> model.segment(torch.zeros(1, 3, 21, 16)).shape
        torch.Size([1, 4, 21, 16])

    Source: Yu & Koltun 2016, section 4.
    """

    def __init__(
        self,
        num_classes: int = 21,
        backbone: str | Backbone = "vgg16",
        *,
        fc_channels: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        """Build the layers; see the class."""
        chosen = find_backbone(backbone)
        if isinstance(chosen, TableBackbone):
            raise ValueError(
                f"dilseg.models.DilatedFrontEnd: expected a VGG-shaped backbone, but got "
                f"{chosen.name!r}. Use 'vgg16'."
            )
        layers = _front_end_layers(chosen, fc_channels or chosen.fc_channels)
        grid = grids(layers)["fc7"]
        # Cell 0 speaks for the stride x stride block around its centre; what lies before that
        # block is the margin.
        margin = int(grid.start - (grid.stride - 1) / 2)
        super().__init__(
            num_classes, chosen, layers, dropout=dropout, output_stride=_STRIDE, margin=margin
        )
        self.receptive_field = grid.receptive_field
        self.smallest_input = next(
            size for size in range(1, self.receptive_field + 1) if output_size(layers, size) >= 1
        )
        self.final = nn.Conv2d(self.feature_channels, num_classes, 1)
        nn.init.normal_(self.final.weight, std=0.001)
        if self.final.bias is not None:
            nn.init.zeros_(self.final.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores for the inner part of the images.

        Args:
            images: ``[n, 3, h, w]``, normalised. For h of the form ``2 * margin + 8 * k`` the
                result has exactly k rows; other heights give what rounding the poolings up gives,
                as in Caffe (VGG-16: width 1640 gives 159).

        Returns:
            Scores ``[n, num_classes, rows, columns]`` of stride 8.

        Raises:
            ValueError: The images are smaller than ``smallest_input``.
        """
        h, w = images.shape[-2:]
        if h < self.smallest_input or w < self.smallest_input:
            raise ValueError(
                f"dilseg.models.DilatedFrontEnd: expected images of at least "
                f"{self.smallest_input} x {self.smallest_input} pixels, but got {h} x {w}. Call "
                f"segment(images), which adds a margin of {self.margin}, or pad them yourself."
            )
        features, _ = self.extract(images)
        scores: Tensor = self.final(features)
        return scores

    def cells(self, images: Tensor, *, tile: int | None = None) -> Tensor:
        """Compute scores that cover the whole images, one cell per 8x8 block.

        The images are reflected by ``margin`` on every side, and at the bottom and on the right to
        whole blocks.

        Args:
            images: ``[n, 3, h, w]``, normalised; any h, w >= 1.
            tile: None for one pass. Otherwise the side in pixels, a multiple of 8, of the tiles
                that are computed one after another; since nothing inside the net is padded, the
                scores are the same, and the largest maps shrink to ``tile + 2 * margin``.

        Returns:
            Scores ``[n, num_classes, ceil(h / 8), ceil(w / 8)]``.

        Raises:
            ValueError: ``tile`` is not a positive multiple of 8.
        """
        h, w = images.shape[-2:]
        m = self.margin
        padded = reflect_pad(images, m, m + -h % _STRIDE, m, m + -w % _STRIDE)
        if tile is None:
            scores: Tensor = self(padded)
            return scores
        if tile < 1 or tile % _STRIDE:
            raise ValueError(
                f"dilseg.models.DilatedFrontEnd: expected tile a positive multiple of {_STRIDE}, "
                f"but got {tile}. Use {max(_STRIDE, tile // _STRIDE * _STRIDE)}."
            )
        side = tile + 2 * m
        rows = [
            torch.cat(
                [self(padded[..., y : y + side, x : x + side]) for x in range(0, w, tile)], dim=-1
            )
            for y in range(0, h, tile)
        ]
        return torch.cat(rows, dim=-2)

    def segment(self, images: Tensor, *, tile: int | None = None) -> Tensor:
        """Compute logits at image size; arguments as ``cells``.

        Returns:
            Logits ``[n, num_classes, h, w]``: the cells upsampled bilinearly between their centres.
        """
        return _scores(self.cells(images, tile=tile), images).logits()

    def scores(
        self,
        images: Tensor,
        *,
        tile: int | None = None,
        anchor: Literal["centre", "corner"] = "centre",
    ) -> Scores:
        """Compute the cells, and how they become logits.

        Args:
            images: As in ``cells``.
            tile: As in ``cells``.
            anchor: As in ``Scores``: "corner" is how the released VOC, CamVid and KITTI nets zoom.

        Returns:
            Scores ``[n, num_classes, ceil(h / 8), ceil(w / 8)]`` of stride 8 with ``border``
            "clamp"; anchored at the centre, their ``logits()`` are ``segment(images, tile=tile)``.

        Example:
            >>> DilatedFrontEnd(4, "demo").scores(torch.zeros(1, 3, 21, 16)).scores.shape
            torch.Size([1, 4, 3, 2])
        """
        return _scores(self.cells(images, tile=tile), images, anchor=anchor)


def _scores(
    cells: Tensor,
    images: Tensor,
    border: Literal["clamp", "zero"] = "clamp",
    anchor: Literal["centre", "corner"] = "centre",
) -> Scores:
    """Say that logits are cells upsampled by 8, and of them the part that lies on the images.

    Cell i is centred on block i, so the half-pixel rule of ``upsample_add`` aligns with the image.
    """
    size = images.shape[-2], images.shape[-1]
    return Scores(cells, size, _STRIDE, border, anchor=anchor)


def identity_init_(weight: Tensor, num_classes: int, *, sigma: float = 0.01) -> Tensor:
    """Fill a convolution's weight, in place, so that it passes class maps through.

    Both channel counts are multiples of ``num_classes``. The centre tap from input channel a to
    output channel b is ``num_classes / c_out`` where ``floor(a * num_classes / c_in)`` equals
    ``floor(b * num_classes / c_out)``; every other entry is drawn from N(0, sigma^2).

    Args:
        weight: ``[c_out, c_in, k, k]``, k odd.
        num_classes: Classes; divides ``c_out`` and ``c_in``.
        sigma: Standard deviation of the noise, much smaller than ``num_classes / c_out``.

    Returns:
        ``weight``.

    Raises:
        ValueError: ``num_classes`` does not divide both channel counts, or k is even.

    Example:
        >>> identity_init_(torch.empty(4, 2, 1, 1), 2, sigma=0.0)[:, :, 0, 0]
        tensor([[0.5000, 0.0000],
                [0.5000, 0.0000],
                [0.0000, 0.5000],
                [0.0000, 0.5000]])

    Source: Yu & Koltun 2016, equations 4 and 5; the authors' IdentityFiller (same order: noise
    first, then the taps).
    """
    c_out, c_in, k_h, k_w = weight.shape
    if c_out % num_classes or c_in % num_classes:
        raise ValueError(
            f"dilseg.models.identity_init_: expected weight [c_out, c_in, k, k] with channels that "
            f"are multiples of num_classes={num_classes}, but got {tuple(weight.shape)}. "
            "Choose widths that are multiples of the number of classes."
        )
    if k_h % 2 == 0 or k_w % 2 == 0:
        raise ValueError(
            f"dilseg.models.identity_init_: expected weight with odd kernel sides, but got "
            f"{k_h} x {k_w}. An even kernel has no centre."
        )
    out_class = torch.arange(c_out) * num_classes // c_out
    in_class = torch.arange(c_in) * num_classes // c_in
    same = (out_class[:, None] == in_class[None, :]).to(weight.device)
    with torch.no_grad():
        weight.normal_(std=sigma)
        centre = weight[:, :, k_h // 2, k_w // 2]
        centre.masked_fill_(same, num_classes / c_out)
    return weight


class ContextModule(nn.Module):
    """Aggregates context on class scores at one resolution, by growing dilations.

    A 3x3 convolution with ReLU per entry of ``dilations``, then a 1x1 without. Layers are named as
    published: ctx_conv1_1, ctx_conv1_2, ctx_conv2_1, ..., ctx_fc1, ctx_final.

    Args:
        num_classes: Channels of input and output.
        width: "basic" keeps ``num_classes`` channels throughout; "large" has ``2 * num_classes``
            channels times the largest dilation so far (2, 2, 4, 8, 16, 32, 32, then 1).
        dilations: Of the 3x3 convolutions. The default is the published eight-layer form;
            (1, 1, 2, 4, 8, 1) is the one for KITTI, (1, 1, 2, 4, 8, 16, 32, 64, 1) the one for
            Cityscapes.
        padding: "layer" pads every convolution by its dilation, "input" pads once, before the
            first one, by the sum (33). Both keep the size; near borders they differ, because in
            the second form the padding ring takes part in every layer. The published VOC net uses
            "input", the others "layer".
        sigma: Noise of the identity initialisation.

    Attributes:
        receptive_field: Cells seen by one output cell.

    Raises:
        ValueError: An unknown ``width`` or ``padding``, or a dilation below 1.

    Example:
        >>> context = ContextModule(2, sigma=0.0)
        >>> scores = torch.rand(1, 2, 5, 7)
        >>> torch.equal(context(scores), scores), context.receptive_field
        (True, 67)

    Source: Yu & Koltun 2016, section 3, table 1.
    """

    def __init__(
        self,
        num_classes: int = 21,
        width: Literal["basic", "large"] = "basic",
        dilations: Sequence[int] = (1, 1, 2, 4, 8, 16, 1),
        *,
        padding: Literal["layer", "input"] = "layer",
        sigma: float = 0.01,
    ) -> None:
        """Build the layers; see the class."""
        super().__init__()
        if width not in ("basic", "large"):
            raise ValueError(
                f"dilseg.models.ContextModule: expected width 'basic' or 'large', but got "
                f"{width!r}. Basic is the one to start with."
            )
        if padding not in ("layer", "input"):
            raise ValueError(
                f"dilseg.models.ContextModule: expected padding 'layer' or 'input', but got "
                f"{padding!r}. 'layer' pads each convolution by its own dilation."
            )
        if not dilations or min(dilations) < 1:
            raise ValueError(
                f"dilseg.models.ContextModule: expected dilations one or more numbers >= 1, but "
                f"got {tuple(dilations)}. The published ones are (1, 1, 2, 4, 8, 16, 1)."
            )
        self.num_classes = num_classes
        self.receptive_field = 1 + 2 * sum(dilations)
        names = [f"ctx_conv{max(i, 1)}_{1 + (i == 1)}" for i in range(len(dilations) - 1)]
        names.append("ctx_fc1")
        c_in, largest = num_classes, 1
        for index, (name, dilation) in enumerate(zip(names, dilations, strict=True)):
            largest = max(largest, dilation)
            c_out = num_classes if width == "basic" else 2 * largest * num_classes
            once = sum(dilations) if index == 0 else 0
            pad = dilation if padding == "layer" else once
            setattr(self, name, conv_relu(c_in, c_out, 3, padding=pad, dilation=dilation))
            c_in = c_out
        self.ctx_final = nn.Conv2d(c_in, num_classes, 1)
        self._names = tuple(names)
        self.initialise(sigma)

    def initialise(self, sigma: float = 0.01) -> None:
        """Set identity weights with noise of standard deviation ``sigma``, and zero biases."""
        for conv in self.children():
            if isinstance(conv, nn.Conv2d):
                identity_init_(conv.weight, self.num_classes, sigma=sigma)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, scores: Tensor) -> Tensor:
        """Refine scores ``[n, num_classes, h, w]``; the result has the same shape."""
        for name in self._names:
            scores = getattr(self, name)(scores)
        refined: Tensor = self.ctx_final(scores)
        return refined


class DilatedNet(SegmentationModel):
    """A front end, and a context module on its scores.

    Training in stages: train the front end alone, then the context module with the front end
    frozen, then optionally both. ``load_stage`` carries weights from one stage to the next.

    Args:
        front_end: Computes scores of stride 8.
        context: Refines them; None for the front end alone.
        border: How logits end at the border of the images: "clamp" interpolates towards the
            outermost cells, "zero" is the published Cityscapes net's deconvolution (ctx_upsample),
            which takes what lies outside as zero. The two differ on the outer 4 pixels by one
            positive factor for all classes: in probabilities, not in labels.

    Raises:
        ValueError: The two parts have different numbers of classes, or an unknown ``border``.

    Example:
        >>> net = DilatedNet(DilatedFrontEnd(3, "demo"), ContextModule(3))
        >>> net.segment(torch.zeros(1, 3, 20, 30)).shape
        torch.Size([1, 3, 20, 30])

    Source: Yu & Koltun 2016.
    """

    def __init__(
        self,
        front_end: DilatedFrontEnd,
        context: ContextModule | None = None,
        *,
        border: Literal["clamp", "zero"] = "clamp",
    ) -> None:
        """Store the parts; see the class."""
        if border not in ("clamp", "zero"):
            raise ValueError(
                f"dilseg.models.DilatedNet: expected border 'clamp' or 'zero', but got "
                f"{border!r}. 'clamp' is the one to start with."
            )
        if context is not None and context.num_classes != front_end.num_classes:
            raise ValueError(
                f"dilseg.models.DilatedNet: expected context with num_classes="
                f"{front_end.num_classes}, as the front end, but got {context.num_classes}. "
                "Build both for the same number of classes."
            )
        super().__init__(
            front_end.num_classes, output_stride=front_end.output_stride, margin=front_end.margin
        )
        self.front_end = front_end
        self.context = context
        self.border = border
        self.normalization = front_end.normalization

    def forward(self, images: Tensor) -> Tensor:
        """Compute scores for the inner part of the images, as ``DilatedFrontEnd.forward``."""
        return self._refine(self.front_end(images))

    def cells(self, images: Tensor, *, tile: int | None = None) -> Tensor:
        """Compute scores that cover the whole images; arguments as ``DilatedFrontEnd.cells``.

        Tiles concern the front end alone: the context module sees all cells at once, so the result
        does not depend on them.
        """
        return self._refine(self.front_end.cells(images, tile=tile))

    def segment(self, images: Tensor, *, tile: int | None = None) -> Tensor:
        """Compute logits ``[n, num_classes, h, w]``; arguments as ``DilatedFrontEnd.cells``."""
        return _scores(self.cells(images, tile=tile), images, self.border).logits()

    def scores(
        self,
        images: Tensor,
        *,
        tile: int | None = None,
        anchor: Literal["centre", "corner"] = "centre",
    ) -> Scores:
        """Compute the cells, and how they become logits; as ``DilatedFrontEnd.scores``.

        Raises:
            ValueError: ``anchor`` is "corner" and ``border`` is "zero": a net has one or the other.
        """
        return _scores(self.cells(images, tile=tile), images, self.border, anchor)

    def refine(self, cells: Tensor, size: tuple[int, int]) -> Scores:
        """Apply the context module to cells of the front end that were computed before.

        Args:
            cells: ``[n, num_classes, rows, columns]``, from ``front_end.cells(images)``.
            size: Height and width of these images.

        Returns:
            What ``scores(images)`` returns.

        Example:
            >>> net = DilatedNet(DilatedFrontEnd(3, "demo"), ContextModule(3)).eval()
            >>> images = torch.rand(1, 3, 20, 30)
            >>> scores = net.refine(net.front_end.cells(images), (20, 30))
            >>> torch.equal(scores.logits(), net.segment(images))
            True

        Difference from torch: torch has no such method.
        """
        return Scores(self._refine(cells), size, _STRIDE, self.border)

    def _refine(self, scores: Tensor) -> Tensor:
        if self.context is None:
            return scores
        refined: Tensor = self.context(scores)
        return refined


def dilatednet(
    num_classes: int = 21,
    backbone: str | Backbone = "vgg16",
    *,
    context: Literal["basic", "large"] | None = "basic",
    dilations: Sequence[int] = (1, 1, 2, 4, 8, 16, 1),
    padding: Literal["layer", "input"] = "layer",
    sigma: float = 0.01,
    border: Literal["clamp", "zero"] = "clamp",
    fc_channels: int | None = None,
    dropout: float = 0.5,
) -> DilatedNet:
    """Build a DilatedNet: ``DilatedFrontEnd`` and, unless ``context`` is None, ``ContextModule``.

    Args:
        num_classes: Channels of the logits.
        backbone: "vgg16", "demo", or a ``Backbone``.
        context: Width of the context module, or None for the front end alone.
        dilations: See ``ContextModule``.
        padding: See ``ContextModule``.
        sigma: See ``ContextModule``.
        border: See ``DilatedNet``.
        fc_channels: See ``DilatedFrontEnd``.
        dropout: See ``DilatedFrontEnd``.

    Example:
        >>> with torch.device("meta"):
        ...     net = dilatednet(21, context="large")
        >>> sum(p.numel() for p in net.context.parameters()), net.margin
        (6803139, 186)
    """
    front_end = DilatedFrontEnd(num_classes, backbone, fc_channels=fc_channels, dropout=dropout)
    if context is None:
        return DilatedNet(front_end, border=border)
    module = ContextModule(num_classes, context, dilations, padding=padding, sigma=sigma)
    return DilatedNet(front_end, module, border=border)
