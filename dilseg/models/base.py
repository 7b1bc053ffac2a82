# SPDX-License-Identifier: Apache-2.0
"""What every segmentation model of this package offers to a trainer or a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from dilseg.models.scores import HeadScores, Scores

__all__ = ["IMAGENET", "IMAGENET_FEATURES", "LOG_DEPTH", "Normalization", "SegmentationModel"]


@dataclass(frozen=True)
class Normalization:
    """The input convention of a network: ``(rgb - mean) / std`` with RGB values in [0, 1].

    Further channels follow the same rule, whatever they hold, divided by 255.

    Attributes:
        mean: Per channel, in R, G, B order.
        std: Per channel, in R, G, B order.

    Example:
        >>> caffe = Normalization.from_bgr_255((103.939, 116.779, 123.68))
        >>> round(caffe.mean[0], 4)  # R
        0.485
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __add__(self, other: Normalization) -> Normalization:
        """Put the channels of ``other`` behind one's own."""
        return Normalization(self.mean + other.mean, self.std + other.std)

    @classmethod
    def from_caffe(
        cls, mean: Sequence[float], *, bgr: bool = True, scale: float = 1.0
    ) -> Normalization:
        """Build the convention of a Caffe net from its mean on 0-255, in the order of its file.

        Args:
            mean: Three values, for B, G, R if ``bgr``; six with those for HHA, in this order.
            bgr: Whether the first three channels are B, G, R.
            scale: See ``from_bgr_255``.

        Example:
            >>> Normalization.from_caffe((51, 102, 153)).mean
            (0.6, 0.4, 0.2)
        """
        first, second, third, *hha = mean
        found = cls.from_bgr_255((first, second, third) if bgr else (third, second, first), scale)
        return found + cls.from_caffe(hha, bgr=False, scale=scale) if hha else found

    @classmethod
    def from_bgr_255(cls, mean: tuple[float, float, float], scale: float = 1.0) -> Normalization:
        """Build the convention of Caffe weights: ``(bgr - mean) * scale`` with values on 0-255.

        Args:
            mean: Per channel, in B, G, R order.
            scale: Factor after the subtraction, as in Caffe's ``transform_param``.
        """
        blue, green, red = (value / 255 for value in mean)
        return cls(mean=(red, green, blue), std=(1 / (255 * scale),) * 3)


IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""The convention of torchvision's ImageNet weights."""

LOG_DEPTH = Normalization(mean=(7.844 / 255,), std=(1 / 255,))
"""A fourth channel that holds the natural logarithm of the depth in millimetres: minus 7.844.

The published mean of NYUDv2 (Long et al. 2015, section 5; the authors' data layer), at 2.55 m.
"""

IMAGENET_FEATURES = Normalization(mean=(0.48235, 0.45882, 0.40784), std=(1 / 255,) * 3)
"""The convention of torchvision's VGG-16 weights IMAGENET1K_FEATURES, which descend from Caffe."""


_NORMALIZATIONS = {3: IMAGENET, 4: IMAGENET + LOG_DEPTH, 6: IMAGENET + IMAGENET}


class SegmentationModel(nn.Module):
    """Base of the model families.

    A model defines ``segment``. One whose last step is a fixed bilinear upsampling defines
    ``scores`` too, and is then trained and evaluated without logits at image size. A subclass that
    changes ``forward`` or ``segment`` alone gets the ``scores`` of this class back, so that what
    trains is what it computes.

    Attributes:
        num_classes: Channels of the logits.
        output_stride: Pixels between neighbouring cells of the last prediction before upsampling.
        margin: Image pixels of context that ``forward`` consumes on every side; 0 when ``forward``
            already answers at image size.
        in_channels: Channels of the images: 3 (RGB); 4 with the logarithm of the depth behind
            them; 6 with HHA behind them.
        heads: Classes per head where one network answers several questions, by name: channels of
            the logits, one head behind the other. Empty for one head.
        normalization: The input convention; ``load_backbone`` sets it to that of the weights.
    """

    num_classes: int
    output_stride: int
    margin: int
    in_channels: int
    heads: Mapping[str, int] = MappingProxyType({})
    normalization: Normalization

    def __init__(
        self, num_classes: int, *, output_stride: int, margin: int, in_channels: int = 3
    ) -> None:
        """Store the arguments; see the class."""
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                f"dilseg.models.{type(self).__name__}: expected num_classes >= 1, but got "
                f"{num_classes}. Pass the number of classes without the ignored one."
            )
        if in_channels not in _NORMALIZATIONS:
            raise ValueError(
                f"dilseg.models.{type(self).__name__}: expected in_channels 3 (RGB), 4 (RGB and "
                f"depth) or 6 (RGB and HHA), but got {in_channels}."
            )
        self.num_classes = num_classes
        self.output_stride = output_stride
        self.margin = margin
        self.in_channels = in_channels
        self.normalization = _NORMALIZATIONS[in_channels]

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Keep inherited scores from bypassing a changed computation; see the class."""
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "scores" not in own and ("segment" in own or "forward" in own):
            cls.scores = SegmentationModel.scores  # type: ignore[method-assign]

    def scores(self, images: Tensor) -> Scores | HeadScores:
        """Compute what ``segment`` computes, up to a last fixed upsampling.

        Args:
            images: ``[n, in_channels, h, w]``, normalised.

        Returns:
            Scores whose ``logits()`` are ``segment(images)``. Here the logits themselves.

        Example:
            >>> import torch
            >>> class Grey(SegmentationModel):
            ...     def segment(self, images):
            ...         return images.mean(1, keepdim=True)
            >>> grey = Grey(1, output_stride=1, margin=0)
            >>> grey.scores(torch.zeros(2, 3, 4, 5)).size
            (4, 5)

        Difference from torch: torch has no such method.
        """
        logits = self.segment(images)
        return Scores(logits, (logits.shape[-2], logits.shape[-1]))

    def segment(self, images: Tensor) -> Tensor:
        """Return logits ``[n, num_classes, h, w]`` aligned with images ``[n, c, h, w]``."""
        raise NotImplementedError
