# SPDX-License-Identifier: Apache-2.0
"""How often classes occur, and the loss weights that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .base import IGNORE, SegmentationDataset


@dataclass(frozen=True)
class PixelCounts:
    """Counts per class over a dataset.

    Attributes:
        pixels: int64 ``[num_classes]``, pixels of the class.
        images: int64 ``[num_classes]``, images in which the class occurs.
        image_pixels: int64 ``[num_classes]``, all pixels, void too, of those images.
        void: Number of void pixels.
    """

    pixels: NDArray[np.int64]
    images: NDArray[np.int64]
    image_pixels: NDArray[np.int64]
    void: int

    @property
    def frequencies(self) -> NDArray[np.float64]:
        """``pixels / image_pixels``, float64 ``[num_classes]``; 0 for absent classes."""
        return self.pixels / np.maximum(self.image_pixels, 1)


def count_pixels(dataset: SegmentationDataset) -> PixelCounts:
    """Count the classes of a dataset; reads every label map once, no image.

    Args:
        dataset: A dataset with labels and one head; of several, count each of ``heads``.

    Returns:
        The counts.

    Raises:
        ValueError: If the dataset has no labels or a label map is not valid.

    Example:
        >>> from dilseg.data import Shapes, count_pixels
        >>> counts = count_pixels(Shapes("val", length=4))
        >>> int(counts.pixels.sum()) + counts.void == 4 * 96 * 96
        True
    """
    dataset.require_labels()
    pixels = np.zeros(dataset.num_classes, np.int64)
    images = np.zeros_like(pixels)
    image_pixels = np.zeros_like(pixels)
    void = 0
    for index in range(len(dataset)):
        label = dataset.load_label(index)
        histogram = np.bincount(label.ravel(), minlength=IGNORE + 1)
        present = histogram[: dataset.num_classes] > 0
        pixels += histogram[: dataset.num_classes]
        images += present
        image_pixels += present * label.size
        void += int(histogram[IGNORE])
    return PixelCounts(pixels, images, image_pixels, void)


def class_weights(dataset: SegmentationDataset, kind: str = "median") -> torch.Tensor:
    """Loss weights that balance the classes by median frequency.

    The weight of a class is ``median(frequency) / frequency``, where the frequency is the number
    of its pixels divided by all pixels of the images in which it occurs (SegNet, arXiv:1511.00561,
    after Eigen & Fergus 2015). Classes that do not occur are left out of the median and get 1.

    Args:
        dataset: The training set; every label map is read once. Heads are balanced one by one.
        kind: ``"median"``, the only kind.

    Returns:
        float32 ``[num_classes]``, for the ``weight`` argument of a cross-entropy loss.

    Raises:
        ValueError: If ``kind`` is unknown or no pixel is labelled.

    Example:
        >>> from dilseg.data import Shapes, class_weights
        >>> weights = class_weights(Shapes("train", length=32))
        >>> weights.shape
        torch.Size([7])
        >>> bool(weights[0] == weights.min())  # background is the commonest class
        True
    """
    if kind != "median":
        raise ValueError(f"class_weights: expected kind to be 'median', but got {kind!r}.")
    if dataset.heads:
        return torch.cat([class_weights(head, kind) for head in dataset.heads.values()])
    frequencies = count_pixels(dataset).frequencies
    present = frequencies > 0
    if not present.any():
        raise ValueError(
            f"class_weights: expected labelled pixels in split '{dataset.split}' of "
            f"{type(dataset).__name__}, but every pixel is void."
        )
    weights = np.ones(dataset.num_classes)
    weights[present] = np.median(frequencies[present]) / frequencies[present]
    return torch.tensor(weights, dtype=torch.float32)
