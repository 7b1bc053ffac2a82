# SPDX-License-Identifier: Apache-2.0
"""FCN-32s, FCN-16s and FCN-8s, as published.

    conv1_1 (pad 100) ... pool5 -> fc6 7x7 -> fc7 -> score_fr -> upscore (x32)
    FCN-16s:  upscore2(score_fr) + score_pool4(pool4)            -> upscore16 (x16)
    FCN-8s:   upscore_pool4(that sum) + score_pool3(pool3)       -> upscore8 (x8)

Every crop is derived from the layer table (``geometry.py``); for VGG-16 they come out as the
published 19, 27 and 31 (image), 5 (pool4) and 9 (pool3).

Source: Long, Shelhamer & Darrell 2015, sections 3 and 4; the authors' published prototxts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dilseg.models.backbones import Backbone, Layer, TrunkModel, find_backbone, grids
from dilseg.models.geometry import PIXELS, leading_cells
from dilseg.models.scores import Scores
from dilseg.models.upsampling import BilinearUpsampling, LearnedUpsampling

__all__ = ["FCN", "ScaledConv2d", "fcn8s", "fcn16s", "fcn32s"]


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


def _layers(backbone: Backbone, fc_channels: int) -> list[Layer]:
    """Write down the trunk of an FCN, image to fc7."""
    layers = []
    for stage, widths in enumerate(backbone.stages, start=1):
        for index, channels in enumerate(widths, start=1):
            first = stage == 1 and index == 1
            padding = backbone.fcn_image_padding if first else 1
            layers.append(Layer(f"conv{stage}_{index}", 3, channels, padding=padding))
        layers.append(Layer(f"pool{stage}", 2, stride=2))
    layers.append(Layer("fc6", backbone.fc_kernel, fc_channels, padding=backbone.fcn_fc_padding))
    layers.append(Layer("fc7", 1, fc_channels))
    return layers


class FCN(TrunkModel):
    """Fully convolutional network with upsampling by deconvolution and skip sums.

    Use ``fcn32s``, ``fcn16s`` or ``fcn8s``. Submodules and state-dict keys carry the published
    layer names. Fixed upsampling layers have no parameters; state dicts with and without them are
    interchangeable (see ``BilinearUpsampling``, ``LearnedUpsampling``).

    Args:
        num_classes: Channels of the logits, the background counted, the ignored class not.
        backbone: "vgg16", "demo", or a ``Backbone``.
        stride: 32, 16 or 8: the stride of the finest scores.
        fc_channels: Width of fc6 and fc7; None takes the backbone's (VGG-16: 4096).
        dropout: Probability of dropping an element of fc6 and of fc7.
        learned_upsampling: Train the deconvolutions, from bilinear, instead of fixing them.
        at_once: Scale pool4 by 0.01 and pool3 by 0.0001 before scoring, which lets one training
            run from ImageNet weights reach all three scores.

    Attributes:
        receptive_field: Pixels seen by one cell of score_fr (VGG-16: 404).
        crop: First row and column of the last deconvolution that lies on the image (VGG-16: 19,
            27, 31 for strides 32, 16, 8).

    Raises:
        ValueError: An unknown backbone or stride, or ``at_once`` without skips.

    Source: Long et al. 2015, section 4; the authors' prototxts (at-once: voc-fcn8s-atonce).
    """

    def __init__(
        self,
        num_classes: int = 21,
        backbone: str | Backbone = "vgg16",
        *,
        stride: int = 8,
        fc_channels: int | None = None,
        dropout: float = 0.5,
        learned_upsampling: bool = False,
        at_once: bool = False,
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
        chosen = find_backbone(backbone)
        layers = _layers(chosen, fc_channels or chosen.fc_channels)
        super().__init__(
            num_classes, chosen, layers, dropout=dropout, output_stride=stride, margin=0
        )
        grid_of = grids(layers)
        channels_of = {
            f"pool{stage}": widths[-1] for stage, widths in enumerate(chosen.stages, start=1)
        }
        upsampling = LearnedUpsampling if learned_upsampling else BilinearUpsampling

        self.score_fr = nn.Conv2d(self.fc_channels, num_classes, 1)
        grid = grid_of["fc7"]
        self.receptive_field = grid.receptive_field
        fusions = []
        for tap, score, name in skips:
            if at_once:
                scale = _AT_ONCE_SCALES[score]
                conv: nn.Conv2d = ScaledConv2d(channels_of[tap], num_classes, 1, input_scale=scale)
            else:
                conv = nn.Conv2d(channels_of[tap], num_classes, 1)
            setattr(self, score, conv)
            setattr(self, name, upsampling(num_classes, 2))
            coarse = grid.upsampled(kernel=4, stride=2)
            lead = leading_cells(grid_of[tap], coarse)
            fusions.append(_Fusion(tap, score, name, max(-lead, 0), max(lead, 0), lead < 0))
            grid = grid_of[tap] if lead < 0 else coarse
        self._fusions = tuple(fusions)
        self._last = last
        setattr(self, last, upsampling(num_classes, stride))
        self.crop = leading_cells(grid.upsampled(kernel=2 * stride, stride=stride), PIXELS)
        # The papers start every score at zero: a skip joins a trained net without disturbing it.
        for score_layer in ("score_fr", *(fusion.score for fusion in fusions)):
            conv = getattr(self, score_layer)
            nn.init.zeros_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    @property
    def skip_offsets(self) -> dict[str, int]:
        """First cell of each score map in use (VGG-16: 5 of score_pool4, 9 of score_pool3)."""
        return {fusion.score: fusion.offset for fusion in self._fusions}

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits at image size.

        Args:
            images: ``[n, 3, h, w]``, normalised by ``self.normalization``; any h, w >= 1.

        Returns:
            Logits ``[n, num_classes, h, w]``.

        Difference from torch: torchvision's ``fcn_resnet*`` are other networks (dilated ResNets).
        """
        logits: Tensor = getattr(self, self._last)(
            self._fused(images), size=(images.shape[-2], images.shape[-1]), crop=self.crop
        )
        return logits

    def segment(self, images: Tensor) -> Tensor:
        """Return ``self(images)``: an FCN answers at image size."""
        logits: Tensor = self(images)
        return logits

    def scores(self, images: Tensor) -> Scores:
        """Compute the scores before the last upsampling; with a learned one, the logits.

        Args:
            images: ``[n, 3, h, w]``, normalised; any h, w >= 1.

        Returns:
            Scores ``[n, num_classes, h_in, w_in]`` of stride ``output_stride``, with ``border``
            "zero" and the origin that ``crop`` asks for; their ``logits()`` are ``self(images)``.

        Example:
            >>> scores = fcn8s(5, "demo").scores(torch.zeros(2, 3, 33, 47))
            >>> scores.scores.shape, scores.scale_factor
            (torch.Size([2, 5, 5, 6]), 8)
        """
        scores: Scores = getattr(self, self._last).scores(
            self._fused(images), size=(images.shape[-2], images.shape[-1]), crop=self.crop
        )
        return scores

    def _fused(self, images: Tensor) -> Tensor:
        """Scores of stride ``output_stride``, all skips added."""
        features, taps = self.extract(images, [fusion.tap for fusion in self._fusions])
        scores: Tensor = self.score_fr(features)
        for fusion in self._fusions:
            skip = getattr(self, fusion.score)(taps.pop(fusion.tap))
            reference_h, reference_w = (
                skip.shape[-2:]
                if fusion.keeps_skip
                else (2 * scores.shape[-2] + 2, 2 * scores.shape[-1] + 2)
            )
            scores = getattr(self, fusion.upsampling)(
                scores,
                skip,
                size=(reference_h, reference_w),
                crop=fusion.crop,
                offset=fusion.offset,
            )
        return scores


def fcn32s(
    num_classes: int = 21,
    backbone: str | Backbone = "vgg16",
    *,
    fc_channels: int | None = None,
    dropout: float = 0.5,
    learned_upsampling: bool = False,
) -> FCN:
    """Build FCN-32s: one upsampling by 32, no skips. Arguments as in ``FCN``.

    Example:
        >>> with torch.device("meta"):
        ...     model = fcn32s()
        >>> sum(p.numel() for p in model.parameters()), model.crop, model.receptive_field
        (134346581, 19, 404)
    """
    return FCN(
        num_classes,
        backbone,
        stride=32,
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
    )


def fcn8s(
    num_classes: int = 21,
    backbone: str | Backbone = "vgg16",
    *,
    fc_channels: int | None = None,
    dropout: float = 0.5,
    learned_upsampling: bool = False,
    at_once: bool = False,
) -> FCN:
    """Build FCN-8s: skips from pool4 and pool3. Arguments as in ``FCN``.

    Example:
        >>> model = fcn8s(5, "demo")
        >>> model(torch.zeros(2, 3, 33, 47)).shape
        torch.Size([2, 5, 33, 47])
    """
    return FCN(
        num_classes,
        backbone,
        stride=8,
        fc_channels=fc_channels,
        dropout=dropout,
        learned_upsampling=learned_upsampling,
        at_once=at_once,
    )
