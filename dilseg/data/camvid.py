# SPDX-License-Identifier: Apache-2.0
"""CamVid: road scenes, 11 classes, 480 x 360, in the layout and split of SegNet, in two orders."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import numpy as np

from .base import IGNORE, Label, require_split
from .files import IMAGE_SUFFIXES, FileDataset, Pair, pair_by_stem, read_label, read_lines

DILATEDNET_ORDER = (1, 5, 0, 8, 6, 3, 9, 7, 2, 4, 10)
"""SegNet's id of each class of the DilatedNet release."""


class CamVid(FileDataset):
    """CamVid with the 11 classes, their order and the split of SegNet (arXiv:1511.00561).

    Expected below ``root`` (or ``root/CamVid``)::

        train/ val/ test/                   photographs, .png or .jpg
        trainannot/ valannot/ testannot/    8-bit grey PNG of the same stem; 0 .. 10, void 11
        train.txt val.txt test.txt          "image label" per line; without it the folders count

    Paths in the lists are relative to ``root`` or carry the original's prefix
    ``/SegNet/CamVid/``. The published split has 367, 101 and 233 images; ``"trainval"`` is train
    followed by val. Void (11) is mapped to 255.

    The released DilatedNet was trained with the same classes in another order. With
    ``class_order="dilatednet"`` labels, names and colours come in that order, whose id i is
    ``(1, 5, 0, 8, 6, 3, 9, 7, 2, 4, 10)[i]`` in SegNet's; the files stay the same.

    Args:
        root: Folder of the dataset.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"trainval"``.
        class_order: ``"segnet"`` or ``"dilatednet"``.

    Raises:
        FileNotFoundError: If the folder, or a file named by a list, is missing.
        ValueError: If ``split`` or ``class_order`` is unknown, a list is malformed, or the split
            is empty.
    """

    splits = ("train", "val", "test", "trainval")
    classes: tuple[str, ...] = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    palette = np.array(
        [
            (128, 128, 128),
            (128, 0, 0),
            (192, 192, 128),
            (128, 64, 128),
            (60, 40, 222),
            (128, 128, 0),
            (192, 128, 128),
            (64, 64, 128),
            (64, 0, 128),
            (64, 64, 0),
            (0, 128, 192),
        ],
        np.uint8,
    )
    void = (11,)

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        class_order: str = "segnet",
    ) -> None:
        """See the class."""
        require_split("CamVid", split, self.splits)
        if class_order not in ("segnet", "dilatednet"):
            raise ValueError(
                "CamVid: expected class_order to be 'segnet' or 'dilatednet', but got "
                f"{class_order!r}."
            )
        self._reordered = class_order == "dilatednet"
        if self._reordered:
            self.classes = tuple(CamVid.classes[i] for i in DILATEDNET_ORDER)
            self.palette = DILATEDNET_PALETTE
        folder = _find_root(Path(root))
        parts = ("train", "val") if split == "trainval" else (split,)
        pairs = [pair for part in parts for pair in _pairs(folder, part)]
        super().__init__(split, pairs, folder)

    def _read_label(self, path: Path) -> Label:
        label = read_label(path, 11, void=self.void, classes=CamVid.classes)
        return _RANKS[label] if self._reordered else label


DILATEDNET_PALETTE = CamVid.palette[list(DILATEDNET_ORDER)]
"""Colours of the DilatedNet release, in its order; its pavement has CamVid's original blue."""
DILATEDNET_PALETTE[9] = (0, 0, 192)

_RANKS = np.full(256, IGNORE, np.uint8)  # id in the DilatedNet release of each of SegNet's
_RANKS[list(DILATEDNET_ORDER)] = np.arange(11)


def _find_root(root: Path) -> Path:
    for folder in (root, root / "CamVid"):
        if any(
            (folder / f"{split}.txt").is_file() or (folder / f"{split}annot").is_dir()
            for split in ("train", "val", "test")
        ):
            return folder
    raise FileNotFoundError(
        f"{root}: expected CamVid in SegNet's layout (train.txt, train/, trainannot/, ...), "
        "but found no such files. Pass the folder that holds them as root."
    )


def _pairs(folder: Path, split: str) -> list[Pair]:
    listing = folder / f"{split}.txt"
    if not listing.is_file():
        return pair_by_stem(folder / split, folder / f"{split}annot")
    pairs = []
    for line in read_lines(listing):
        names = line.split()
        if len(names) != 2:
            raise ValueError(f"{listing}: expected 'image label' on every line, but got {line!r}.")
        pairs.append(Pair(*(_locate(folder, name) for name in names)))
    return pairs


def _locate(folder: Path, name: str) -> Path:
    """File that a list means: below ``folder`` as written, or by its last two parts.

    The second form covers the original lists (/SegNet/CamVid/train/x.png); photographs may have
    been re-encoded, so other image suffixes are tried too.
    """
    tail = folder.joinpath(*PurePosixPath(name).parts[-2:])
    for path in (folder / name, tail, *(tail.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)):
        if path.is_file():
            return path
    return tail
