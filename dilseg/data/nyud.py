# SPDX-License-Identifier: Apache-2.0
"""NYUDv2: indoor scenes with depth, 40 classes, in the FCN release's layout or the official one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .base import IGNORE, Image, Label, SegmentationDataset, require_split
from .files import (
    FileDataset,
    Pair,
    class_ids,
    find_folder,
    read_depth,
    read_image,
    read_lines,
)
from .matlab import hdf_frame, hdf_frames, hdf_size, open_hdf, read_mat
from .palette import voc_palette

_LABELLED = "nyu_depth_v2_labeled.mat"
_FIRST_ID = 5000  # id in the FCN release of the frame before the first
_IMAGES: dict[str, tuple[str, ...]] = {
    "color": ("images",),
    "hha": ("hha",),
    "rgbd": ("images", "depth"),
    "rgb-hha": ("images", "hha"),
}
_CHANNELS = {"color": 3, "hha": 3, "rgbd": 4, "rgb-hha": 6}
LOG_DEPTH_MEAN = 7.844
"""Mean logarithm of the depth in millimetres, of the FCN release."""


class NYUDv2(SegmentationDataset):
    """NYU Depth v2 (Silberman et al. 2012) with the 40 classes of Gupta et al. (2013).

    Two layouts are read; the first is taken where ``root`` holds both. That of the FCN release
    (``nyud.tar.gz``), in ``root`` or ``root/nyud``::

        data/images/img_<id>.png        photographs
        data/hha/img_<id>.png           horizontal disparity, height, angle: depth as 3 channels
        data/depth/img_<id>.png         16-bit grey: depth in millimetres
        segmentation/img_<id>.mat       MATLAB v5, segmentation: 1 .. 40, void 0
        train.txt val.txt test.txt      one id, 5001 .. 6449, per line

    and the official one, in ``root``::

        nyu_depth_v2_labeled.mat        MATLAB v7.3 with images, depths in metres, labels 0 .. 894
        classMapping40.mat              MATLAB v5, mapClass: class 1 .. 40 of each label
        splits.mat                      MATLAB v5, trainNdxs and testNdxs, counted from 1
        train.txt val.txt               only for these splits: the FCN release's lists

    Class ids are the published ones minus 1; void becomes 255. The splits have 381 (train), 414
    (val), 795 (trainval, the official training set) and 654 (test) frames of 640 x 480. Frames
    are named ``img_<id>`` in both layouts; an id is the official number plus 5000.

    Args:
        root: Folder of the dataset.
        split: ``"train"``, ``"val"``, ``"trainval"`` or ``"test"``.
        modality: ``"color"``; ``"hha"``, whose channels come in the order of the file; ``"rgbd"``,
            float32 of four channels: the photograph, then the natural logarithm of the depth in
            millimetres; or ``"rgb-hha"``, uint8 of six. HHA is only in the FCN release's layout.
            Where no depth was measured (0) its mean logarithm stands, 7.844: FCN's data layer,
            which gives none, would make it minus infinity.

    Raises:
        FileNotFoundError: If the folder, a list, or a file named by it is missing.
        ValueError: If ``split`` or ``modality`` is unknown, a file is not what it should be, or
            the split is empty.
        ImportError: If h5py or scipy is needed and not installed.
    """

    splits = ("train", "val", "trainval", "test")
    classes = (
        "wall",
        "floor",
        "cabinet",
        "bed",
        "chair",
        "sofa",
        "table",
        "door",
        "window",
        "bookshelf",
        "picture",
        "counter",
        "blinds",
        "desk",
        "shelves",
        "curtain",
        "dresser",
        "pillow",
        "mirror",
        "floor mat",
        "clothes",
        "ceiling",
        "books",
        "refridgerator",
        "television",
        "paper",
        "towel",
        "shower curtain",
        "box",
        "whiteboard",
        "person",
        "night stand",
        "toilet",
        "sink",
        "lamp",
        "bathtub",
        "bag",
        "otherstructure",
        "otherfurniture",
        "otherprop",
    )
    palette = voc_palette(41)[1:]  # none is published; void is black

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        modality: str = "color",
    ) -> None:
        """See the class."""
        require_split("NYUDv2", split, self.splits)
        if modality not in _IMAGES:
            raise ValueError(
                f"NYUDv2: expected modality to be one of {', '.join(_IMAGES)}, but got "
                f"{modality!r}."
            )
        self.split = split
        self.channels = _CHANNELS[modality]
        folder = _find_root(Path(root))
        self._frames: _Files | _Frames
        if (folder / "segmentation").is_dir():
            self._frames = _Files(folder, split, modality)
        elif "hha" not in modality:
            self._frames = _Frames(folder, split, depth=modality == "rgbd")
        else:
            raise ValueError(
                f"{folder}: expected the FCN release's layout (data/hha, segmentation) for "
                f"modality {modality!r}, but found {_LABELLED}, which has no HHA. Use modality "
                "'color' or 'rgbd'."
            )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._frames)

    def name(self, index: int) -> str:
        """Name of a frame, ``img_<id>``."""
        return self._frames.name(self._position(index))

    def load_image(self, index: int) -> Image:
        """See :meth:`SegmentationDataset.load_image`."""
        return self._frames.load_image(self._position(index))

    def load_label(self, index: int) -> Label:
        """See :meth:`SegmentationDataset.load_label`."""
        return self._frames.load_label(self._position(index))

    def load(self, index: int) -> tuple[Image, Label]:
        """See :meth:`SegmentationDataset.load`."""
        return self._frames.load(self._position(index))


def _find_root(root: Path) -> Path:
    for folder in (root, root / "nyud"):
        if (folder / "segmentation").is_dir():
            return folder
    if (root / _LABELLED).is_file():
        return root
    raise FileNotFoundError(
        f"{root}: expected NYUDv2, either as the FCN release's nyud (segmentation/, data/images/, "
        f"data/hha/) or as {_LABELLED}, classMapping40.mat and splits.mat, but found neither. "
        "Pass the folder that holds them as root."
    )


def _listed_ids(folder: Path, split: str) -> list[str]:
    """Ids of a split by the FCN release's lists; its trainval is train and val together."""
    if split == "trainval" and not (folder / "trainval.txt").is_file():
        return [*_listed_ids(folder, "train"), *_listed_ids(folder, "val")]
    return read_lines(folder / f"{split}.txt")


class _Files(FileDataset):
    """The FCN release's layout: a file per frame."""

    classes = NYUDv2.classes
    palette = NYUDv2.palette
    _table = np.array([IGNORE, *range(40)], np.int16)

    def __init__(self, folder: Path, split: str, modality: str) -> None:
        images, *others = (Path("data") / name for name in _IMAGES[modality])
        folder = find_folder(folder, [""], str(images), "segmentation", what="NYUDv2")
        pairs = [
            Pair(
                folder / images / f"img_{identity}.png",
                folder / "segmentation" / f"img_{identity}.mat",
            )
            for identity in _listed_ids(folder, split)
        ]
        super().__init__(split, pairs, folder)
        self._behind = folder / others[0] if others else None
        for pair in pairs if self._behind else ():
            path = cast("Path", self._behind) / pair.image.name
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: expected an existing file for each photograph in {folder / images}, "
                    "but there is no such file."
                )

    def load_image(self, index: int) -> Image:
        """Photograph or HHA of a frame, and what the modality puts behind it."""
        image = super().load_image(index)
        if self._behind is None:
            return image
        path = self._behind / self.files(index).image.name
        depth = self._behind.name == "depth"
        behind = log_depth(read_depth(path)) if depth else read_image(path)
        if behind.shape[:2] != image.shape[:2]:
            raise ValueError(
                f"{path}: expected a map as large as its photograph, {image.shape[0]} x "
                f"{image.shape[1]} (height x width), but got {behind.shape[0]} x {behind.shape[1]}."
            )
        return np.concatenate([image, behind], axis=2)

    def _read_label(self, path: Path) -> Label:
        expected = "segmentation in 1 .. 40 (wall .. otherprop) or 0 for void"
        return class_ids(path, read_mat(path, "segmentation"), self._table, expected)


class _Frames(SegmentationDataset):
    """The official layout: all frames in one file, which is opened for each (workers fork)."""

    classes = NYUDv2.classes
    palette = NYUDv2.palette

    def __init__(self, folder: Path, split: str, *, depth: bool = False) -> None:
        self.split = split
        self._path = folder / _LABELLED
        self._depth = depth
        with open_hdf(self._path) as file:
            images, labels = _datasets(file)
            count, size = images.shape[0], images.shape[2:]
            agree = labels.shape == (count, *size)
            if depth:
                agree &= _depths(file).shape == (count, *size)
            names = hdf_size(file, "names")
        if not agree:
            raise ValueError(
                f"{self._path}: expected labels (and depths) for each of its {count} images of "
                f"{size[0]} x {size[1]} (width x height), but got {labels.shape}. Fetch it again."
            )
        self._table = _read_mapping(folder / "classMapping40.mat", names)
        self._indices = _read_indices(folder, split, count)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return f"img_{self._indices[index] + 1 + _FIRST_ID}"

    def load_image(self, index: int) -> Image:
        with open_hdf(self._path) as file:
            # MATLAB's [height, width, 3, frames], which HDF5 stores with the axes reversed.
            frame = hdf_frame(_datasets(file)[0], self._indices[index])
            image = np.ascontiguousarray(frame.transpose(2, 1, 0))
            if not self._depth:
                return image
            metres = hdf_frame(_depths(file), self._indices[index])
        return np.concatenate([image, log_depth(1000 * metres.T)], axis=2)

    def load_label(self, index: int) -> Label:
        with open_hdf(self._path) as file:
            frame = hdf_frame(_datasets(file)[1], self._indices[index])
        name = f"{self._path}, frame {self._indices[index] + 1}"
        expected = f"labels in 0 .. {len(self._table) - 1}, the labels of classMapping40.mat"
        return class_ids(name, np.ascontiguousarray(frame.T), self._table, expected)


def _datasets(file: object) -> tuple[Any, Any]:
    images = hdf_frames(file, "images", "uint8", 3, None, None)
    return images, hdf_frames(file, "labels", "uint8 uint16 uint32", None, None)


def _depths(file: object) -> Any:  # noqa: ANN401
    return hdf_frames(file, "depths", "float32 float64", None, None)


def log_depth(millimetres: NDArray[Any]) -> NDArray[np.float32]:
    """Take the logarithm of depths ``[h, w]`` in millimetres, as float32 ``[h, w, 1]``.

    Where nothing was measured, 0 (or nan), stands the mean logarithm.

    Example:
        >>> log_depth(np.array([[0, 1000]], np.uint16))[..., 0].round(3)
        array([[7.844, 6.908]], dtype=float32)
    """
    measured = millimetres > 0
    safe = np.where(measured, millimetres, 1).astype(np.float64)
    found: NDArray[np.float32] = np.where(measured, np.log(safe), LOG_DEPTH_MEAN)
    return found.astype(np.float32)[..., None]


def _read_mapping(path: Path, labels: int | None) -> NDArray[np.int16]:
    """Class id of each label 0, 1, ..., void as IGNORE."""
    classes = read_mat(path, "mapClass").ravel()
    if not np.isin(classes, np.arange(1, 41)).all():
        raise ValueError(
            f"{path}: expected mapClass with classes in 1 .. 40, but got {classes.min()} .. "
            f"{classes.max()}. Fetch the file again."
        )
    if labels not in (None, classes.size):
        raise ValueError(
            f"{path}: expected mapClass with a class for each of the {labels} labels of "
            f"{_LABELLED}, but got {classes.size}. Fetch both files again."
        )
    return np.array([IGNORE, *(classes.astype(np.int16) - 1)], np.int16)


def _read_indices(folder: Path, split: str, count: int) -> list[int]:
    """Positions of a split's frames in the labelled file."""
    if split in ("train", "val"):
        path = folder / f"{split}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected the FCN release's list of split {split!r}, which the official "
                "files do not have. Put it there, or use the official split 'trainval'."
            )
        words = _listed_ids(folder, split)
        numbers = [int(word) - _FIRST_ID if word.isdecimal() else 0 for word in words]
    else:
        path = folder / "splits.mat"
        values = read_mat(path, "trainNdxs" if split == "trainval" else "testNdxs").ravel()
        numbers = [int(value) if float(value).is_integer() else 0 for value in values.tolist()]
    wrong = [number for number in numbers if not 1 <= number <= count]
    if wrong or not numbers:
        raise ValueError(
            f"{path}: expected frames of the {count} in {_LABELLED}, but got "
            f"{f'number {wrong[0]}' if wrong else 'none'}. Fetch both files again."
        )
    return [number - 1 for number in numbers]
