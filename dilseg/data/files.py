# SPDX-License-Identifier: Apache-2.0
"""Reading images and label maps from files, strictly: a bad file is named, never guessed at."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from .base import IGNORE, Image, Label, SegmentationDataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""File suffixes (in any case) that count as photographs in folder listings."""

# By content, whatever the suffix. Other readers of Pillow are for rarer formats, and that of
# PostScript starts another program.
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
_MAX_CLASSES = 255  # ids 0 .. 254; 255 is void
_MAX_TEXT = 2**24  # bytes of a list; the longest published ones have about 1 MB
_MAX_LINE = 4096
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError, struct.error)


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
        path: An 8-bit picture: JPEG, PNG, BMP, TIFF, WebP, GIF or PPM, whatever its suffix.

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


def read_depth(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read a depth map.

    Args:
        path: A grey picture of 8 or 16 bits, losslessly compressed.

    Returns:
        ``[h, w]``, integers >= 0 as stored.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt, or no such picture.
    """
    array, mode = _decode_label(path)
    if array.ndim != 2 or array.dtype.kind not in "ui" or int(array.min()) < 0:
        raise ValueError(
            f"{path}: expected a depth map as a 16-bit grey picture, but got mode {mode!r}."
        )
    return array


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
    array, mode = _decode_label(path)
    return _checked_label(path, array, mode, num_classes, void, classes)


def class_ids(
    path: str | os.PathLike[str],
    values: NDArray[Any],
    table: NDArray[np.int16],
    expected: str,
    *,
    low: int = 0,
) -> Label:
    """Translate stored values to class ids, strictly.

    Args:
        path: File that they come from, for error messages.
        values: ``[h, w]``, integers of any width, or floating point with whole values.
        table: Class id, or :data:`IGNORE`, of the values ``low``, ``low + 1``, ...; -1 for values
            that must not occur, as all beyond the table.
        expected: The allowed values in words, for error messages.
        low: Stored value of the first entry, at most 0.

    Returns:
        uint8 ``[h, w]``, void as :data:`IGNORE`.

    Raises:
        ValueError: If another value occurs.
    """
    # One entry more, for everything outside; 8-bit labels, the large ones, are looked up directly.
    padded = np.full(max(257, len(table) + 1), -1, np.int16)
    padded[: len(table)] = table
    if values.dtype == np.uint8 and low == 0:
        positions = values
    else:
        outside = ~((values >= low) & (values < low + len(table)))  # nan is outside
        if values.dtype.kind == "f":
            outside |= values != np.floor(values)
        positions = np.where(outside, 0, values).astype(np.int32)
        positions -= low
        positions[outside] = len(padded) - 1
    allowed = padded >= 0
    good = allowed[positions]
    if not good.all():
        bad = ~good
        row, column = (int(i) for i in np.argwhere(bad)[0])
        found = np.unique(values[bad]).tolist()
        shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise ValueError(
            f"{path}: expected {expected}, "
            f"but got {shown} ({int(bad.sum())} pixels, first at row {row}, column {column}). "
            "Map the labels to class ids, or check the list of classes."
        )
    ids: Label = padded.astype(np.uint8)[positions]
    return ids


def identity_table(num_classes: int, void: Sequence[int] = ()) -> NDArray[np.int16]:
    """Table for :func:`class_ids` of values that are class ids, ``void`` or :data:`IGNORE`."""
    table = np.full(256, -1, np.int16)
    table[:num_classes] = np.arange(num_classes)
    table[[*void, IGNORE]] = IGNORE
    return table


def _checked_ids(
    path: str | os.PathLike[str],
    array: NDArray[np.generic],
    num_classes: int,
    void: Sequence[int],
    classes: Sequence[str] | None,
) -> Label:
    names = f" ({classes[0]} .. {classes[-1]})" if classes else ""
    voids = " or ".join(str(v) for v in sorted({*void, IGNORE}))
    expected = f"label values in 0 .. {num_classes - 1}{names} or {voids} for void"
    return class_ids(path, array, identity_table(num_classes, void), expected)


def read_color_label(
    path: str | os.PathLike[str],
    palette: NDArray[np.uint8],
    *,
    void: Sequence[tuple[int, int, int]] = (),
    classes: Sequence[str] | None = None,
) -> Label:
    """Read a label map painted in class colours, or one of class ids in a grey picture.

    Args:
        path: A losslessly compressed colour or palette picture whose colours are exactly those of
            ``palette``; or a grey one, read as :func:`read_label` does.
        palette: Class colours, uint8 ``[num_classes, 3]``, RGB.
        void: Further colours, which mean void.
        classes: Class names, only used in error messages.

    Returns:
        uint8 ``[h, w]``, void as :data:`IGNORE`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt or a JPEG, or holds another colour or value.
    """
    array, mode = _decode_label(path)
    if mode == "P":
        array = read_image(path)
    elif mode in ("RGB", "RGBA"):
        array = array[..., :3]
    else:
        return _checked_label(path, array, mode, len(palette), (), classes)
    # Of every possible color, the class; 254 marks those that are none.
    table = np.full(2**24, 254, np.uint8)
    table[_color_codes(palette)] = np.arange(len(palette))
    table[_color_codes(np.array(void, np.uint8).reshape(-1, 3))] = IGNORE
    label: Label = table[_color_codes(array)]
    bad = label == 254
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{path}: expected the {len(palette)} class colours or {len(void)} for void, but got "
            f"{tuple(array[row, column].tolist())} ({int(bad.sum())} pixels of other colours, "
            f"first at row {row}, column {column}). Save class ids as a grey PNG, or repair the "
            "colours."
        )
    return label


def _color_codes(colors: NDArray[Any]) -> NDArray[np.int32]:
    codes = colors[..., 0].astype(np.int32)
    for channel in (1, 2):
        codes <<= 8
        codes |= colors[..., channel]
    return codes


def _decode_label(path: str | os.PathLike[str]) -> tuple[NDArray[np.generic], str]:
    array, mode = _decode(path, "label map", to_rgb=False)
    if mode == "JPEG":
        raise ValueError(
            f"{path}: expected a losslessly compressed label map, but got a JPEG, which alters "
            "class ids. Save label maps as PNG."
        )
    return array, mode


def _checked_label(
    path: str | os.PathLike[str],
    array: NDArray[np.generic],
    mode: str,
    num_classes: int,
    void: Sequence[int],
    classes: Sequence[str] | None,
) -> Label:
    if array.ndim != 2 or array.dtype.kind not in "bui":
        raise ValueError(
            f"{path}: expected a label map with one class id per pixel (grey or palette PNG), but "
            f"got a picture of mode {mode!r}. Save the class indices themselves, "
            "never .convert('RGB') of them."
        )
    return _checked_ids(path, array, num_classes, void, classes)


def _decode(
    path: str | os.PathLike[str], what: str, *, to_rgb: bool
) -> tuple[NDArray[np.generic], str]:
    """Pixels of a file, with its mode, or "JPEG" for a JPEG that should be a label map."""
    library = pillow()
    try:
        with warnings.catch_warnings():
            # Pillow warns of a bomb before it refuses one; here both are refused, unread.
            warnings.simplefilter("error", library.DecompressionBombWarning)
            # What it says of damage that it can pass over, such as in EXIF data.
            warnings.simplefilter("ignore", UserWarning)
            with library.open(path, formats=_FORMATS) as picture:
                mode = str(picture.mode)
                if to_rgb and not mode.startswith(("I", "F")):
                    return np.array(picture.convert("RGB")), mode
                pixels = np.array(picture)
                if not to_rgb and picture.format in ("JPEG", "MPO"):
                    mode = "JPEG"
                return pixels, mode
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: expected an existing {what}, but there is no such file."
        ) from None
    except (library.DecompressionBombError, library.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path}: expected a {what} of at most {library.MAX_IMAGE_PIXELS} pixels, but got a "
            f"header that declares more ({error}). Cut it into tiles; if you trust it, raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    # Pillow's readers report damage by these, depending on format and place.
    except _DAMAGE as error:
        raise ValueError(
            f"{path}: expected a readable {what}, but got a corrupt or truncated file or no image "
            f"at all ({str(error) or type(error).__name__}). Replace it, or take it off the list."
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
        return self._read_label(cast("Path", self.files(index).label))

    def _read_label(self, path: Path) -> Label:
        """Label map of a file; overridden where files are no pictures of class ids."""
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


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """Bytes of a file, but no more than ``limit + 1``: one more tells that it is too large."""
    with open(path, "rb") as file:
        # read() of a number allocates that many bytes at once.
        return file.read(min(os.fstat(file.fileno()).st_size, limit + 1))


def read_lines(path: Path) -> list[str]:
    """Stripped, non-empty lines of a text file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8 text, or too long to be a list.
    """
    try:
        data = read_bounded(path, _MAX_TEXT)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: expected an existing text file, but there is no such file."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, but got other bytes ({error}).") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(data) > _MAX_TEXT or any(len(line) > _MAX_LINE for line in lines):
        raise ValueError(
            f"{path}: expected a list of at most {_MAX_TEXT} bytes in lines of at most {_MAX_LINE} "
            "characters, but got more. Pass the right file."
        )
    return lines


def find_folder(root: Path, candidates: Sequence[str], *wanted: str, what: str) -> Path:
    """First of ``root / candidate`` that holds every file or folder of ``wanted``.

    Raises:
        FileNotFoundError: If none does; the message says what was looked for.
    """
    for candidate in candidates:
        folder = root / candidate
        if all((folder / name).exists() for name in wanted):
            return folder
    places = ", ".join(str(root / candidate) for candidate in candidates)
    raise FileNotFoundError(
        f"{root}: expected {what} ({' and '.join(wanted)} in one of {places}), but found no such "
        "files. Pass the folder that holds them as root."
    )
