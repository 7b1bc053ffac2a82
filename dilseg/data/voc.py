# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC 2012 segmentation: 20 object classes and background."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from .base import require_split
from .files import FileDataset, Pair, read_lines
from .palette import voc_palette


class VOC2012(FileDataset):
    """PASCAL VOC 2012 segmentation, 21 classes, void 255 around objects.

    ``root`` is the folder ``VOC2012`` itself, or ``VOCdevkit``, or the one that holds
    ``VOCdevkit``; expected in ``VOC2012``::

        JPEGImages/<id>.jpg
        SegmentationClass/<id>.png              palette PNG; its indices are the class ids
        ImageSets/Segmentation/<split>.txt      one id, or DeepLab's two paths, per line

    The published splits are ``"train"`` (1464 images), ``"val"`` (1449), ``"trainval"`` (2913) and
    ``"test"``, which has no labels (``has_labels`` is False). ``"trainaug"`` reads the common
    extension by the Berkeley annotations, whose label maps are in ``SegmentationClassAug/``.

    Args:
        root: Folder of the dataset, see above.
        split: Name of the split.

    Raises:
        FileNotFoundError: If the folder, the split's list, or a file named by it is missing.
        ValueError: If ``split`` is unknown or the split is empty.
    """

    splits = ("train", "val", "trainval", "trainaug", "test")
    classes = (
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    )
    palette = voc_palette(21)

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        """See the class."""
        require_split("VOC2012", split, self.splits)
        folder = _find_root(Path(root))
        listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        if split == "test":
            labels = None
        else:
            name = "SegmentationClassAug" if split == "trainaug" else "SegmentationClass"
            labels = folder / name
        pairs = [
            Pair(
                folder / "JPEGImages" / f"{identity}.jpg",
                None if labels is None else labels / f"{identity}.png",
            )
            for identity in map(_identity, read_lines(listing))
        ]
        super().__init__(split, pairs, listing)


def _identity(line: str) -> str:
    """Id that a line means: itself, or the stem of its paths ``/JPEGImages/<id>.jpg ...``."""
    return PurePosixPath(line.split()[0]).stem if "/" in line else line


def _find_root(root: Path) -> Path:
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "ImageSets" / "Segmentation").is_dir():
            return folder
    raise FileNotFoundError(
        f"{root}: expected PASCAL VOC 2012 (VOCdevkit/VOC2012/ImageSets/Segmentation/...), but "
        "found no such folder. Pass VOC2012, VOCdevkit, or the folder that holds VOCdevkit as root."
    )
