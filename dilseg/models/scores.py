# SPDX-License-Identifier: Apache-2.0
"""Class scores of a network, and how they become logits at image size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from dilseg import functional

__all__ = ["HeadScores", "Scores"]


@dataclass(frozen=True, eq=False)
class Scores:
    r"""Class scores at the resolution of a network, and how they become logits at image size.

    .. math::
        logits_{n,c,y,x} = \mathrm{bilinear}(scores_{n,c})(y + origin_h,\; x + origin_w)

    The loss and the labels follow from the scores directly: only ``logits`` makes a tensor
    ``[n, c, h, w]``.

    Args:
        scores: ``[n, c, h_in, w_in]``; float64, float32, float16 or bfloat16; any strides.
        size: Height and width of the images.
        scale_factor: Pixels per score along both axes; None when ``scores`` are the logits
            themselves, with ``(h_in, w_in) == size``.
        border: As in ``dilseg.functional.upsample_add``.
        origin: As in ``dilseg.functional.upsample_add``.
        align_corners: Whether scores lie on pixels, so that row ``y`` looks at row ``y / s``,
            instead of between them, at ``(y + 0.5) / s - 0.5``; then only with ``border`` "zero".

    Raises:
        ValueError: ``align_corners`` with another border; or ``scale_factor`` is None, and the
            scores have another size than the images.

    Example:
        >>> scores = Scores(torch.eye(3).view(1, 3, 3, 1), size=(6, 2), scale_factor=2)
        >>> scores.logits().shape
        torch.Size([1, 3, 6, 2])
        >>> scores.labels()[0, :, 0]
        tensor([0, 0, 1, 1, 2, 2], dtype=torch.uint8)

    Difference from torch: torch has no such class; values are those of upsampling first.
    Source: Long et al. 2015, section 3.3: the upsampling is a fixed last layer of the network.
    """

    scores: Tensor
    size: tuple[int, int]
    scale_factor: int | None = None
    border: Literal["clamp", "zero"] = "clamp"
    origin: tuple[int, int] = (0, 0)
    align_corners: bool = False

    def __post_init__(self) -> None:
        """Check the size of logits; see the class."""
        if self.align_corners and self.border != "zero":
            raise ValueError(
                "dilseg.models.Scores: expected border 'zero' with align_corners=True, but got "
                f"{self.border!r}. A deconvolution of an odd kernel takes zero for what is outside."
            )
        height, width = self.scores.shape[-2:]
        if self.scale_factor is None and (height, width) != tuple(self.size):
            raise ValueError(
                f"dilseg.models.Scores: expected scores of size {tuple(self.size)}, as the images, "
                f"but got {(height, width)}. Pass scale_factor, or logits at image size."
            )

    def logits(self) -> Tensor:
        """Compute the logits at image size.

        Returns:
            ``[n, c, *size]``, dtype and memory format of the scores, which carry its gradient.

        Difference from torch: as ``dilseg.functional.upsample_add``.

        Example:
            >>> Scores(torch.tensor([[[[0.0, 4.0]]]]), size=(1, 4), scale_factor=2).logits()
            tensor([[[[0., 1., 3., 4.]]]])
        """
        if self.scale_factor is None:
            return self.scores
        scores, rule = self.upsampling(self.scale_factor)
        return functional.upsample_add(scores, None, size=self.size, **rule)

    def upsampling(self, scale: int) -> tuple[Tensor, dict[str, Any]]:
        """Make the map, and the arguments, with which an op upsamples by ``scale`` as said here.

        Example:
            >>> Scores(torch.ones(1, 1, 2, 2), size=(4, 4), scale_factor=2).upsampling(2)[1]
            {'border': 'clamp', 'origin': (0, 0), 'align_corners': False, 'scale_factor': 2}
        """
        rule = {"border": self.border, "origin": self.origin, "align_corners": self.align_corners}
        if not self.align_corners:
            return self.scores, rule | {"scale_factor": scale}
        # The ops step by (n - 1) / (n_full - 1) from n cells to floor(n * factor) pixels. That is
        # 1 / scale for scale * (n - 1) + 1 pixels, if there are two cells: one of zeros, as beyond
        # the border, sees to it. The half keeps the floor away from an integer.
        scores = F.pad(self.scores, (0, 1, 0, 1))
        factors = tuple((scale * (n - 1) + 1.5) / n for n in scores.shape[-2:])
        return scores, rule | {"scale_factor": factors}

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Compute the softmax cross entropy of ``logits()``, without making them.

        Args:
            target: Labels ``[n, *size]``; int64, int32 or uint8; each is ``ignore_index`` or in
                ``[0, c)``.
            weight: ``[c]`` weight per class, or None for ones; carries no gradient.
            ignore_index: Label of pixels to leave out.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.
            label_smoothing: Share of the target spread evenly over all classes, in [0, 1].

        Returns:
            A scalar or, for ``"none"``, the loss per pixel ``[n, *size]``; float64 for float64
            scores, float32 for every other dtype.

        Raises:
            ValueError: ``target`` has another shape; otherwise as
                ``dilseg.functional.upsample_cross_entropy``, and so are the other errors.

        Difference from torch: as ``dilseg.functional.upsample_cross_entropy``. Half-precision
        scores are not rounded between upsampling and loss.

        Example:
            >>> scores = Scores(torch.zeros(1, 4, 2, 2), size=(16, 16), scale_factor=8)
            >>> round(scores.cross_entropy(torch.zeros(1, 16, 16, dtype=torch.uint8)).item(), 4)
            1.3863
        """
        wanted = (self.scores.shape[0], *self.size)
        if tuple(target.shape) != wanted:
            raise ValueError(
                f"dilseg.models.Scores: expected target of shape [n, h, w] = {list(wanted)}, but "
                f"got {list(target.shape)}. Pass one label per pixel of the images."
            )
        if self.scale_factor is None:
            return functional.cross_entropy(
                self.scores,
                target,
                weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
        scores, rule = self.upsampling(self.scale_factor)
        return functional.upsample_cross_entropy(
            scores,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **rule,
        )

    @overload
    def labels(self, *, dtype: torch.dtype = ..., confidence: Literal[False] = ...) -> Tensor: ...

    @overload
    def labels(
        self, *, dtype: torch.dtype = ..., confidence: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def labels(
        self, *, dtype: torch.dtype = ..., confidence: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def labels(
        self, *, dtype: torch.dtype = torch.uint8, confidence: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the class of every pixel, the argmax of ``logits()``, without making them.

        Args:
            dtype: Of the labels: torch.uint8 (at most 256 classes), torch.int32 or torch.int64.
            confidence: Whether to return the probabilities of these classes too.

        Returns:
            Labels ``[n, *size]``; with ``confidence`` the pair of them and the softmax
            probabilities ``[n, *size]`` in [0, 1], float64 for float64 scores, float32 for every
            other dtype. Of equal logits the first class wins. Neither carries a gradient.

        Raises:
            ValueError: uint8 cannot hold every class.
            TypeError: ``dtype`` is another one.

        Difference from torch: ``argmax`` has no choice of dtype; otherwise as
        ``dilseg.functional.upsample_argmax``.

        Example:
            >>> scores = Scores(torch.zeros(1, 4, 1, 1), size=(1, 2), scale_factor=8)
            >>> scores.labels(confidence=True)
            (tensor([[[0, 0]]], dtype=torch.uint8), tensor([[[0.2500, 0.2500]]]))
        """
        if self.scale_factor is None:
            return self._labels_of_logits(dtype, confidence)
        scores, rule = self.upsampling(self.scale_factor)
        return functional.upsample_argmax(
            scores, size=self.size, dtype=dtype, confidence=confidence, **rule
        )

    def _labels_of_logits(
        self, dtype: torch.dtype, confidence: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        if dtype not in (torch.uint8, torch.int32, torch.int64):
            raise TypeError(
                "dilseg.models.Scores: expected dtype torch.uint8, torch.int32 or torch.int64, but "
                f"got {dtype}."
            )
        logits = self.scores.detach()
        if dtype == torch.uint8 and logits.shape[1] > 256:
            raise ValueError(
                "dilseg.models.Scores: expected at most 256 classes for dtype torch.uint8, but got "
                f"{logits.shape[1]}. Pass dtype=torch.int32."
            )
        labels = logits.argmax(1).to(dtype)
        if not confidence:
            return labels
        # The loss of the winning class is -log of its probability, and keeps no softmax.
        loss = functional.cross_entropy(logits, labels, reduction="none")
        return labels, loss.neg().exp()


@dataclass(frozen=True, eq=False)
class HeadScores:
    """The scores of a network with several heads: each answers a question of its own.

    Args:
        heads: The scores of each head, of one size.

    Example:
        >>> semantic = Scores(torch.zeros(1, 4, 2, 2), size=(16, 16), scale_factor=8)
        >>> geometric = Scores(torch.zeros(1, 3, 2, 2), size=(16, 16), scale_factor=8)
        >>> both = HeadScores((semantic, geometric))
        >>> both.logits().shape, both.labels().shape
        (torch.Size([1, 7, 16, 16]), torch.Size([1, 2, 16, 16]))

    Difference from torch: torch has no such class.
    Source: Long et al. 2015, section 5 (SIFT Flow: semantic and geometric classes at once).
    """

    heads: tuple[Scores, ...]

    def logits(self) -> Tensor:
        """Compute the logits of all heads at image size, one behind the other along channels."""
        return torch.cat([head.logits() for head in self.heads], dim=1)

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Compute the sum of the heads' losses.

        Args:
            target: Labels ``[n, heads, *size]``, each in the numbers of its head.
            weight: Of all heads, one behind the other, or None for ones.
            ignore_index: See ``Scores.cross_entropy``; for all heads.
            reduction: For each head.
            label_smoothing: For each head.

        Raises:
            ValueError: ``target`` has another shape.

        Example:
            >>> one = Scores(torch.zeros(1, 4, 1, 1), size=(8, 8), scale_factor=8)
            >>> target = torch.zeros(1, 2, 8, 8, dtype=torch.uint8)
            >>> round(HeadScores((one, one)).cross_entropy(target).item(), 4)
            2.7726
        """
        if target.dim() != 4 or target.shape[1] != len(self.heads):
            raise ValueError(
                f"dilseg.models.HeadScores: expected target of shape [n, {len(self.heads)}, h, w], "
                f"a label map per head, but got {list(target.shape)}."
            )
        classes = [head.scores.shape[1] for head in self.heads]
        weights = [None] * len(classes) if weight is None else torch.split(weight, classes)
        losses = [
            head.cross_entropy(
                labels,
                own,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
            )
            for head, labels, own in zip(self.heads, target.unbind(1), weights, strict=True)
        ]
        return torch.stack(losses).sum(0)

    @overload
    def labels(self, *, dtype: torch.dtype = ..., confidence: Literal[False] = ...) -> Tensor: ...

    @overload
    def labels(
        self, *, dtype: torch.dtype = ..., confidence: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def labels(
        self, *, dtype: torch.dtype = ..., confidence: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def labels(
        self, *, dtype: torch.dtype = torch.uint8, confidence: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the class of every pixel for each head; arguments as ``Scores.labels``.

        Returns:
            Labels ``[n, heads, *size]``; with ``confidence`` the pair of them and the
            probabilities, of the same shape.
        """
        if not confidence:
            return torch.stack([head.labels(dtype=dtype) for head in self.heads], dim=1)
        pairs = [head.labels(dtype=dtype, confidence=True) for head in self.heads]
        labels, shares = zip(*pairs, strict=True)
        return torch.stack(labels, dim=1), torch.stack(shares, dim=1)
