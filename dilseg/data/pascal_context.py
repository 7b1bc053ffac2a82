# SPDX-License-Identifier: Apache-2.0
"""PASCAL-Context: every pixel of VOC 2010's photographs, as 59 classes and the rest."""

from __future__ import annotations

import os
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .base import Label, require_split
from .files import FileDataset, Pair, class_ids, find_folder, read_lines
from .matlab import read_mat
from .palette import voc_palette

# What three of the 59 classes are called in the list of all labels.
_NAMES_IN_LIST = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
_VOC_PLACES = ("VOC2010", "VOCdevkit/VOC2010", "pascal/VOC2010")
_PLACES = ("", "pascal-context")


class PascalContext(FileDataset):
    """PASCAL-Context (Mottaghi et al. 2014): the 59-class task, and background.

    Expected in ``root``::

        VOC2010/JPEGImages/<id>.jpg                   or VOCdevkit/VOC2010, pascal/VOC2010
        VOC2010/ImageSets/Main/<split>.txt            one id per line
        pascal-context/trainval/<id>.mat              or trainval/; MATLAB v5, LabelMap: 1 .. 459
        pascal-context/labels.txt                     or labels.txt; "1: accordion", ...

    The 59 classes are found in ``labels.txt`` by name and become the ids 1 .. 59, in the order of
    the FCN release; everything else is 0, background, a class to learn like the others. There is
    no void. The published splits have 4998 and 5105 images.

    Args:
        root: Folder of the dataset.
        split: ``"train"`` or ``"val"``.

    Raises:
        FileNotFoundError: If a folder, a list, or a file named by it is missing.
        ValueError: If ``split`` is unknown, a list is malformed, or the split is empty.
    """

    splits = ("train", "val")
    classes = (
        "background",
        "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
        "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep",
        "sofa", "train", "tvmonitor", "bag", "bed", "bench", "book", "building", "cabinet",
        "ceiling", "clothes", "computer", "cup", "door", "fence", "floor", "flower", "food",
        "grass", "ground", "keyboard", "light", "mountain", "mouse", "curtain", "platform",
        "sign", "plate", "road", "rock", "shelves", "sidewalk", "sky", "snow", "bedcloth",
        "track", "tree", "truck", "wall", "water", "window", "wood",
    )  # fmt: skip
    palette = voc_palette(60)
    # The paper speaks of 59 classes; its network and the code that scored it have 60.
    score_sets = MappingProxyType(
        {"60 classes, with background": classes, "59 classes, without background": classes[1:]}
    )

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        """See the class."""
        require_split("PascalContext", split, self.splits)
        base = Path(root)
        voc = find_folder(base, _VOC_PLACES, "JPEGImages", "ImageSets/Main", what="VOC 2010")
        labels = find_folder(base, _PLACES, "labels.txt", "trainval", what="PASCAL-Context")
        self._table = _read_table(labels / "labels.txt", self.classes)
        listing = voc / "ImageSets" / "Main" / f"{split}.txt"
        pairs = [
            Pair(voc / "JPEGImages" / f"{identity}.jpg", labels / "trainval" / f"{identity}.mat")
            for identity in read_lines(listing)
        ]
        super().__init__(split, pairs, listing)

    def _read_label(self, path: Path) -> Label:
        expected = f"LabelMap in 0 .. {len(self._table) - 1}, the ids of labels.txt"
        return class_ids(path, read_mat(path, "LabelMap"), self._table, expected)


def _read_table(path: Path, classes: tuple[str, ...]) -> NDArray[np.int16]:
    """Class of every id in the list of all labels, and of 0."""
    ids: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        word, colon, name = line.partition(":")
        if not colon or word.strip() != str(number):
            raise ValueError(f"{path}: expected '{number}: name' on line {number}, got {line!r}.")
        ids[name.replace(" ", "")] = number
    table = np.zeros(number + 1 if ids else 1, np.int16)
    for index, name in enumerate(classes[1:], 1):
        listed = _NAMES_IN_LIST.get(name, name)
        if listed not in ids:
            raise ValueError(
                f"{path}: expected a label {listed!r} for class {name!r}, but the list has none "
                f"of its {len(ids)}. Use the list of 459 labels that comes with PASCAL-Context."
            )
        table[ids[listed]] = index
    return table
