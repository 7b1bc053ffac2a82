# SPDX-License-Identifier: Apache-2.0
"""KITTI road scenes with the labels of Ros et al.: 11 classes, as DilatedNet uses them."""

from __future__ import annotations

import os
from pathlib import Path

from .base import Label, require_split
from .camvid import DILATEDNET_ORDER, DILATEDNET_PALETTE, CamVid
from .files import FileDataset, find_folder, pair_by_stem, read_color_label

_FOLDERS = {"train": "Training_00", "test": "Validation_07"}


class KITTI(FileDataset):
    """Frames of KITTI's visual odometry, labelled by Ros et al. (2015): 11 classes.

    Expected in ``root`` (or ``root/KITTI_SEMANTIC``)::

        Training_00/RGB/<stem>.png      Training_00/GT/<stem>.png      "train", 100 frames
        Validation_07/RGB/<stem>.png    Validation_07/GT/<stem>.png    "test", 46 frames

    Classes, their order and their colours are those of the DilatedNet release, which are those of
    CamVid with ``class_order="dilatednet"``. Label maps may be painted in these colours, with
    black for void, or be grey pictures of class ids 0 .. 10 in this order, with 255 for void;
    which of them a copy of the data holds is seen from the files.

    This is not the KITTI semantic benchmark of 2018, which has other images and classes.

    Args:
        root: Folder of the dataset.
        split: ``"train"`` or ``"test"``.

    Raises:
        FileNotFoundError: If the folder, or the label map of an image, is missing.
        ValueError: If ``split`` is unknown or the split is empty.
    """

    splits = ("train", "test")
    classes = tuple(CamVid.classes[i] for i in DILATEDNET_ORDER)
    palette = DILATEDNET_PALETTE

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        """See the class."""
        require_split("KITTI", split, self.splits)
        part = _FOLDERS[split]
        places = ("", "KITTI_SEMANTIC")
        folder = find_folder(
            Path(root), places, f"{part}/RGB", f"{part}/GT", what="KITTI with Ros et al.'s labels"
        )
        pairs = pair_by_stem(folder / part / "RGB", folder / part / "GT")
        super().__init__(split, pairs, folder / part)

    def _read_label(self, path: Path) -> Label:
        return read_color_label(path, self.palette, void=[(0, 0, 0)], classes=self.classes)
