# SPDX-License-Identifier: Apache-2.0
"""One confusion matrix for a whole set, and the four scores of the FCN paper read from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["ConfusionMatrix"]


class ConfusionMatrix:
    """Counts pixels by true and predicted class over a whole set of images.

    ``counts[i, j]`` is the number of pixels of true class ``i`` that were predicted as ``j``.
    Scores are read from the one matrix of the whole set, never averaged over images. Pixels whose
    label is `ignore_index` are not counted.

    Classes that occur neither in the labels nor in the predictions drop out of every mean; a class
    that is predicted but has no labelled pixel counts with an intersection over union of 0 and
    drops out of the mean accuracy.

    Args:
        num_classes: Number of classes, >= 1.
        ignore_index: Label that is not scored.
        device: Where the counts live. On a GPU, `update` neither waits nor checks the range of the
            values; on the CPU it checks.

    Raises:
        ValueError: `num_classes` below 1.

    Source: FCN (arXiv:1411.4038) section 5.

    Example:
        >>> import torch
        >>> matrix = ConfusionMatrix(2)
        >>> matrix.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 255]))
        >>> matrix.pixel_accuracy()
        0.6666666666666666
        >>> matrix.mean_iou()
        0.5
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        device: torch.device | str = "cpu",
    ) -> None:
        """See the class."""
        if num_classes < 1:
            raise ValueError(f"ConfusionMatrix: expected num_classes >= 1, but got {num_classes}.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        """Adds the pixels of one image or batch.

        Args:
            prediction: Class ids of any shape, any integer dtype, in ``[0, num_classes)``.
            target: Labels of the same shape, any integer dtype, in ``[0, num_classes)`` or
                `ignore_index`.

        Raises:
            ValueError: Unequal shapes, or on the CPU a class id out of range.
            TypeError: A floating-point argument.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                "ConfusionMatrix: expected target of prediction's shape "
                f"{tuple(prediction.shape)}, but got {tuple(target.shape)}."
            )
        for name, tensor in (("prediction", prediction), ("target", target)):
            if tensor.is_floating_point() or tensor.is_complex():
                raise TypeError(
                    f"ConfusionMatrix: expected {name} of an integer dtype, but got "
                    f"{tensor.dtype}. Take the argmax over the classes first."
                )
        target = target.reshape(-1).to(self.counts.device, torch.int64)
        prediction = prediction.reshape(-1).to(self.counts.device, torch.int64)
        classes = self.num_classes
        valid = target != self.ignore_index
        if self.counts.device.type == "cpu":
            self._check_range("target", target[valid], f" or ignore_index={self.ignore_index}")
            self._check_range("prediction", prediction[valid], "")
        # Ignored pixels fall into one bin past the matrix: boolean indexing would wait for a GPU.
        bins = torch.where(valid, target * classes + prediction, classes * classes)
        counted = torch.bincount(bins, minlength=classes * classes + 1)
        self.counts += counted[: classes * classes].view(classes, classes)

    def _check_range(self, name: str, values: torch.Tensor, besides: str) -> None:
        if values.numel() == 0:
            return
        low, high = (int(v) for v in torch.aminmax(values))
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"ConfusionMatrix: expected {name} values in [0, {self.num_classes}){besides}, "
                f"but got {low if low < 0 else high}."
            )

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds the counts of `other` (another part of the same set).

        Raises:
            ValueError: `other` has another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix: expected another matrix of {self.num_classes} classes, "
                f"but got one of {other.num_classes}."
            )
        self.counts += other.counts.to(self.counts.device)

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per class, float64 on the host: true positives, labelled pixels, pixels of the union."""
        counts = self.counts.cpu()
        hits = counts.diagonal().double()
        labelled = counts.sum(1)
        union = labelled + counts.sum(0) - counts.diagonal()
        return hits, labelled.double(), union.double()

    def class_accuracy(self) -> torch.Tensor:
        """Per class ``n_ii / t_i``, float64; nan for a class without labelled pixels."""
        hits, labelled, _ = self._parts()
        return hits / labelled

    def class_iou(self) -> torch.Tensor:
        """Per class intersection over union, float64; nan for a class that occurs nowhere."""
        hits, _, union = self._parts()
        return hits / union

    def pixel_accuracy(self) -> float:
        """``sum n_ii / sum t_i``; nan for an empty matrix."""
        hits, labelled, _ = self._parts()
        return float(hits.sum() / labelled.sum())

    def mean_accuracy(self, classes: Sequence[int] | None = None) -> float:
        """Mean of `class_accuracy` over the classes that have labelled pixels.

        Args:
            classes: Only these; None for all.
        """
        return _mean(self.class_accuracy(), classes)

    def mean_iou(self, classes: Sequence[int] | None = None) -> float:
        """Mean of `class_iou` over the classes that occur.

        Args:
            classes: Only these; None for all.
        """
        return _mean(self.class_iou(), classes)

    def frequency_weighted_iou(self) -> float:
        """`class_iou` weighted by each class's share of the labelled pixels."""
        hits, labelled, union = self._parts()
        present = labelled > 0
        weighted = labelled[present] * hits[present] / union[present]
        return float(weighted.sum() / labelled.sum())

    def scores(self, classes: Sequence[int] | None = None) -> dict[str, float]:
        """The four scores by name, each in [0, 1].

        Args:
            classes: Those that the two means are over, as in published tables that leave out a
                class; None for all. The other two scores count every labelled pixel either way.
        """
        return {
            "pixel_accuracy": self.pixel_accuracy(),
            "mean_accuracy": self.mean_accuracy(classes),
            "mean_iou": self.mean_iou(classes),
            "frequency_weighted_iou": self.frequency_weighted_iou(),
        }

    def merged(self, groups: Sequence[Sequence[int]]) -> ConfusionMatrix:
        """The matrix in which the classes of a group are one: confusing them is no error.

        Args:
            groups: Class ids of each new class.

        Returns:
            A matrix of ``len(groups)`` classes, on the same device. Pixels of classes in no group
            are not counted.

        Raises:
            ValueError: A class is in two groups, or out of range.

        Source: the category scores of Cityscapes (Cordts et al. 2016).

        Example:
            >>> import torch
            >>> matrix = ConfusionMatrix(3)
            >>> matrix.update(torch.tensor([1, 2, 0]), torch.tensor([2, 2, 2]))
            >>> matrix.merged([[0], [1, 2]]).class_iou()[1].item()
            0.6666666666666666
        """
        members = [index for group in groups for index in group]
        if len(set(members)) < len(members) or not set(members) <= set(range(self.num_classes)):
            raise ValueError(
                f"ConfusionMatrix: expected groups of different classes in [0, {self.num_classes})"
                f", but got {[list(group) for group in groups]}."
            )
        result = ConfusionMatrix(
            len(groups), ignore_index=self.ignore_index, device=self.counts.device
        )
        for row, labelled in enumerate(groups):
            for column, predicted in enumerate(groups):
                part = self.counts[list(labelled)][:, list(predicted)]
                result.counts[row, column] = part.sum()
        return result

    def per_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """One row per class: name, IoU, accuracy, precision, labelled pixels; None if undefined.

        Raises:
            ValueError: The number of names is not `num_classes`.
        """
        if len(names) != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix: expected {self.num_classes} class names, but got {len(names)}."
            )
        hits, labelled, union = self._parts()
        predicted = union - labelled + hits

        def share(part: torch.Tensor, whole: torch.Tensor) -> float | None:
            return float(part / whole) if whole > 0 else None

        return [
            {
                "class": name,
                "iou": share(hits[i], union[i]),
                "accuracy": share(hits[i], labelled[i]),
                "precision": share(hits[i], predicted[i]),
                "pixels": int(labelled[i]),
            }
            for i, name in enumerate(names)
        ]

    def table(self, names: Sequence[str], classes: Sequence[int] | None = None) -> str:
        """Per-class figures in per cent and the four scores, as text for a terminal.

        Args:
            names: Of all classes.
            classes: As in `scores`.
        """
        rows = self.per_class(names)
        width = max(5, *(len(row["class"]) for row in rows))

        def percent(value: float | None) -> str:
            return f"{'-':>9}" if value is None else f"{100 * value:9.2f}"

        lines = [f"{'class':<{width}}{'IoU %':>9}{'acc %':>9}{'prec %':>9}{'pixels':>14}"]
        lines += [
            f"{row['class']:<{width}}{percent(row['iou'])}{percent(row['accuracy'])}"
            f"{percent(row['precision'])}{row['pixels']:>14,}"
            for row in rows
        ]
        lines.append("")
        labels = {
            "pixel_accuracy": "pixel accuracy",
            "mean_accuracy": "mean accuracy",
            "mean_iou": "mean IoU",
            "frequency_weighted_iou": "frequency-weighted IoU",
        }
        lines += [
            f"{labels[key]:<24}{100 * value:6.2f} %" for key, value in self.scores(classes).items()
        ]
        return "\n".join(lines)


def _mean(values: torch.Tensor, classes: Sequence[int] | None) -> float:
    chosen = values if classes is None else values[list(classes)]
    return float(chosen.nanmean())
