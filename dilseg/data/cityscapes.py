# SPDX-License-Identifier: Apache-2.0
"""Cityscapes: street scenes with fine labels, 19 classes."""

from __future__ import annotations

import os
from pathlib import Path
from types import MappingProxyType

import numpy as np

from .base import IGNORE, Label, require_split
from .files import FileDataset, Pair, find_folder, read_label

_IMAGE_END = "_leftImg8bit.png"
_LABEL_END = "_gtFine_labelIds.png"


class Cityscapes(FileDataset):
    """Cityscapes (Cordts et al. 2016), fine annotations, the 19 classes of the benchmark.

    Expected in ``root``::

        leftImg8bit/{train,val,test}/<city>/<city>_<seq>_<frame>_leftImg8bit.png
        gtFine/{train,val}/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png

    Class ids are the benchmark's "trainIds" 0 .. 18. The files hold its "ids" 0 .. 33, of which
    those that are not scored become void; the generated ``labelTrainIds`` files are not needed.
    The published splits have 2975, 500 and 1525 images. ``"test"`` has no labels (``has_labels``
    is False); :meth:`label_ids` turns predictions into what the benchmark's server takes.

    Args:
        root: Folder of the dataset.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        FileNotFoundError: If the folder, or the label map of an image, is missing.
        ValueError: If ``split`` is unknown or the split is empty.
    """

    splits = ("train", "val", "test")
    classes = (
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    )
    palette = np.array(
        [
            (128, 64, 128),
            (244, 35, 232),
            (70, 70, 70),
            (102, 102, 156),
            (190, 153, 153),
            (153, 153, 153),
            (250, 170, 30),
            (220, 220, 0),
            (107, 142, 35),
            (152, 251, 152),
            (70, 130, 180),
            (220, 20, 60),
            (255, 0, 0),
            (0, 0, 142),
            (0, 0, 70),
            (0, 60, 100),
            (0, 80, 100),
            (0, 0, 230),
            (119, 11, 32),
        ],
        np.uint8,
    )
    categories = MappingProxyType(
        {
            "flat": ("road", "sidewalk"),
            "construction": ("building", "wall", "fence"),
            "object": ("pole", "traffic light", "traffic sign"),
            "nature": ("vegetation", "terrain"),
            "sky": ("sky",),
            "human": ("person", "rider"),
            "vehicle": ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
        }
    )
    stored_ids = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    """Value of each class in the ``labelIds`` files."""

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        """See the class."""
        require_split("Cityscapes", split, self.splits)
        places = ("", "cityscapes")
        wanted = [f"leftImg8bit/{split}", *([] if split == "test" else [f"gtFine/{split}"])]
        folder = find_folder(Path(root), places, *wanted, what="Cityscapes")
        images = folder / "leftImg8bit" / split
        labels = folder / "gtFine" / split
        pairs = [
            Pair(
                path,
                None
                if split == "test"
                else labels / path.parent.name / (path.name.removesuffix(_IMAGE_END) + _LABEL_END),
            )
            for path in sorted(images.glob(f"*/*{_IMAGE_END}"))
        ]
        super().__init__(split, pairs, images)

    def name(self, index: int) -> str:
        """Name of the frame, ``<city>_<seq>_<frame>``."""
        return self.files(index).image.name.removesuffix(_IMAGE_END)

    @classmethod
    def label_ids(cls, label: Label) -> Label:
        """Label map of the benchmark's ids for one of class ids; void becomes 0, "unlabeled".

        Args:
            label: uint8 ``[h, w]``, class ids 0 .. 18 or :data:`IGNORE`.

        Returns:
            uint8 ``[h, w]``.

        Example:
            >>> import numpy as np
            >>> Cityscapes.label_ids(np.array([[0, 18, 255]], np.uint8)).tolist()
            [[7, 33, 0]]
        """
        table = np.zeros(256, np.uint8)
        table[: len(cls.stored_ids)] = cls.stored_ids
        return table[label]

    def _read_label(self, path: Path) -> Label:
        table = np.full(256, IGNORE, np.uint8)
        table[list(self.stored_ids)] = np.arange(len(self.stored_ids))
        return table[read_label(path, 34)]
