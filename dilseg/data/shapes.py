# SPDX-License-Identifier: Apache-2.0
"""Shapes: a generated dataset that needs no files and that a CPU learns in minutes.

Every image shows one to four flat or striped figures on a textured ground. The class of a pixel
follows from the outline of the figure alone: colours, sizes, angles and textures are random and
say nothing about it. Outlines carry a void ring, as in PASCAL VOC.

A figure is drawn from its signed distance d (pixels, negative inside): the image blends its colour
with opacity ``clip(1/2 - d, 0, 1)``, the label map takes void where ``|d| < 1`` and the class where
``d <= -1``; later figures cover earlier ones.

Samples are the same on every machine: the numbers come from the raw 64-bit stream of PCG64, which
numpy keeps stable between versions (its distributions it does not), and arrays only see operations
that IEEE 754 rounds exactly (no sine, no reduction in floating point).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .base import IGNORE, Image, Label, SegmentationDataset, require_split

_Field: TypeAlias = NDArray[np.float64]
_DistanceFunction: TypeAlias = Callable[[_Field, _Field], _Field]

_VOID_HALF_WIDTH = 1.0  # pixels on each side of an outline
_MAX_FIGURES = 4
_PLACING_TRIES = 8
_MIN_CONTRAST = 72.0  # of 255, in the channel where figure and ground differ most


class Shapes(SegmentationDataset):
    """Generated images of discs, squares, triangles, rings, crosses and stars.

    Sample ``index`` is a function of ``(seed, split, index)`` and ``size`` alone; the splits draw
    from different random streams, so they share no image, and a longer set starts with the
    shorter one.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        length: Number of samples; 2000 for train, 200 for val and test by default.
        size: Height and width of the images in pixels; figures scale with the smaller one.
        seed: Seed of the whole dataset, >= 0.

    Raises:
        ValueError: If ``split`` is unknown, or ``length``, ``size`` or ``seed`` is out of range.

    Example:
        >>> dataset = Shapes("val", size=(64, 80))
        >>> image, label = dataset[0]
        >>> image.shape, image.dtype, label.shape, label.dtype
        ((64, 80, 3), dtype('uint8'), (64, 80), dtype('uint8'))
        >>> dataset.classes
        ('background', 'disc', 'square', 'triangle', 'ring', 'cross', 'star')
        >>> len(dataset), dataset.name(3)
        (200, 'val_00003')
    """

    splits = ("train", "val", "test")
    classes = ("background", "disc", "square", "triangle", "ring", "cross", "star")
    palette = np.array(
        [
            (0, 0, 0),
            (230, 75, 60),
            (60, 130, 220),
            (70, 180, 90),
            (240, 190, 50),
            (160, 90, 200),
            (60, 200, 200),
        ],
        np.uint8,
    )

    def __init__(
        self,
        split: str = "train",
        *,
        length: int | None = None,
        size: tuple[int, int] = (96, 96),
        seed: int = 0,
    ) -> None:
        """See the class."""
        self.split = require_split("Shapes", split, self.splits)
        if length is None:
            length = 2000 if split == "train" else 200
        if length < 1:
            raise ValueError(f"Shapes: expected length >= 1, but got {length}.")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"Shapes: expected size (height, width) >= 1, but got {size}.")
        if seed < 0:
            raise ValueError(f"Shapes: expected seed >= 0, but got {seed}.")
        self.size = (int(size[0]), int(size[1]))
        self.seed = seed
        self._length = length

    def __len__(self) -> int:
        """Number of samples."""
        return self._length

    def name(self, index: int) -> str:
        """Split and number of the sample."""
        return f"{self.split}_{self._position(index):05d}"

    def load_image(self, index: int) -> Image:
        """See :meth:`SegmentationDataset.load_image`."""
        return self.load(index)[0]

    def load_label(self, index: int) -> Label:
        """See :meth:`SegmentationDataset.load_label`."""
        return self.load(index)[1]

    def load(self, index: int) -> tuple[Image, Label]:
        """Draw a sample; see :meth:`SegmentationDataset.load`."""
        stream = _Stream(self.seed, self.splits.index(self.split), self._position(index))
        h, w = self.size
        canvas = _ground(stream, h, w)
        label = np.zeros((h, w), np.uint8)
        placed: list[tuple[float, float, float]] = []
        for _ in range(1 + stream.below(_MAX_FIGURES)):
            class_id = 1 + stream.below(len(_FIGURES))
            spot = _place(stream, h, w, placed)
            if spot is not None:
                placed.append(spot)
                _draw(stream, canvas, label, class_id, *spot)
        noise = stream.noise(h, w) * stream.between(2.0, 10.0)
        image = np.rint(np.clip(canvas + noise, 0.0, 255.0)).astype(np.uint8)
        return image, label


class _Stream:
    """Random numbers that do not depend on the version of numpy."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def unit(self) -> float:
        """Uniform in [0, 1), a multiple of 2^-53."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def below(self, count: int) -> int:
        return int(self.unit() * count)

    def direction(self) -> tuple[float, float]:
        """Point of the unit circle, by rejection: exact operations only."""
        while True:
            x, y = self.between(-1.0, 1.0), self.between(-1.0, 1.0)
            square = x * x + y * y
            if 0.01 < square <= 1.0:
                length = math.sqrt(square)
                return x / length, y / length

    def color(self) -> _Field:
        return np.array([self.between(0.0, 255.0) for _ in range(3)])

    def noise(self, h: int, w: int) -> _Field:
        """Independent triangular noise in [-1, 1], [h, w, 3]."""
        raw = np.asarray(self._bits.random_raw(h * w)).astype("<u8").view(np.uint8)
        pairs = raw.reshape(h, w, 8)[:, :, :6].astype(np.float64)
        return (pairs[:, :, 0:3] + pairs[:, :, 3:6]) / 255.0 - 1.0


def _wave(phase: _Field) -> _Field:
    """Triangle wave of period 1 in [-1, 1]."""
    return 4.0 * np.abs(phase - np.floor(phase) - 0.5) - 1.0


def _stripes(stream: _Stream, y: _Field, x: _Field, period: float) -> _Field:
    across, along = stream.direction()
    return _wave((across * y + along * x) / period + stream.unit())


def _ground(stream: _Stream, h: int, w: int) -> _Field:
    """Gradient between two related colours, with stripes or checks: float64 [h, w, 3]."""
    y, x = np.arange(h, dtype=np.float64)[:, None], np.arange(w, dtype=np.float64)[None, :]
    first = stream.color()
    second = np.clip(first + (stream.color() - 127.5) * 0.6, 0.0, 255.0)
    across, along = stream.direction()
    extent = float(max(h, w))
    share = np.clip(0.5 + (across * (y - h / 2) + along * (x - w / 2)) / extent, 0.0, 1.0)
    period = stream.between(0.08, 0.4) * extent + 2.0
    texture = _stripes(stream, y, x, period)
    if stream.below(2):
        texture = texture * _stripes(stream, y, x, period)
    texture = texture * stream.between(0.0, 28.0)
    return first + (second - first) * share[..., None] + texture[..., None]


def _place(
    stream: _Stream, h: int, w: int, placed: list[tuple[float, float, float]]
) -> tuple[float, float, float] | None:
    """Centre and radius of a figure, mostly inside the image and off the others' middles.

    Figures may cover each other at the rim, not so far that an outline cannot be told any more;
    None if no such place was found.
    """
    short = min(h, w)
    for _ in range(_PLACING_TRIES):
        radius = stream.between(0.17, 0.3) * short
        y = stream.between(0.7 * radius, h - 0.7 * radius)
        x = stream.between(0.7 * radius, w - 0.7 * radius)
        if all(
            math.sqrt((y - other_y) ** 2 + (x - other_x) ** 2) >= 0.8 * (radius + other_radius)
            for other_y, other_x, other_radius in placed
        ):
            return y, x, radius
    return None


def _draw(
    stream: _Stream,
    canvas: _Field,
    label: Label,
    class_id: int,
    center_y: float,
    center_x: float,
    radius: float,
) -> None:
    h, w = label.shape
    reach = radius + 2.0  # the figure's circumscribed circle and its void ring
    rows = slice(max(0, math.floor(center_y - reach)), min(h, math.ceil(center_y + reach) + 1))
    columns = slice(max(0, math.floor(center_x - reach)), min(w, math.ceil(center_x + reach) + 1))
    y = np.arange(rows.start, rows.stop, dtype=np.float64)[:, None] - center_y
    x = np.arange(columns.start, columns.stop, dtype=np.float64)[None, :] - center_x
    cosine, sine = stream.direction()
    distance = radius * _FIGURES[class_id - 1](
        (cosine * x + sine * y) / radius, (cosine * y - sine * x) / radius
    )

    ground = canvas[min(max(round(center_y), 0), h - 1), min(max(round(center_x), 0), w - 1)]
    color = stream.color()
    while np.abs(color - ground).max() < _MIN_CONTRAST:
        color = stream.color()
    paint = np.broadcast_to(color, (*distance.shape, 3))
    if stream.below(2):
        stripes = _stripes(stream, y, x, stream.between(0.3, 0.8) * radius + 2.0)
        paint = color + (stripes * stream.between(8.0, 40.0))[..., None]
    opacity = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    area = canvas[rows, columns]
    area += opacity * (paint - area)

    patch = label[rows, columns]
    patch[distance < _VOID_HALF_WIDTH] = IGNORE
    patch[distance <= -_VOID_HALF_WIDTH] = class_id


# Signed distances of figures with circumscribed radius 1, at points (x, y).
# The folded forms of box, triangle and star follow Inigo Quilez, "2D distance functions".


def _length(x: _Field, y: _Field) -> _Field:
    return np.sqrt(x * x + y * y)


def _disc(x: _Field, y: _Field) -> _Field:
    return _length(x, y) - 1.0


def _ring(x: _Field, y: _Field) -> _Field:
    return np.abs(_length(x, y) - 0.75) - 0.25


def _box(x: _Field, y: _Field, half_x: float, half_y: float) -> _Field:
    beyond_x, beyond_y = np.abs(x) - half_x, np.abs(y) - half_y
    outside = _length(np.maximum(beyond_x, 0.0), np.maximum(beyond_y, 0.0))
    return outside + np.minimum(np.maximum(beyond_x, beyond_y), 0.0)


def _square(x: _Field, y: _Field) -> _Field:
    return _box(x, y, math.sqrt(0.5), math.sqrt(0.5))


def _cross(x: _Field, y: _Field) -> _Field:
    # Arms of half-width 0.32 whose corners lie on the unit circle.
    arm, half = math.sqrt(1.0 - 0.32**2), 0.32
    return np.minimum(_box(x, y, arm, half), _box(x, y, half, arm))


def _triangle(x: _Field, y: _Field) -> _Field:
    root = math.sqrt(3.0)
    half_side = root / 2.0
    x = np.abs(x) - half_side
    y = y + half_side / root
    fold = x + root * y > 0.0
    x, y = np.where(fold, (x - root * y) / 2.0, x), np.where(fold, (-root * x - y) / 2.0, y)
    x = x - np.clip(x, -2.0 * half_side, 0.0)
    return np.where(y < 0.0, 1.0, -1.0) * _length(x, y)


def _star(x: _Field, y: _Field) -> _Field:
    # Five points; the inner corners lie at 0.45 of the radius.
    inner = 0.45
    cosine, sine = (1.0 + math.sqrt(5.0)) / 4.0, math.sqrt(10.0 - 2.0 * math.sqrt(5.0)) / 4.0
    x = np.abs(x)
    for side in (1.0, -1.0):
        beyond = 2.0 * np.maximum(side * cosine * x - sine * y, 0.0)
        x, y = x - beyond * side * cosine, y + beyond * sine
    x = np.abs(x)
    y = y - 1.0
    edge_x, edge_y = inner * sine, inner * cosine - 1.0
    share = np.clip((x * edge_x + y * edge_y) / (edge_x * edge_x + edge_y * edge_y), 0.0, 1.0)
    outside = y * edge_x - x * edge_y > 0.0
    return np.where(outside, 1.0, -1.0) * _length(x - edge_x * share, y - edge_y * share)


_FIGURES: tuple[_DistanceFunction, ...] = (_disc, _square, _triangle, _ring, _cross, _star)
