# SPDX-License-Identifier: Apache-2.0
"""Your own images: folders of pictures and label maps, and a list of class names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .files import _MAX_CLASSES, FileDataset, pair_by_stem, read_lines
from .palette import voc_palette


class Folder(FileDataset):
    """A dataset in plain folders.

    Expected below ``root``::

        classes.txt                 one class name per line; the first is id 0; "#" starts a
                                    comment line; a colour "r g b" may follow the name
        images/<split>/<stem>.jpg   photographs: .jpg, .png and other common formats
        labels/<split>/<stem>.png   label maps of the same size: grey or palette PNG whose values
                                    are the class ids, 255 where nothing is known (void)

    Any split name works that has a folder. Without ``labels/<split>`` the split has no labels
    (``has_labels`` is False): it can be segmented, not trained on or scored. Classes without a
    colour get VOC's colour for their id.

    Mind a binary mask saved as 0 and 255: 255 is void here; save the object as 1.

    Args:
        root: Folder of the dataset.
        split: Name of a folder below ``images``.

    Raises:
        FileNotFoundError: If ``classes.txt``, the image folder, or a label map is missing.
        ValueError: If ``classes.txt`` is malformed or the split is empty.
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        """See the class."""
        folder = Path(root)
        self.classes, self.palette = read_classes(folder / "classes.txt")
        images, labels = folder / "images" / split, folder / "labels" / split
        if not images.is_dir() and images.parent.is_dir():
            splits = sorted(path.name for path in images.parent.iterdir() if path.is_dir())
            raise FileNotFoundError(
                f"{images}: expected a folder of images for split {split!r}, but there is none. "
                f"Splits found: {', '.join(splits) or 'none'}."
            )
        super().__init__(split, pair_by_stem(images, labels if labels.is_dir() else None), images)
        self._labels_hint = f"Put its label maps into {labels}."


def read_classes(path: Path) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
    """Read class names and colours, one ``name`` or ``name r g b`` per line.

    Returns:
        The names, and uint8 ``[num_classes, 3]``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it names no class, a class twice, more than 255 classes, or a colour
            outside 0 .. 255.
    """
    names: list[str] = []
    colors: dict[int, list[int]] = {}
    for line in read_lines(path):
        if line.startswith("#"):
            continue
        words = line.split()
        if len(words) > 3 and all(word.isdecimal() for word in words[-3:]):
            color = [int(word) for word in words[-3:]]
            if max(color) > 255:
                raise ValueError(f"{path}: expected colours in 0 .. 255, but got {line!r}.")
            colors[len(names)] = color
            del words[-3:]
        name = " ".join(words)
        if name in names:
            raise ValueError(f"{path}: expected each class once, but got {name!r} twice.")
        names.append(name)
    if not 1 <= len(names) <= _MAX_CLASSES:
        raise ValueError(
            f"{path}: expected 1 to {_MAX_CLASSES} class names, one per line, but got {len(names)}."
        )
    palette = voc_palette(len(names))
    for index, color in colors.items():
        palette[index] = color
    return tuple(names), palette
