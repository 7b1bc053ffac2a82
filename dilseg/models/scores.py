# SPDX-License-Identifier: Apache-2.0
"""Class scores of a network, and how they become logits at image size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, overload

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

    The loss and the labels follow from the scores directly: only ``logits`` and ``probabilities``
    make a tensor ``[n, c, h, w]``.

    The released DilatedNets for VOC, CamVid and KITTI do it otherwise, which ``anchor="corner"``
    reproduces: not the scores but their softmax is interpolated, and a score sits on the first
    pixel of its block instead of the centre. Pixel y mixes the rows around ``y / scale_factor``; no
    row follows the last, which is repeated. ``logits`` are the logarithms of these probabilities.

    Args:
        scores: ``[n, c, h_in, w_in]``; float64, float32, float16 or bfloat16; any strides.
        size: Height and width of the images.
        scale_factor: Pixels per score along both axes; None when ``scores`` are the logits
            themselves, with ``(h_in, w_in) == size``.
        border: As in ``dilseg.functional.upsample_add``.
        origin: As in ``dilseg.functional.upsample_add``.
        align_corners: Whether scores lie on pixels, so that row ``y`` looks at row ``y / s``,
            instead of between them, at ``(y + 0.5) / s - 0.5``; then only with ``border`` "zero".
        anchor: "centre", or "corner" as above, which goes with a ``scale_factor``, the border
            "clamp" and the origin (0, 0).

    Raises:
        ValueError: ``align_corners`` with another border; ``scale_factor`` is None, and the
            scores have another size than the images; or ``anchor`` is unknown, or "corner" with
            options that do not go with it.

    Example:
        >>> scores = Scores(torch.eye(3).view(1, 3, 3, 1), size=(6, 2), scale_factor=2)
        >>> scores.logits().shape
        torch.Size([1, 3, 6, 2])
        >>> scores.labels()[0, :, 0]
        tensor([0, 0, 1, 1, 2, 2], dtype=torch.uint8)

    Difference from torch: torch has no such class; values are those of upsampling first.
    Source: Long et al. 2015, section 3.3: the upsampling is a fixed last layer of the network. For
    ``anchor="corner"``: ``interp_map`` of the code published with Yu & Koltun 2016.
    """

    scores: Tensor
    size: tuple[int, int]
    scale_factor: int | None = None
    border: Literal["clamp", "zero"] = "clamp"
    origin: tuple[int, int] = (0, 0)
    align_corners: bool = False
    anchor: Literal["centre", "corner"] = "centre"

    def __post_init__(self) -> None:
        """Check the size of logits, the border and the anchor; see the class."""
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
        if self.anchor not in ("centre", "corner"):
            raise ValueError(
                f"dilseg.models.Scores: expected anchor 'centre' or 'corner', but got "
                f"{self.anchor!r}. 'centre' is the rule of all but three published networks."
            )
        rest = (self.border, tuple(self.origin))
        if self.anchor == "corner" and (self.scale_factor is None or rest != ("clamp", (0, 0))):
            raise ValueError(
                "dilseg.models.Scores: expected a scale_factor, border 'clamp' and origin (0, 0) "
                f"with anchor 'corner', but got {self.scale_factor}, {self.border!r} and "
                f"{self.origin}. Use anchor 'centre'."
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
        if self.anchor == "corner":
            return self._corner_logits().to(self.scores.dtype)
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

    def probabilities(self) -> Tensor:
        """Compute the probability of every class of every pixel: the softmax of ``logits()``.

        Returns:
            ``[n, c, *size]`` in [0, 1], float64 for float64 scores, float32 for every other dtype.

        Difference from torch: half-precision logits give float32.

        Example:
            >>> Scores(torch.zeros(1, 4, 1, 1), (1, 2), 8).probabilities()[0, :, 0, 0]
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        if self.anchor == "centre":
            logits = self.logits()
            return logits.softmax(1, dtype=_computed_in(logits))
        cells, height, width = self._corner_cells()
        zoomed = functional.upsample_add(cells, None, size=(height, width), align_corners=True)
        return zoomed[:, :, : self.size[0], : self.size[1]]

    def _corner_logits(self) -> Tensor:
        probabilities = self.probabilities()
        # Far from a class its probability may be 0, whose logarithm has no finite gradient.
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()

    def _corner_cells(self) -> tuple[Tensor, int, int]:
        """The probabilities of the cells with the last row and column twice, and a size.

        With aligned corners, upsampling them to this size steps by ``1 / scale_factor`` exactly.
        """
        assert self.scale_factor is not None
        cells = self.scores.softmax(1, dtype=_computed_in(self.scores))
        cells = F.pad(cells, (0, 1, 0, 1), mode="replicate")
        height, width = (self.scale_factor * (side - 1) + 1 for side in cells.shape[-2:])
        return cells, height, width

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
        if self.scale_factor is None or self.anchor == "corner":
            return functional.cross_entropy(
                self.scores if self.scale_factor is None else self._corner_logits(),
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
        if self.anchor == "corner":
            cells, height, width = self._corner_cells()
            whole = cast(
                "Tensor",
                functional.upsample_argmax(
                    cells, size=(height, width), align_corners=True, dtype=dtype
                ),
            )
            labels = whole[:, : self.size[0], : self.size[1]]
            return (labels, self.probabilities().detach().amax(1)) if confidence else labels
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


def _computed_in(scores: Tensor) -> torch.dtype:
    """Where probabilities are computed: half precision would lose small ones."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32
