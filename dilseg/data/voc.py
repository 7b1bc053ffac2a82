# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC 2011 and 2012 segmentation: 20 object classes and background."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .base import require_split
from .files import FileDataset, Pair, find_folder, read_lines
from .palette import voc_palette

VOC_CLASSES = (
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
LISTS = Path("ImageSets", "Segmentation")


class VOC2012(FileDataset):
    """PASCAL VOC 2012 segmentation, 21 classes, void 255 around objects.

    ``root`` is the folder ``VOC2012`` itself, or ``VOCdevkit``, or the one that holds
    ``VOCdevkit``; expected in ``VOC2012``::

        JPEGImages/<id>.jpg
        SegmentationClass/<id>.png              palette PNG; its indices are the class ids
        ImageSets/Segmentation/<split>.txt      one id, or DeepLab's two paths, per line

    The published splits are ``"train"`` (1464 images), ``"val"`` (1449), ``"trainval"`` (2913) and
    ``"test"``, which has no labels (``has_labels`` is False). ``"trainaug"`` reads the common
    extension by the Berkeley annotations, whose label maps are in ``SegmentationClassAug/``;
    :class:`dilseg.data.SBD` reads those annotations as they were published. ``"seg11valid"`` reads
    the list of that name, on which FCN is scored (736 images; from the authors' release).

    Args:
        root: Folder of the dataset, see above.
        split: Name of the split.

    Raises:
        FileNotFoundError: If the folder, the split's list, or a file named by it is missing.
        ValueError: If ``split`` is unknown or the split is empty.
    """

    splits: tuple[str, ...] = ("train", "val", "trainval", "trainaug", "test", "seg11valid")
    classes = VOC_CLASSES
    palette = voc_palette(21)
    _year = 2012

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        """See the class."""
        require_split(type(self).__name__, split, self.splits)
        folder = find_voc(Path(root), self._year)
        listing = folder / LISTS / f"{split}.txt"
        pairs = voc_pairs(folder, read_ids(listing), _LABELS.get(split, "SegmentationClass"))
        super().__init__(split, pairs, listing)


class VOC2011(VOC2012):
    """PASCAL VOC 2011 segmentation: the classes and files of :class:`VOC2012`, other splits.

    ``root`` is the folder ``VOC2011``, or ``VOCdevkit``, or the one that holds ``VOCdevkit`` or
    ``TrainVal/VOCdevkit``, as the archive unpacks. ``"train"`` has 1112 images. ``"seg11valid"``,
    on which FCN is scored, are the images of ``"val"`` that SBD's training set does not hold
    (736); without the list of that name :class:`dilseg.data.SBD` works them out.

    Args:
        root: Folder of the dataset, see above.
        split: ``"train"``, ``"val"``, ``"trainval"``, ``"test"`` (no labels) or ``"seg11valid"``.

    Raises:
        FileNotFoundError: If the folder, the split's list, or a file named by it is missing.
        ValueError: If ``split`` is unknown or the split is empty.
    """

    splits = ("train", "val", "trainval", "test", "seg11valid")
    _year = 2011


_LABELS = {"trainaug": "SegmentationClassAug", "test": None}


def voc_pairs(folder: Path, ids: Iterable[str], labels: str | None) -> list[Pair]:
    """Files of images of a VOC folder; ``labels`` is the folder of label maps, None for none."""
    return [
        Pair(
            folder / "JPEGImages" / f"{identity}.jpg",
            None if labels is None else folder / labels / f"{identity}.png",
        )
        for identity in ids
    ]


def read_ids(listing: Path) -> list[str]:
    """Ids of a list: each line, or the stem of its paths ``/JPEGImages/<id>.jpg ...``."""
    return [
        PurePosixPath(line.split()[0]).stem if "/" in line else line for line in read_lines(listing)
    ]


def find_voc(root: Path, year: int) -> Path:
    """Folder of a year of VOC: ``root`` or one below it.

    Raises:
        FileNotFoundError: If there is none.
    """
    name = f"VOC{year}"
    places = ["", name, f"VOCdevkit/{name}", f"TrainVal/VOCdevkit/{name}"]
    if root.name.startswith("VOC2") and root.name != name:  # another year is not what it asks for
        del places[0]
    return find_folder(root, places, str(LISTS), what=f"PASCAL VOC {year}")
