# SPDX-License-Identifier: Apache-2.0
"""What every segmentation dataset of the package offers, whatever its files look like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE = 255
"""Label of void pixels, in every dataset: no loss, no gradient, not counted by any metric."""

Image: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
"""A photograph: ``[h, w, 3]``, uint8, channels in the order red, green, blue.

Some sets have further channels behind these three: then ``[h, w, channels]``, float32 if any
channel needs it.
"""

Label: TypeAlias = NDArray[np.uint8]
"""A label map: ``[h, w]``, uint8, class ids ``0 .. num_classes - 1`` or :data:`IGNORE`.

Of a set with several heads, ``[h, w, heads]``: a label map each, in the numbers of its own.
"""


class SegmentationDataset(torch.utils.data.Dataset[tuple[Image, Label]], ABC):
    """A map-style dataset of images and label maps as plain uint8 arrays.

    Samples are returned as they are stored; scaling, cropping and the conversion to tensors are
    the business of :class:`dilseg.data.Augmented`. Iterating works as for any sequence.

    Attributes:
        split: Name of the part that was opened, e.g. ``"train"``.
        classes: Class names; the position of a name is its id.
        palette: Class colours, uint8 ``[num_classes, 3]``, RGB.
        has_labels: False for splits published without labels; then only :meth:`load_image` works.
        channels: Channels of the images.
        heads: The parts of a set that asks several questions of one image, by name, each with
            classes, colours and label maps of its own; ``classes`` and ``palette`` are theirs, one
            behind the other. Empty for one question.
        score_sets: Classes that published means are over, by a name for the set, the first one
            first; empty where they are over all classes.
        categories: Groups of classes that are scored as one too, by name; empty for none.
    """

    split: str
    classes: tuple[str, ...]
    palette: NDArray[np.uint8]
    has_labels: bool = True
    channels: int = 3
    heads: Mapping[str, SegmentationDataset] = MappingProxyType({})
    score_sets: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    categories: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    _labels_hint: str = "Its images can be segmented, not trained on or scored."

    @property
    def num_classes(self) -> int:
        """Number of classes, void not counted."""
        return len(self.classes)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of a sample, fit for the stem of an output file."""

    @abstractmethod
    def load_image(self, index: int) -> Image:
        """Image of a sample, uint8 ``[h, w, 3]``, RGB."""

    @abstractmethod
    def load_label(self, index: int) -> Label:
        """Label map of a sample, uint8 ``[h, w]``, void as :data:`IGNORE`.

        Raises:
            ValueError: If the split has no labels, or the file is not a valid label map.
        """

    def require_labels(self) -> None:
        """Do nothing if the split has labels.

        Raises:
            ValueError: If it has none; the message says where they would belong.
        """
        if not self.has_labels:
            raise ValueError(
                f"{type(self).__name__}: expected a split with labels, but '{self.split}' has "
                f"none. {self._labels_hint}"
            )

    def load(self, index: int) -> tuple[Image, Label]:
        """Image and label map of a sample, of equal height and width.

        Args:
            index: ``0 .. len - 1``, or negative to count from the end.

        Raises:
            IndexError: If ``index`` is out of range.
            ValueError: If the split has no labels, or a file is corrupt, or the label map holds
                values that are no class, or the two differ in size.
        """
        return self.load_image(index), self.load_label(index)

    def __getitem__(self, index: int) -> tuple[Image, Label]:
        """Same as :meth:`load`."""
        return self.load(index)

    def _position(self, index: int) -> int:
        """Non-negative form of ``index``; IndexError beyond the ends (it also ends iteration)."""
        if not -len(self) <= index < len(self):
            raise IndexError(
                f"{type(self).__name__} '{self.split}': expected an index in "
                f"[{-len(self)}, {len(self)}), but got {index}."
            )
        return index + len(self) if index < 0 else index


class SeveralHeads(SegmentationDataset):
    """Several label maps of the same images, as one set.

    Args:
        heads: The sets, by name, with the same images in the same order; images are taken from the
            first.
    """

    def __init__(self, heads: Mapping[str, SegmentationDataset]) -> None:
        """See the class."""
        self.heads = dict(heads)
        parts: Sequence[SegmentationDataset] = list(self.heads.values())
        self.split = parts[0].split
        self.channels = parts[0].channels
        self.classes = tuple(name for part in parts for name in part.classes)
        self.palette = np.concatenate([part.palette for part in parts])
        self.has_labels = all(part.has_labels for part in parts)
        self._first = parts[0]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._first)

    def name(self, index: int) -> str:
        """Name of a sample in the first set."""
        return self._first.name(index)

    def load_image(self, index: int) -> Image:
        """Image of a sample, from the first set."""
        return self._first.load_image(index)

    def load_label(self, index: int) -> Label:
        """Label maps of a sample, uint8 ``[h, w, heads]``.

        Raises:
            ValueError: If they differ in size; otherwise as in the sets.
        """
        return self._stacked(index, self._first.load_label(index))

    def load(self, index: int) -> tuple[Image, Label]:
        """Image and label maps of a sample; see :meth:`SegmentationDataset.load`."""
        image, label = self._first.load(index)
        return image, self._stacked(index, label)

    def _stacked(self, index: int, first: Label) -> Label:
        _, *others = self.heads.values()
        labels = [first, *(part.load_label(index) for part in others)]
        if len({label.shape for label in labels}) > 1:
            shapes = ", ".join(f"{label.shape[0]} x {label.shape[1]}" for label in labels)
            raise ValueError(
                f"{self.name(index)}: expected label maps of one size, but got {shapes}."
            )
        return np.stack(labels, axis=2)


def require_split(dataset: str, split: str, splits: tuple[str, ...]) -> str:
    """Return ``split`` if it is one of ``splits``, else raise a ValueError that lists them."""
    if split not in splits:
        raise ValueError(
            f"{dataset}: expected split to be one of {', '.join(splits)}, but got {split!r}."
        )
    return split
