# SPDX-License-Identifier: Apache-2.0
"""Reading images and label maps from files, strictly: a bad file is named, never guessed at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from .base import IGNORE, Image, Label, SegmentationDataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""File suffixes (in any case) that count as photographs in folder listings."""

_MAX_CLASSES = 255  # ids 0 .. 254; 255 is void


def pillow() -> ModuleType:
    """``PIL.Image``, imported on first use, so that generated data needs no Pillow.

    Raises:
        ImportError: If Pillow is not installed; the message says how to install it.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(
            "dilseg.data reads and writes image files with Pillow, which is not installed. "
            'Run: pip install "dilseg[datasets]"'
        ) from error
    return PIL.Image


def read_image(path: str | os.PathLike[str]) -> Image:
    """Read a photograph.

    Grey, palette and CMYK pictures become RGB; transparency is dropped. Pixels come in the order
    in which they are stored: an EXIF orientation is not applied, because label maps do not
    follow it.

    Args:
        path: An 8-bit picture of any format that Pillow reads.

    Returns:
        uint8 ``[h, w, 3]``, RGB.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no image, is truncated, or has more than 8 bits per channel.
    """
    array, mode = _decode(path, "image", to_rgb=True)
    if array.dtype != np.uint8 or array.ndim != 3:
        raise ValueError(
            f"{path}: expected an image with 8 bits per channel, but got mode {mode!r}. "
            "Convert it to 8-bit RGB."
        )
    return array.astype(np.uint8, copy=False)


def read_label(
    path: str | os.PathLike[str],
    num_classes: int,
    *,
    void: Sequence[int] = (),
    classes: Sequence[str] | None = None,
) -> Label:
    """Read a label map: one class id per pixel, as stored, never by way of colours.

    Args:
        path: A losslessly compressed one-channel picture (grey or palette); ids are its values
            or palette indices.
        num_classes: Ids ``0 .. num_classes - 1`` are valid.
        void: Further stored values that mean void; :data:`IGNORE` always does.
        classes: Class names, only used in error messages.

    Returns:
        uint8 ``[h, w]``, void as :data:`IGNORE`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt, is a colour picture or a JPEG, or holds another value.
    """
    array, mode = _decode(path, "label map", to_rgb=False)
    if mode == "JPEG":
        raise ValueError(
            f"{path}: expected a losslessly compressed label map, but got a JPEG, which alters "
            "class ids. Save label maps as PNG."
        )
    if array.ndim != 2 or array.dtype.kind not in "bui":
        raise ValueError(
            f"{path}: expected a label map with one class id per pixel (grey or palette PNG), but "
            f"got a picture of mode {mode!r}. Save the class indices themselves, "
            "never .convert('RGB') of them."
        )
    return _checked_ids(path, array, num_classes, void, classes)


def _checked_ids(
    path: str | os.PathLike[str],
    array: NDArray[np.generic],
    num_classes: int,
    void: Sequence[int],
    classes: Sequence[str] | None,
) -> Label:
    table = np.full(257, IGNORE, np.uint8)
    table[:num_classes] = np.arange(num_classes, dtype=np.uint8)
    known = np.zeros(257, bool)  # entry 256 stands for all that does not fit into 8 bits
    known[:num_classes] = True
    known[[*void, IGNORE]] = True
    values = array.astype(np.int64)
    positions = np.where((values < 0) | (values > 255), 256, values)
    bad = ~known[positions]
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        found = np.unique(values[bad]).tolist()
        shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        names = f" ({classes[0]} .. {classes[-1]})" if classes else ""
        voids = " or ".join(str(v) for v in sorted({*void, IGNORE}))
        raise ValueError(
            f"{path}: expected label values in 0 .. {num_classes - 1}{names} or {voids} for void, "
            f"but got {shown} ({int(bad.sum())} pixels, first at row {row}, column {column}). "
            "Map the labels to class ids, or check the list of classes."
        )
    return table[positions]


def _decode(
    path: str | os.PathLike[str], what: str, *, to_rgb: bool
) -> tuple[NDArray[np.generic], str]:
    """Pixels of a file, with its mode, or "JPEG" for a one-channel JPEG that should be a label."""
    library = pillow()
    try:
        with library.open(path) as picture:
            mode = str(picture.mode)
            if to_rgb and not mode.startswith(("I", "F")):
                return np.array(picture.convert("RGB")), mode
            pixels = np.array(picture)
            if not to_rgb and picture.format == "JPEG" and pixels.ndim == 2:
                mode = "JPEG"
            return pixels, mode
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: expected an existing {what}, but there is no such file."
        ) from None
    # Pillow's readers report damage by any of these, depending on format and place.
    except (OSError, SyntaxError, ValueError, EOFError, library.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: expected a readable {what}, but got a corrupt or truncated file or no image "
            f"at all ({error}). Replace it, or take it off the list."
        ) from error


class Pair(NamedTuple):
    """Files of one sample; ``label`` is None where a split has no labels."""

    image: Path
    label: Path | None


class FileDataset(SegmentationDataset):
    """A dataset given by a list of image and label files.

    Subclasses set ``classes``, ``palette`` and, where it applies, ``void``.

    Args:
        split: Name of the split.
        pairs: The files, in order; at least one pair; all with labels or all without.
        source: The list or folder that named them, for error messages.

    Raises:
        ValueError: If ``pairs`` is empty.
        FileNotFoundError: If a file is missing: better at once than in the middle of an epoch.
    """

    void: tuple[int, ...] = ()

    def __init__(self, split: str, pairs: Sequence[Pair], source: Path) -> None:
        """See the class."""
        if not pairs:
            raise ValueError(f"{source}: expected at least one image, but the split is empty.")
        for pair in pairs:
            for kind, path in zip(("image", "label map"), pair, strict=True):
                if path is not None and not path.is_file():
                    raise FileNotFoundError(
                        f"{path}: expected an existing {kind} (named by {source}), "
                        "but there is no such file."
                    )
        self.split = split
        self.has_labels = all(pair.label is not None for pair in pairs)
        self._pairs = tuple(pairs)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._pairs)

    def files(self, index: int) -> Pair:
        """Paths of a sample's image and label map."""
        return self._pairs[self._position(index)]

    def name(self, index: int) -> str:
        """Stem of the image file."""
        return self.files(index).image.stem

    def load_image(self, index: int) -> Image:
        """See :meth:`SegmentationDataset.load_image`; reads with :func:`read_image`."""
        return read_image(self.files(index).image)

    def load_label(self, index: int) -> Label:
        """See :meth:`SegmentationDataset.load_label`; reads with :func:`read_label`."""
        self.require_labels()
        path = cast("Path", self.files(index).label)
        return read_label(path, self.num_classes, void=self.void, classes=self.classes)

    def load(self, index: int) -> tuple[Image, Label]:
        """See :meth:`SegmentationDataset.load`."""
        image, label = super().load(index)
        (h, w), (label_h, label_w) = image.shape[:2], label.shape
        if (h, w) != (label_h, label_w):
            files = self.files(index)
            cause = (
                "The image may have been turned by its EXIF orientation while it was labelled; "
                "store it upright."
                if (h, w) == (label_w, label_h)
                else "Resize the label map with nearest-neighbour, or pair the right files."
            )
            raise ValueError(
                f"{files.label}: expected a label map as large as its image {files.image}, "
                f"{h} x {w} (height x width), but got {label_h} x {label_w}. {cause}"
            )
        return image, label


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder (not of its subfolders) by name; hidden files are left out.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If two images share a stem, so that their label would be the same.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected a folder of images, but there is no such folder."
        )
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    stems: dict[str, Path] = {}
    for path in found:
        twin = stems.setdefault(path.stem, path)
        if twin is not path:
            raise ValueError(
                f"{folder}: expected images with different stems, but got {twin.name} and "
                f"{path.name}. Rename or remove one of them."
            )
    return found


def pair_by_stem(images: Path, labels: Path | None) -> list[Pair]:
    """Pair each image of a folder with ``<stem>.png`` of another (None: no labels)."""
    return [
        Pair(path, None if labels is None else labels / f"{path.stem}.png")
        for path in list_images(images)
    ]


def read_lines(path: Path) -> list[str]:
    """Stripped, non-empty lines of a text file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: expected an existing text file, but there is no such file."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, but got other bytes ({error}).") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
