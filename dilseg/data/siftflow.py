# SPDX-License-Identifier: Apache-2.0
"""SIFT Flow: outdoor scenes with 33 semantic and 3 geometric classes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .base import IGNORE, Label, SeveralHeads, require_split
from .files import FileDataset, Pair, class_ids, find_folder, read_lines
from .matlab import read_mat
from .palette import voc_palette

_SCENES = "spatial_envelope_256x256_static_8outdoorcategories"
_FOLDERS = {"semantic": "SemanticLabels", "geometric": "GeoLabels"}
_NOT_IN_TEST = ("cow", "desert", "moon")
_CLASSES = {
    "semantic": (
        "awning", "balcony", "bird", "boat", "bridge", "building", "bus", "car", "cow",
        "crosswalk", "desert", "door", "fence", "field", "grass", "moon", "mountain",
        "person", "plant", "pole", "river", "road", "rock", "sand", "sea", "sidewalk",
        "sign", "sky", "staircase", "streetlight", "sun", "tree", "window",
    ),
    "geometric": ("sky", "horizontal", "vertical"),
}  # fmt: skip


class SiftFlow(FileDataset):
    """SIFT Flow (Liu et al. 2009): 256 x 256 scenes, 33 semantic or 3 geometric classes.

    Expected in ``root`` (or ``root/sift-flow``, ``root/SiftFlowDataset``), with ``<scenes>`` for
    ``spatial_envelope_256x256_static_8outdoorcategories``::

        Images/<scenes>/<id>.jpg
        SemanticLabels/<scenes>/<id>.mat     MATLAB v5, S: 1 .. 33, void 0
        GeoLabels/<scenes>/<id>.mat          MATLAB v5, S: 1 .. 3, void 0 or -1
        trainval.txt test.txt                one id per line; FCN's lists, without the two
                                             images that nobody annotated

    Class ids are the stored values minus 1; void becomes 255. The published splits have 2486 and
    200 images. Three semantic classes (cow, desert, moon) never occur in the test images;
    published means, and the first of ``score_sets``, are over the 30 others.

    Use :class:`SiftFlowBoth` for both label maps of an image at once.

    Args:
        root: Folder of the dataset.
        split: ``"trainval"`` or ``"test"``.
        labels: ``"semantic"`` or ``"geometric"``.

    Raises:
        FileNotFoundError: If the folder, a list, or a file named by it is missing.
        ValueError: If ``split`` or ``labels`` is unknown or the split is empty.
    """

    splits = ("trainval", "test")

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "trainval",
        labels: str = "semantic",
    ) -> None:
        """See the class."""
        require_split("SiftFlow", split, self.splits)
        if labels not in _FOLDERS:
            raise ValueError(
                f"SiftFlow: expected labels to be 'semantic' or 'geometric', but got {labels!r}."
            )
        places = ("", "sift-flow", "SiftFlowDataset")
        folder = find_folder(Path(root), places, "Images", _FOLDERS[labels], what="SIFT Flow")
        self.classes, self.palette = siftflow_classes(labels)
        if labels == "semantic":
            self.score_sets = {
                "30 classes that the test labels hold": tuple(
                    name for name in self.classes if name not in _NOT_IN_TEST
                ),
                "all 33 classes": self.classes,
            }
        listing = folder / f"{split}.txt"
        pairs = [
            Pair(
                folder / "Images" / _SCENES / f"{identity}.jpg",
                folder / _FOLDERS[labels] / _SCENES / f"{identity}.mat",
            )
            for identity in read_lines(listing)
        ]
        super().__init__(split, pairs, listing)

    def _read_label(self, path: Path) -> Label:
        # One table for both: -1, which only geometric labels hold, then 0, then the classes.
        low = 0 if self.num_classes == 33 else -1
        table = np.array([*[IGNORE] * (1 - low), *range(self.num_classes)], np.int16)
        void = "0 for void" if low == 0 else "0 or -1 for void"
        expected = (
            f"S in 1 .. {self.num_classes} ({self.classes[0]} .. {self.classes[-1]}) or {void}"
        )
        return class_ids(path, read_mat(path, "S"), table, expected, low=low)


def siftflow_classes(labels: str) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
    """Names and colours of the ``"semantic"`` or the ``"geometric"`` classes."""
    names = _CLASSES[labels]
    return names, voc_palette(len(names) + 1)[1:]  # not black, its background


class SiftFlowBoth(SeveralHeads):
    """SIFT Flow with two label maps per image: heads ``"sem"`` (33 classes) and ``"geo"`` (3).

    Labels are ``[h, w, 2]``. Files, splits and errors are those of :class:`SiftFlow`.

    Args:
        root: Folder of the dataset.
        split: ``"trainval"`` or ``"test"``.
    """

    splits = SiftFlow.splits

    def __init__(self, root: str | os.PathLike[str], split: str = "trainval") -> None:
        """See the class."""
        super().__init__(
            {
                "sem": SiftFlow(root, split, "semantic"),
                "geo": SiftFlow(root, split, "geometric"),
            }
        )
