# SPDX-License-Identifier: Apache-2.0
"""SBD, the Berkeley annotations of PASCAL VOC, and the splits it forms together with VOC."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .base import Label, require_split
from .files import FileDataset, Pair, class_ids, find_folder, identity_table
from .matlab import read_mat
from .palette import voc_palette
from .voc import LISTS, VOC_CLASSES, find_voc, read_ids, voc_pairs


class SBD(FileDataset):
    """The Semantic Boundaries Dataset (Hariharan et al. 2011): 11355 images with VOC's 21 classes.

    Expected in ``root`` (or ``root/benchmark_RELEASE``, ``root/benchmark_RELEASE/dataset``)::

        img/<id>.jpg
        cls/<id>.mat                  MATLAB v5, GTcls.Segmentation; its values are VOC's ids
        train.txt val.txt             one id per line; train_noval.txt is a download of its own

    The splits of SBD itself are ``"train"`` (8498 images, what FCN trains on), ``"val"`` (2857)
    and ``"train_noval"`` (5623: no image of VOC 2012's val). The others join it with VOC, whose
    ``VOCdevkit`` (or ``VOC2011``, ``VOC2012``) is expected in ``root`` too:

    - ``"trainaug"``: VOC 2012's train with VOC's own labels, then every other image of SBD that
      VOC 2012's val does not hold (10582 in all; the DilatedNet paper trains on such a union);
    - ``"voc2012val"``: VOC 2012's val (1449), to score the above;
    - ``"seg11valid"``: images of VOC 2011's val that are not in SBD's train (736), on which FCN is
      scored, with VOC's labels. Read from ``ImageSets/Segmentation/seg11valid.txt`` of VOC 2011
      or 2012 where that is, else worked out from the lists of VOC 2011 and SBD.

    Mixing the conventions leaks: SBD's train holds images of both years' val.

    Args:
        root: Folder of the dataset, see above.
        split: Name of the split.

    Raises:
        FileNotFoundError: If a folder, a list, or a file named by it is missing.
        ValueError: If ``split`` is unknown or the split is empty.
    """

    splits = ("train", "val", "train_noval", "trainaug", "voc2012val", "seg11valid")
    classes = VOC_CLASSES
    palette = voc_palette(21)

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        """See the class."""
        require_split("SBD", split, self.splits)
        base = Path(root)
        if split == "voc2012val":
            voc = find_voc(base, 2012)
            source = voc / LISTS / "val.txt"
            pairs = voc_pairs(voc, read_ids(source), "SegmentationClass")
        elif split == "seg11valid":
            source, pairs = _seg11valid(base)
        elif split == "trainaug":
            source, pairs = _trainaug(base)
        else:
            folder = _find_sbd(base)
            source = folder / f"{split}.txt"
            pairs = _sbd_pairs(folder, read_ids(source))
        super().__init__(split, pairs, source)

    def _read_label(self, path: Path) -> Label:
        if path.suffix != ".mat":
            return super()._read_label(path)
        expected = "GTcls.Segmentation in 0 .. 20 (background .. tvmonitor) or 255 for void"
        values = read_mat(path, "GTcls", "Segmentation")
        return class_ids(path, values, identity_table(21), expected)


def _find_sbd(root: Path) -> Path:
    places = ("", "benchmark_RELEASE/dataset", "dataset")
    return find_folder(root, places, "img", "cls", what="SBD")


def _sbd_pairs(folder: Path, ids: list[str]) -> list[Pair]:
    return [Pair(folder / "img" / f"{i}.jpg", folder / "cls" / f"{i}.mat") for i in ids]


def _trainaug(root: Path) -> tuple[Path, list[Pair]]:
    voc, sbd = find_voc(root, 2012), _find_sbd(root)
    train, val = (read_ids(voc / LISTS / f"{part}.txt") for part in ("train", "val"))
    taken = {*train, *val}
    extra = [
        identity
        for part in ("train", "val")
        for identity in read_ids(sbd / f"{part}.txt")
        if identity not in taken
    ]
    return sbd, [*voc_pairs(voc, train, "SegmentationClass"), *_sbd_pairs(sbd, extra)]


def _seg11valid(root: Path) -> tuple[Path, list[Pair]]:
    folders: dict[int, Path] = {}
    for year in (2011, 2012):
        with suppress(FileNotFoundError):
            folders[year] = find_voc(root, year)
    for voc in folders.values():
        listing = voc / LISTS / "seg11valid.txt"
        if listing.is_file():
            return listing, voc_pairs(voc, read_ids(listing), "SegmentationClass")
    if 2011 not in folders:
        raise FileNotFoundError(
            f"{root}: expected {LISTS}/seg11valid.txt in VOC2011 or VOC2012, or else VOC2011's "
            "val.txt to work the list out, but found neither. Put the FCN release's list there."
        )
    seen = set(read_ids(_find_sbd(root) / "train.txt"))
    voc = folders[2011]
    listing = voc / LISTS / "val.txt"
    ids = [identity for identity in read_ids(listing) if identity not in seen]
    return listing, voc_pairs(voc, ids, "SegmentationClass")
