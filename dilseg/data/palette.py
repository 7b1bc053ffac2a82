# SPDX-License-Identifier: Apache-2.0
"""Class colours: palettes, palette PNG files of label maps, overlays on photographs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .base import IGNORE, Image, Label
from .files import pillow

_PIXELS_AT_ONCE = 2**20  # mixed in float64, whose memory would exceed that of a large image


def voc_palette(num_colors: int = 256) -> NDArray[np.uint8]:
    """Colours of PASCAL VOC, defined for every id.

    Bits 0, 1, 2 of an id become bit 7 of red, green, blue; its next three bits become bit 6, and
    so on. Void (255) gets ``(224, 224, 192)``.

    Args:
        num_colors: Number of colours wanted, 1 to 256.

    Returns:
        uint8 ``[num_colors, 3]``, RGB.

    Example:
        >>> voc_palette(4).tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    """
    if not 1 <= num_colors <= 256:
        raise ValueError(f"voc_palette: expected num_colors in 1 .. 256, but got {num_colors}.")
    ids = np.arange(num_colors)
    palette = np.zeros((num_colors, 3), np.int64)
    for level in range(3):  # 8 bits of an id, three per level
        for channel in range(3):
            palette[:, channel] |= (ids >> (3 * level + channel) & 1) << (7 - level)
    return palette.astype(np.uint8)


def full_palette(palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Extend class colours to 256 entries; ids without a colour, void too, get VOC's.

    Args:
        palette: uint8 ``[num_classes, 3]``, RGB, at most 256 rows.

    Returns:
        uint8 ``[256, 3]``.

    Raises:
        ValueError: If ``palette`` has another shape.
        TypeError: If it is not uint8.
    """
    if palette.ndim != 2 or palette.shape[1] != 3 or len(palette) > 256:
        raise ValueError(
            f"palette: expected shape [num_classes <= 256, 3], but got {list(palette.shape)}."
        )
    if palette.dtype != np.uint8:
        raise TypeError(f"palette: expected dtype uint8, but got {palette.dtype}.")
    full = voc_palette()
    full[: len(palette)] = palette
    return full


def colorize(label: Label, palette: NDArray[np.uint8]) -> Image:
    """Paint a label map in class colours.

    Args:
        label: uint8 ``[h, w]``.
        palette: uint8 ``[num_classes, 3]``, RGB.

    Returns:
        uint8 ``[h, w, 3]``, RGB.

    Example:
        >>> import numpy as np
        >>> colorize(np.array([[0, 1, 255]], np.uint8), voc_palette(2)).tolist()
        [[[0, 0, 0], [128, 0, 0], [224, 224, 192]]]
    """
    return full_palette(palette)[_label_array(label)]


def overlay(image: Image, label: Label, palette: NDArray[np.uint8], alpha: float = 0.5) -> Image:
    """Blend class colours over a photograph; void pixels keep the photograph.

    Args:
        image: uint8 ``[h, w, 3]``, RGB.
        label: uint8 ``[h, w]``.
        palette: uint8 ``[num_classes, 3]``, RGB.
        alpha: Opacity of the colours: 0 shows the image alone, 1 the colours alone.

    Returns:
        uint8 ``[h, w, 3]``, RGB.

    Raises:
        ValueError: If the sizes differ or ``alpha`` is outside ``[0, 1]``.

    Example:
        >>> import numpy as np
        >>> image = np.full((1, 2, 3), 200, np.uint8)
        >>> overlay(image, np.array([[1, 255]], np.uint8), voc_palette(2)).tolist()
        [[[164, 100, 100], [200, 200, 200]]]
    """
    label = _label_array(label)
    if image.shape != (*label.shape, 3):
        raise ValueError(
            f"overlay: expected image shape [h, w, 3] = {[*label.shape, 3]} as large as the "
            f"label map, but got {list(image.shape)}."
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"overlay: expected alpha in [0, 1], but got {alpha}.")
    result = np.empty_like(image)
    rows = max(1, _PIXELS_AT_ONCE // max(1, label.shape[1]))
    for first in range(0, len(label), rows):
        part = slice(first, first + rows)
        weight = np.where(label[part] == IGNORE, 0.0, alpha)[..., None]
        mixed = image[part] * (1.0 - weight) + colorize(label[part], palette) * weight
        result[part] = np.rint(mixed)
    return result


def save_palette_png(
    path: str | os.PathLike[str],
    label: Label | torch.Tensor,
    palette: NDArray[np.uint8] | None = None,
) -> None:
    """Write a label map as a palette PNG: the file's values are the class ids, colours only show.

    The file appears whole or not at all: it is written beside ``path`` and then renamed.

    Args:
        path: File to write; its folder must exist. Should end in ``.png``.
        label: uint8 ``[h, w]``, array or CPU tensor; ids are kept as they are, void (255) too.
        palette: uint8 ``[num_classes, 3]``, RGB; VOC's colours by default.

    Raises:
        ValueError: If ``label`` is not two-dimensional.
        TypeError: If it is not uint8.
        ImportError: If Pillow is not installed.
    """
    picture = pillow().fromarray(_label_array(label))
    picture.putpalette(full_palette(voc_palette() if palette is None else palette).tobytes())
    _save(picture, path)


def save_image(path: str | os.PathLike[str], image: Image) -> None:
    """Write a picture as PNG, whole or not at all (see :func:`save_palette_png`).

    Args:
        path: File to write; its folder must exist. Should end in ``.png``.
        image: uint8 ``[h, w, 3]``, RGB.

    Raises:
        ValueError: If ``image`` has another shape.
        TypeError: If it is not uint8.
        ImportError: If Pillow is not installed.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: expected shape [h, w, 3], but got {list(image.shape)}.")
    if image.dtype != np.uint8:
        raise TypeError(f"image: expected dtype uint8, but got {image.dtype}.")
    _save(pillow().fromarray(image), path)


def save_grey_png(path: str | os.PathLike[str], values: Label | torch.Tensor) -> None:
    """Write a map of one value per pixel as 8-bit grey PNG, whole or not at all.

    Args:
        path: File to write; its folder must exist. Should end in ``.png``.
        values: uint8 ``[h, w]``, array or CPU tensor; 0 is black, 255 white.

    Raises:
        ValueError: If ``values`` is not two-dimensional.
        TypeError: If it is not uint8.
        ImportError: If Pillow is not installed.
    """
    _save(pillow().fromarray(_label_array(values, "values")), path)


def _label_array(label: Label | torch.Tensor, name: str = "label") -> Label:
    array = label.detach().numpy() if isinstance(label, torch.Tensor) else label
    if array.dtype != np.uint8:
        raise TypeError(
            f"{name}: expected dtype uint8, but got {array.dtype}. Use .astype(numpy.uint8) or "
            ".to(torch.uint8)."
        )
    if array.ndim != 2:
        raise ValueError(f"{name}: expected shape [h, w], but got {list(array.shape)}.")
    return np.ascontiguousarray(array)


def _save(picture: object, path: str | os.PathLike[str]) -> None:
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        picture.save(temporary, format="PNG")  # type: ignore[attr-defined]
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
