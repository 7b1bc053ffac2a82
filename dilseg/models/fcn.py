# SPDX-License-Identifier: Apache-2.0
"""FCN-32s, FCN-16s and FCN-8s, as published.

    conv1_1 (pad 100) ... pool5 -> fc6 7x7 -> fc7 -> score_fr -> upscore (x32)
    FCN-16s:  upscore2(score_fr) + score_pool4(pool4)            -> upscore16 (x16)
    FCN-8s:   upscore_pool4(that sum) + score_pool3(pool3)       -> upscore8 (x8)
    FCN-32s late fusion:  (score_fr of colour + score_fr of HHA) / 2   -> upscore (x32)

Every crop is derived from the layer table (``geometry.py``); for VGG-16 they come out as the
published 19, 27 and 31 (image), 5 (pool4) and 9 (pool3), for AlexNet as 18.

Source: Long, Shelhamer & Darrell 2015, sections 3 to 5; the authors' published prototxts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from dilseg.models.backbones import Backbone, TableBackbone, TrunkModel, find_backbone, grids
from dilseg.models.base import SegmentationModel
from dilseg.models.geometry import PIXELS, Grid, leading_cells
from dilseg.models.scores import HeadScores, Scores
from dilseg.models.upsampling import BilinearUpsampling, LearnedUpsampling

__all__ = ["FCN", "LateFusionFCN", "ScaledConv2d", "fcn8s", "fcn16s", "fcn32s", "fcn32s_late"]


class ScaledConv2d(nn.Conv2d):
    """Convolution of ``input_scale * input``: the Scale layers of the at-once FCN-8s.

    The factor is applied to the result, which has far fewer channels than the input and keeps small
    factors out of half-precision operands.

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output.
        kernel_size: Side of the kernel.
        input_scale: The constant factor.

    Example:
        >>> layer = ScaledConv2d(1, 1, 1, input_scale=0.01)
        >>> _ = nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
        >>> round(layer(torch.full((1, 1, 1, 1), 300.0)).item(), 4)
        4.0
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, *, input_scale: float) -> None:
        """Store the arguments; see the class."""
        super().__init__(c_in, c_out, kernel_size)
        self.input_scale = input_scale

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scores: Tensor = super()._conv_forward(input, weight, None)
        if bias is None:
            return scores * self.input_scale
        return torch.add(bias[:, None, None], scores, alpha=self.input_scale)

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"input_scale={self.input_scale}"
        )


@dataclass(frozen=True)
class _Fusion:
    """One sum of an upsampled coarse map and the scores of a pooling.

    Of the two maps, the one that starts later is kept whole and the other is cropped to it: the
    skip in the published geometry (``offset``), the upsampled map under "same" padding (``crop``).
    """

    tap: str
    score: str
    upsampling: str
    crop: int
    offset: int
    keeps_skip: bool


# Per output stride: (pooling, its score layer, the upsampling by 2 of the coarser map), then the
# name of the last upsampling. The names are the published ones.
_POOL4 = ("pool4", "score_pool4", "upscore2")
_POOL3 = ("pool3", "score_pool3", "upscore_pool4")
_HEADS: dict[int, tuple[tuple[tuple[str, str, str], ...], str]] = {
    32: ((), "upscore"),
    16: ((_POOL4,), "upscore16"),
    8: ((_POOL4, _POOL3), "upscore8"),
}
# The at-once net brings the three sources of scores to comparable magnitudes.
_AT_ONCE_SCALES = {"score_pool4": 0.01, "score_pool3": 0.0001}


def _last_upsampling(grid: Grid) -> tuple[int, int]:
    """Side of the last kernel, and the first row of its result that lies on the image.

    Scores between pixels need an even kernel (VGG), scores on pixels an odd one (AlexNet).
    """
    stride = int(grid.stride)
    between = (grid.start - Fraction(2 * stride - 1, 2)).denominator == 1
    kernel = 2 * stride if between else 2 * stride - 1
    return kernel, leading_cells(grid.upsampled(kernel, stride), PIXELS)


def _score_layer(channels: int, num_classes: int, *, scale: float | None = None) -> nn.Conv2d:
    """Make a 1x1 convolution of zeros: a skip joins a trained net without disturbing it."""
    conv = (
        nn.Conv2d(channels, num_classes, 1)
        if scale is None
        else ScaledConv2d(channels, num_classes, 1, input_scale=scale)
    )
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class FCN(TrunkModel):
    """Fully convolutional network with upsampling by deconvolution and skip sums.

    Use ``fcn32s``, ``fcn16s`` or ``fcn8s``. Submodules and state-dict keys carry the published
    layer names. Fixed upsampling layers have no parameters; state dicts with and without them are
    interchangeable (see ``BilinearUpsampling``, ``LearnedUpsampling``).

    Args:
        num_classes: Channels of the logits, the background counted, the ignored class not; of all
            heads together.
        backbone: "vgg16", "demo", or a ``Backbone``; for stride 32 also "alexnet", "googlenet" or a
            ``TableBackbone``.
        stride: 32, 16 or 8: the stride of the finest scores.
        fc_channels: Width of fc6 and fc7; None takes the backbone's (VGG-16, AlexNet: 4096;
            GoogLeNet has no such layers).
        dropout: Probability of dropping an element of fc6 and of fc7.
        learned_upsampling: Train the deconvolutions, from bilinear, instead of fixing them.
        at_once: Scale pool4 by 0.01 and pool3 by 0.0001 before scoring, which lets one training
            run from ImageNet weights reach all three scores.
        in_channels: 3; or 4 for early fusion of colour and depth (see ``LOG_DEPTH``).
        heads: Classes per head, by name, for one trunk with several heads, such as
            ``{"sem": 33, "geo": 3}`` for SIFT Flow; names become suffixes of the head's layers.

    Attributes:
        receptive_field: Pixels seen by one cell of score_fr (VGG-16: 404, AlexNet: 355, GoogLeNet:
            715; the published 907 counts the pooling by 7 that is dropped).
        crop: First row and column of the last deconvolution that lies on the image (VGG-16: 19,
            27, 31 for strides 32, 16, 8; AlexNet: 18; GoogLeNet, whose padding is ours: 16).
        skip_offsets: First cell of each score map in use (VGG-16: 5 of score_pool4, 9 of
            score_pool3).

    Raises:
        ValueError: An unknown backbone or stride, ``at_once`` without skips, skips on a backbone
            that is not VGG-shaped, ``fc_channels`` where there is no fc6, or heads that do not add
            up to ``num_classes``.

    Source: Long et al. 2015, sections 4 and 5; the authors' prototxts (at-once: voc-fcn8s-atonce).
    """

    def __init__(
        self,
        num_classes: int = 21,
        backbone: str | Backbone | TableBackbone = "vgg16",
        *,
        stride: int = 8,
        fc_channels: int | None = None,
        dropout: float = 0.5,
        learned_upsampling: bool = False,
        at_once: bool = False,
        in_channels: int = 3,
        heads: Mapping[str, int] | None = None,
    ) -> None:
        """Build the layers; see the class."""
        if stride not in _HEADS:
            raise ValueError(
                f"dilseg.models.FCN: expected stride one of {sorted(_HEADS)}, but got {stride}. "
                "Use fcn32s, fcn16s or fcn8s."
            )
        skips, last = _HEADS[stride]
        if at_once and not skips:
            raise ValueError(
                "dilseg.models.FCN: expected at_once=False for stride 32, but got True. "
                "FCN-32s has no skips to scale; use fcn8s."
            )
        if heads and sum(heads.values()) != num_classes:
            raise ValueError(
                f"dilseg.models.FCN: expected num_classes {sum(heads.values())}, that of the heads "
                f"{dict(heads)} together, but got {num_classes}."
            )
        chosen = find_backbone(backbone)
        if skips and isinstance(chosen, TableBackbone):
            raise ValueError(
                f"dilseg.models.FCN: expected stride 32 for {chosen.name!r}, but got {stride}. "
                "Skips from pool4 and pool3 are defined for VGG-shaped backbones; use fcn32s."
            )
        layers = chosen.fcn_layers(fc_channels)
        super().__init__(
            num_classes,
            chosen,
            layers,
            dropout=dropout,
            output_stride=stride,
            margin=0,
            in_channels=in_channels,
        )
        self.heads = dict(heads or {})
        grid_of = grids(layers)
        grid = grid_of[layers[-1].name]
        self.receptive_field = grid.receptive_field
        fusions = []
        for tap, score, name in skips:
            coarse = grid.upsampled(kernel=4, stride=2)
            lead = leading_cells(grid_of[tap], coarse)
            fusions.append(_Fusion(tap, score, name, max(-lead, 0), max(lead, 0), lead < 0))
            grid = grid_of[tap] if lead < 0 else coarse
        self._fusions = tuple(fusions)
        self._last = last
        self.skip_offsets = {fusion.score: fusion.offset for fusion in fusions}
        kernel, self.crop = _last_upsampling(grid)

        channels_of, width = {}, in_channels
        for layer in layers:  # a pooling keeps the channels it gets
            width = layer.channels or width
            channels_of[layer.name] = width
        upsampling = LearnedUpsampling if learned_upsampling else BilinearUpsampling
        for suffix, classes in self._head_classes().items():
            setattr(self, f"score_fr{suffix}", _score_layer(self.feature_channels, classes))
            for fusion in fusions:
                scale = _AT_ONCE_SCALES[fusion.score] if at_once else None
                conv = _score_layer(channels_of[fusion.tap], classes, scale=scale)
                setattr(self, f"{fusion.score}{suffix}", conv)
                setattr(self, f"{fusion.upsampling}{suffix}", upsampling(classes, 2))
            setattr(self, f"{last}{suffix}", upsampling(classes, stride, kernel))

    def _head_classes(self) -> dict[str, int]:
        """Classes of each head by the suffix of its layers, which is empty for a single head."""
        return {f"_{name}": n for name, n in self.heads.items()} or {"": self.num_classes}

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits at image size.

        Args:
            images: ``[n, in_channels, h, w]``, normalised by ``self.normalization``; any h, w >= 1.

        Returns:
            Logits ``[n, num_classes, h, w]``.

        Difference from torch: torchvision's ``fcn_resnet*`` are other networks (dilated ResNets).
        """
        size = (images.shape[-2], images.shape[-1])
        logits = [
            getattr(self, self._last + suffix)(fused, size=size, crop=self.crop)
            for suffix, fused in self._fused(images).items()
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    def segment(self, images: Tensor) -> Tensor:
        """Return ``self(images)``: an FCN answers at image size."""
        logits: Tensor = self(images)
        return logits

    def scores(self, images: Tensor) -> Scores | HeadScores:
        """Compute the scores before the last upsampling; with a learned one, the logits.

        Args:
            images: ``[n, in_channels, h, w]``, normalised; any h, w >= 1.

        Returns:
            Scores ``[n, num_classes, h_in, w_in]`` of stride ``output_stride``, with ``border``
            "zero" and the origin that ``crop`` asks for; their ``logits()`` are ``self(images)``.
            Of several heads, the scores of each.

        Example:
            >>> scores = fcn8s(5, "demo").scores(torch.zeros(2, 3, 33, 47))
            >>> scores.scores.shape, scores.scale_factor
            (torch.Size([2, 5, 5, 6]), 8)
        """
        size = (images.shape[-2], images.shape[-1])
        scores = [
            getattr(self, self._last + suffix).scores(fused, size=size, crop=self.crop)
            for suffix, fused in self._fused(images).items()
        ]
        if not self.heads:
            single: Scores = scores[0]
            return single
        return HeadScores(tuple(scores))

    def _fused(self, images: Tensor) -> dict[str, Tensor]:
        """Scores of stride ``output_stride``, all skips added, by the head's suffix."""
        features, taps = self.extract(images, [fusion.tap for fusion in self._fusions])
        return {suffix: self._head(suffix, features, taps) for suffix in self._head_classes()}

    def _head(self, suffix: str, features: Tensor, taps: Mapping[str, Tensor]) -> Tensor:
        scores: Tensor = getattr(self, f"score_fr{suffix}")(features)
        for fusion in self._fusions:
            skip = getattr(self, f"{fusion.score}{suffix}")(taps[fusion.tap])
            reference_h, reference_w = (
                skip.shape[-2:]
                if fusion.keeps_skip
                else (2 * scores.shape[-2] + 2, 2 * scores.shape[-1] + 2)
            )
            scores = getattr(self, f"{fusion.upsampling}{suffix}")(
                scores,
                skip,
                size=(reference_h, reference_w),
                crop=fusion.crop,
                offset=fusion.offset,
            )
        return scores


class _Stream(TrunkModel):
    """A trunk and its scores: one of the two modalities of ``LateFusionFCN``."""

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone | TableBackbone,
        fc_channels: int | None,
        dropout: float,
    ) -> None:
        layers = backbone.fcn_layers(fc_channels)
        super().__init__(num_classes, backbone, layers, dropout=dropout, output_stride=32, margin=0)
        self.score_fr = _score_layer(self.feature_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.score_fr(self.extract(images)[0])
        return scores


class LateFusionFCN(SegmentationModel):
    """FCN-32s on colour and HHA: a whole trunk for each, whose scores are averaged and upsampled.

    HHA encodes depth as three channels: horizontal disparity, height, angle with gravity. Layers
    are named as in ``FCN``, below ``color`` and ``hha``. ``load_stage(model.color, ...)`` and
    ``load_stage(model.hha, ...)`` start it from two trained FCN-32s, as the authors did.

    Args:
        num_classes: See ``FCN``; likewise the others.
        backbone: Of both trunks.
        fc_channels: See ``FCN``.
        dropout: See ``FCN``.
        learned_upsampling: See ``FCN``.

    Attributes:
        receptive_field: See ``FCN``.
        crop: See ``FCN``.

    Example:
        >>> model = LateFusionFCN(4, "demo")
        >>> model(torch.zeros(1, 6, 33, 47)).shape  # RGB, then HHA
        torch.Size([1, 4, 33, 47])

    Difference from torch: torch has no such network.
    Source: Long et al. 2015, section 5 (NYUDv2); Gupta et al. 2014 (HHA); the authors' prototxt
    (nyud-fcn32s-color-hha).
    """

    def __init__(
        self,
        num_classes: int = 40,
        backbone: str | Backbone | TableBackbone = "vgg16",
        *,
        fc_channels: int | None = None,
        dropout: float = 0.5,
        learned_upsampling: bool = False,
    ) -> None:
        """Build the layers; see the class."""
        super().__init__(num_classes, output_stride=32, margin=0, in_channels=6)
        chosen = find_backbone(backbone)
        self.color = _Stream(num_classes, chosen, fc_channels, dropout)
        self.hha = _Stream(num_classes, chosen, fc_channels, dropout)
        layers = self.color.layers
        grid = grids(layers)[layers[-1].name]
        self.receptive_field = grid.receptive_field
        kernel, self.crop = _last_upsampling(grid)
        upsampling = LearnedUpsampling if learned_upsampling else BilinearUpsampling
        self.upscore = upsampling(num_classes, 32, kernel)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``[n, num_classes, h, w]`` of images ``[n, 6, h, w]``: RGB, then HHA."""
        return self.scores(images).logits()

    def segment(self, images: Tensor) -> Tensor:
        """Return ``self(images)``: an FCN answers at image size."""
        logits: Tensor = self(images)
        return logits

    def scores(self, images: Tensor) -> Scores:
        """Compute the scores before the last upsampling; as ``FCN.scores``."""
        color, hha = images[:, :3], images[:, 3:]
        fused = 0.5 * self.color(color) + 0.5 * self.hha(hha)
        size = (images.shape[-2], images.shape[-1])
        return self.upscore.scores(fused, size=size, crop=self.crop)


def fcn32s(
    num_classes: int = 21,
    backbone: str | Backbone | TableBackbone = "vgg16",
    *,
    fc_channels: int | None = None,
    dropout: float = 0.5,
    learned_upsampling: bool = False,
    in_channels: int = 3,
    heads: Mapping[str, int] | None = None,
) -> FCN:
    """Build FCN-32s: one upsampling by 32, no skips. Arguments as in ``FCN``.

    FCN-AlexNet and FCN-GoogLeNet are ``fcn32s(21, "alexnet")`` and ``fcn32s(21, "googlenet")``.

    Example:
        >>> with torch.device("meta"):
        ...     model = fcn32s()
        >>> sum(p.numel() for p in model.parameters()), model.crop, model.receptive_field
        (134346581, 19, 404)
        >>> with torch.device("meta"):
        ...     model = fcn32s(21, "alexnet")
        >>> sum(p.numel() for p in model.parameters()), model.crop, model.receptive_field
        (56954261, 18, 355)
    """
    return FCN(
        num_classes,
        backbone,
        stride=32,
        fc_channels=fc_channels,
        dropout=dropout,
        learned_upsampling=learned_upsampling,
        in_channels=in_channels,
        heads=heads,
    )


def fcn32s_late(
    num_classes: int = 40,
    backbone: str | Backbone | TableBackbone = "vgg16",
    *,
    fc_channels: int | None = None,
    dropout: float = 0.5,
    learned_upsampling: bool = False,
) -> LateFusionFCN:
    """Build FCN-32s with late fusion of colour and HHA. Arguments as in ``LateFusionFCN``.

    Example:
        >>> fcn32s_late(4, "demo").in_channels
        6
    """
    return LateFusionFCN(
        num_classes,
        backbone,
        fc_channels=fc_channels,
        dropout=dropout,
        learned_upsampling=learned_upsampling,
    )


def fcn16s(
    num_classes: int = 21,
    backbone: str | Backbone = "vgg16",
    *,
    fc_channels: int | None = None,
    dropout: float = 0.5,
    learned_upsampling: bool = False,
    at_once: bool = False,
    in_channels: int = 3,
    heads: Mapping[str, int] | None = None,
) -> FCN:
    """Build FCN-16s: a skip from pool4. Arguments as in ``FCN``.

    Example:
        >>> with torch.device("meta"):
        ...     model = fcn16s()
        >>> model.crop, model.skip_offsets
        (27, {'score_pool4': 5})
    """
    return FCN(
        num_classes,
        backbone,
        stride=16,
        fc_channels=fc_channels,
        dropout=dropout,
        learned_upsampling=learned_upsampling,
        at_once=at_once,
        in_channels=in_channels,
        heads=heads,
    )


def fcn8s(
    num_classes: int = 21,
    backbone: str | Backbone = "vgg16",
    *,
    fc_channels: int | None = None,
    dropout: float = 0.5,
    learned_upsampling: bool = False,
    at_once: bool = False,
    in_channels: int = 3,
    heads: Mapping[str, int] | None = None,
) -> FCN:
    """Build FCN-8s: skips from pool4 and pool3. Arguments as in ``FCN``.

    Example:
        >>> model = fcn8s(5, "demo")
        >>> model(torch.zeros(2, 3, 33, 47)).shape
        torch.Size([2, 5, 33, 47])
        >>> both = fcn8s(36, "demo", heads={"sem": 33, "geo": 3})  # SIFT Flow
        >>> both.scores(torch.zeros(1, 3, 33, 47)).labels().shape
        torch.Size([1, 2, 33, 47])
    """
    return FCN(
        num_classes,
        backbone,
        stride=8,
        fc_channels=fc_channels,
        dropout=dropout,
        learned_upsampling=learned_upsampling,
        at_once=at_once,
        in_channels=in_channels,
        heads=heads,
    )
