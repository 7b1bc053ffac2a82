# SPDX-License-Identifier: Apache-2.0
"""Joint transforms of an image and its label map, and their conversion to tensors.

A transform is called as ``transform(image, label, rng)`` on uint8 arrays ``[h, w, 3]`` (RGB) and
``[h, w]`` (or with further channels and label maps, see :mod:`dilseg.data.base`), draws only from
``rng`` (a ``numpy.random.Generator``), never changes its arguments,
and returns a new pair of equal size. Pixels outside the image become void (255) in the label map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from .base import IGNORE, Image, Label

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""RGB mean of ImageNet for values in ``[0, 1]``: what torchvision's VGG-16 weights expect."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""RGB standard deviation of ImageNet for values in ``[0, 1]``."""

MEAN_COLOR = (124, 116, 104)
""":data:`IMAGENET_MEAN` as 8-bit colour: padding of this colour is about 0 after normalising."""


class JointTransform(Protocol):
    """Anything callable as ``transform(image, label, rng) -> (image, label)``."""

    def __call__(
        self, image: Image, label: Label, rng: np.random.Generator, /
    ) -> tuple[Image, Label]:
        """Transform one sample."""
        ...


class Compose:
    """Apply transforms one after the other.

    Args:
        transforms: The transforms, first to last; none at all returns samples unchanged.

    Example:
        >>> import numpy as np
        >>> from dilseg.data import Compose, RandomCrop, RandomHorizontalFlip, Shapes
        >>> transform = Compose([RandomHorizontalFlip(), RandomCrop((64, 80))])
        >>> image, label = transform(*Shapes("train")[0], np.random.default_rng(0))
        >>> image.shape, label.shape
        ((64, 80, 3), (64, 80))
    """

    def __init__(self, transforms: Sequence[JointTransform]) -> None:
        """See the class."""
        self.transforms = tuple(transforms)

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Image, Label]:
        """Transform one sample."""
        for transform in self.transforms:
            image, label = transform(image, label, rng)
        return image, label

    def __repr__(self) -> str:
        """Source-like form."""
        return f"Compose([{', '.join(map(repr, self.transforms))}])"


class RandomScale:
    """Resize by one factor drawn uniformly from ``[low, high]``; height and width keep their ratio.

    The image is resampled bilinearly, with a wider filter when it shrinks (antialiasing), the
    label map by nearest neighbour; both with the same pixel centres, so they stay aligned.

    Args:
        low: Smallest factor, above 0.
        high: Largest factor; equal to ``low`` for a fixed scale.

    Raises:
        ValueError: If not ``0 < low <= high``.
    """

    def __init__(self, low: float, high: float) -> None:
        """See the class."""
        if not 0.0 < low <= high < float("inf"):
            raise ValueError(
                f"RandomScale: expected 0 < low <= high, but got low {low} and high {high}."
            )
        self.low, self.high = low, high

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Image, Label]:
        """Transform one sample; the result is at least 1 x 1."""
        factor = self.low + (self.high - self.low) * rng.random()
        h_in, w_in = label.shape[:2]
        h_out, w_out = max(1, round(h_in * factor)), max(1, round(w_in * factor))
        if (h_out, w_out) == (h_in, w_in):
            return image, label
        return resize_image(image, (h_out, w_out)), resize_label(label, (h_out, w_out))

    def __repr__(self) -> str:
        """Source-like form."""
        return f"RandomScale({self.low}, {self.high})"


class RandomCrop:
    """Cut out a window at a random place.

    Along an axis on which the sample is smaller than the window it is put at a random place
    inside the window instead; the rest is filled.

    Args:
        size: Height and width of the window in pixels.
        fill: Colour of image pixels outside the sample, a value per channel; their label is void.

    Raises:
        ValueError: If ``size`` is not positive.
    """

    def __init__(self, size: tuple[int, int], fill: Sequence[float] = MEAN_COLOR) -> None:
        """See the class."""
        self.size = _window_size("RandomCrop", size)
        self.fill = fill

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Image, Label]:
        """Transform one sample."""
        # Negative slack: the sample is smaller and starts up to -slack pixels inside the window.
        slack = (label.shape[0] - self.size[0], label.shape[1] - self.size[1])
        top, left = (int(rng.integers(min(0, s), max(0, s), endpoint=True)) for s in slack)
        return _window(image, label, top, left, self.size, self.fill)

    def __repr__(self) -> str:
        """Source-like form."""
        return f"RandomCrop({self.size})"


class CenterCrop:
    """Cut out the middle; a smaller sample is put in the middle and the rest is filled.

    Args:
        size: Height and width of the window in pixels.
        fill: Colour of image pixels outside the sample, a value per channel; their label is void.

    Raises:
        ValueError: If ``size`` is not positive.
    """

    def __init__(self, size: tuple[int, int], fill: Sequence[float] = MEAN_COLOR) -> None:
        """See the class."""
        self.size = _window_size("CenterCrop", size)
        self.fill = fill

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Image, Label]:
        """Transform one sample; draws nothing."""
        top, left = (label.shape[0] - self.size[0]) // 2, (label.shape[1] - self.size[1]) // 2
        return _window(image, label, top, left, self.size, self.fill)

    def __repr__(self) -> str:
        """Source-like form."""
        return f"CenterCrop({self.size})"


class RandomHorizontalFlip:
    """Mirror left and right.

    Args:
        p: Probability of mirroring.

    Raises:
        ValueError: If ``p`` is outside ``[0, 1]``.
    """

    def __init__(self, p: float = 0.5) -> None:
        """See the class."""
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"RandomHorizontalFlip: expected p in [0, 1], but got {p}.")
        self.p = p

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Image, Label]:
        """Transform one sample."""
        if rng.random() < self.p:
            mirrored = cast(Image, np.ascontiguousarray(image[:, ::-1]))
            return mirrored, np.ascontiguousarray(label[:, ::-1])
        return image, label

    def __repr__(self) -> str:
        """Source-like form."""
        return f"RandomHorizontalFlip({self.p})"


class ReflectPad:
    """Pad the image with its own mirror image and the label map with void.

    The mirror is at the border pixel, which is not repeated (OpenCV's reflect-101); unlike
    ``torch.nn.functional.pad`` the margin may exceed the image, whose mirror images then repeat.
    DilatedNet pads its input this way by 186 pixels (Yu & Koltun 2016; the published data layer).

    Args:
        margin: Pixels on each side, or ``(top, bottom, left, right)``.

    Raises:
        ValueError: If a margin is negative.

    Example:
        >>> import numpy as np
        >>> image = np.repeat(np.array([[1, 2, 3]], np.uint8)[..., None], 3, axis=2)
        >>> label = np.zeros((1, 3), np.uint8)
        >>> image, label = ReflectPad((0, 0, 4, 1))(image, label, np.random.default_rng(0))
        >>> image[0, :, 0].tolist()
        [1, 2, 3, 2, 1, 2, 3, 2]
        >>> label[0].tolist()
        [255, 255, 255, 255, 0, 0, 0, 255]
    """

    def __init__(self, margin: int | tuple[int, int, int, int]) -> None:
        """See the class."""
        self.margin = (margin,) * 4 if isinstance(margin, int) else tuple(margin)
        if len(self.margin) != 4 or min(self.margin) < 0:
            raise ValueError(
                "ReflectPad: expected margin >= 0, one number or (top, bottom, left, right), "
                f"but got {margin}."
            )

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Image, Label]:
        """Transform one sample; draws nothing."""
        top, bottom, left, right = self.margin
        rows = reflect_indices(label.shape[0], top, bottom)
        columns = reflect_indices(label.shape[1], left, right)
        padded = np.full((len(rows), len(columns), *label.shape[2:]), IGNORE, np.uint8)
        padded[top : top + label.shape[0], left : left + label.shape[1]] = label
        return image[rows[:, None], columns[None, :]], padded

    def __repr__(self) -> str:
        """Source-like form."""
        return f"ReflectPad({self.margin})"


class RandomVoid:
    """Keep the labels of random cells, and make the others void: the loss is sampled.

    A cell is a square of ``cell`` x ``cell`` pixels of the sample, the first at its upper left
    corner. With the stride of a network as ``cell`` it is what one of its outputs speaks for, and
    training on the kept ones is training on the patches those outputs see.

    Args:
        keep: Probability of keeping a cell.
        cell: Side of a cell in pixels.

    Raises:
        ValueError: If ``keep`` is outside ``(0, 1]`` or ``cell`` is below 1.

    Example:
        >>> import numpy as np
        >>> sample = np.zeros((2, 6, 3), np.uint8), np.ones((2, 6), np.uint8)
        >>> RandomVoid(0.5, cell=2)(*sample, np.random.default_rng(0))[1][0].tolist()
        [255, 255, 1, 1, 1, 1]

    Source: Long et al. 2015, sections 3.4 and 4.3 (patchwise training is loss sampling).
    """

    def __init__(self, keep: float, cell: int = 1) -> None:
        """See the class."""
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"RandomVoid: expected keep in (0, 1], but got {keep}.")
        if cell < 1:
            raise ValueError(f"RandomVoid: expected cell >= 1, but got {cell}.")
        self.keep, self.cell = keep, cell

    def __call__(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Image, Label]:
        """Transform one sample."""
        h, w = label.shape[:2]
        kept = rng.random((-(-h // self.cell), -(-w // self.cell))) < self.keep
        pixels = kept.repeat(self.cell, 0).repeat(self.cell, 1)[:h, :w]
        if label.ndim == 3:  # of several heads
            pixels = pixels[..., None]
        return image, np.where(pixels, label, np.uint8(IGNORE))

    def __repr__(self) -> str:
        """Source-like form."""
        return f"RandomVoid({self.keep}, {self.cell})"


def reflect_indices(length: int, before: int, after: int) -> NDArray[np.int64]:
    """Source positions of an axis padded by reflection without repeating the border.

    Args:
        length: Length of the axis, at least 1.
        before: Positions to add in front, any number >= 0.
        after: Positions to add at the end, any number >= 0.

    Returns:
        int64 ``[before + length + after]``, values in ``0 .. length - 1``.

    Example:
        >>> reflect_indices(3, 2, 3).tolist()
        [2, 1, 0, 1, 2, 1, 0, 1]
        >>> reflect_indices(1, 1, 2).tolist()
        [0, 0, 0, 0]
    """
    period = max(1, 2 * (length - 1))
    positions = np.arange(-before, length + after, dtype=np.int64) % period
    return np.minimum(positions, period - positions) if length > 1 else positions


def resize_image(image: Image, size: tuple[int, int]) -> Image:
    """Resize bilinearly, antialiased when shrinking (half-pixel centres, uint8 rounded).

    Args:
        image: uint8 or float32 ``[h, w, c]``.
        size: New height and width.

    Returns:
        ``[size[0], size[1], c]``, dtype of ``image``.
    """
    planes = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size, mode="bilinear", align_corners=False, antialias=True)
    array: Image = resized[0].permute(1, 2, 0).contiguous().numpy()
    return array


def resize_label(label: Label, size: tuple[int, int]) -> Label:
    """Resize by nearest neighbour: pixel i of n takes ``floor((i + 1/2) * n_in / n)``.

    Args:
        label: uint8 ``[h, w]`` or ``[h, w, heads]``.
        size: New height and width.

    Returns:
        uint8 ``size`` or ``[*size, heads]``.
    """
    rows, columns = (_nearest(*lengths) for lengths in zip(label.shape[:2], size, strict=True))
    return label[rows[:, None], columns[None, :]]


def _nearest(n_in: int, n_out: int) -> NDArray[np.int64]:
    # In integers, (2i + 1) n_in / 2n_out: exact, and below n_in for every i < n_out.
    return (2 * np.arange(n_out, dtype=np.int64) + 1) * n_in // (2 * n_out)


def image_to_tensor(
    image: Image,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> torch.Tensor:
    """Normalise an image: ``(image / 255 - mean) / std`` per channel.

    Args:
        image: uint8 ``[h, w, 3]``, RGB; or with further channels, uint8 or float32.
        mean: Mean per channel, for values in ``[0, 1]``.
        std: Standard deviation per channel, for values in ``[0, 1]``.

    Returns:
        float32 ``[c, h, w]``, contiguous, RGB first.

    Raises:
        ValueError: If ``image`` has another shape than ``mean`` and ``std`` have channels.
        TypeError: If it is not uint8, or float32 with more than three channels.

    Example:
        >>> from dilseg.data import Shapes, image_to_tensor
        >>> tensor = image_to_tensor(Shapes("val").load_image(0))
        >>> tensor.shape, tensor.dtype
        (torch.Size([3, 96, 96]), torch.float32)
    """
    if image.ndim != 3 or image.shape[2] != len(mean):
        raise ValueError(f"image: expected shape [h, w, {len(mean)}], but got {list(image.shape)}.")
    if image.dtype != np.uint8 and not (image.dtype == np.float32 and len(mean) > 3):
        raise TypeError(f"image: expected dtype uint8 (0 .. 255), but got {image.dtype}.")
    center = torch.tensor(mean, dtype=torch.float32).mul_(255.0)[:, None, None]
    spread = torch.tensor(std, dtype=torch.float32).mul_(255.0)[:, None, None]
    planes = torch.from_numpy(image.copy()).permute(2, 0, 1).to(torch.float32).contiguous()
    return planes.sub_(center).div_(spread)


def to_tensors(
    image: Image,
    label: Label,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert a sample for a network and its loss.

    Args:
        image: uint8 ``[h, w, 3]``, RGB.
        label: uint8 ``[h, w]``, void 255; or ``[h, w, heads]``.
        mean: Mean per channel, for values in ``[0, 1]``.
        std: Standard deviation per channel, for values in ``[0, 1]``.

    Returns:
        The image as of :func:`image_to_tensor`, float32 ``[c, h, w]``, and the label map, uint8
        ``[h, w]`` or ``[heads, h, w]``.

    Raises:
        ValueError: If the two differ in size, or ``image`` has another shape.
        TypeError: If either is not uint8.

    Example:
        >>> from dilseg.data import Shapes, to_tensors
        >>> image, label = to_tensors(*Shapes("val", size=(40, 56))[0])
        >>> image.shape, label.shape, label.dtype
        (torch.Size([3, 40, 56]), torch.Size([40, 56]), torch.uint8)
    """
    if label.dtype != np.uint8:
        raise TypeError(f"label: expected dtype uint8, but got {label.dtype}.")
    if image.shape[:2] != label.shape[:2] or label.ndim not in (2, 3):
        raise ValueError(
            f"label: expected shape [h, w] = {list(image.shape[:2])} of the image, "
            f"but got {list(label.shape)}."
        )
    labels = torch.from_numpy(label.copy())
    if label.ndim == 3:
        labels = labels.permute(2, 0, 1).contiguous()
    return image_to_tensor(image, mean, std), labels


def _window_size(who: str, size: tuple[int, int]) -> tuple[int, int]:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{who}: expected size (height, width) >= 1, but got {size}.")
    return (int(size[0]), int(size[1]))


def _window(
    image: Image,
    label: Label,
    top: int,
    left: int,
    size: tuple[int, int],
    fill: Sequence[float],
) -> tuple[Image, Label]:
    """Window of ``size`` whose corner is at (top, left) of the sample, which may be negative."""
    if len(fill) != image.shape[2]:
        raise ValueError(
            f"fill: expected a value for each of the {image.shape[2]} channels of the image, but "
            f"got {len(fill)}."
        )
    (h_in, w_in), (h_out, w_out) = label.shape[:2], size
    new_image = np.empty((h_out, w_out, image.shape[2]), image.dtype)
    new_image[:] = np.array(fill, image.dtype)
    new_label = np.full((h_out, w_out, *label.shape[2:]), IGNORE, np.uint8)
    source = (
        slice(max(top, 0), min(top + h_out, h_in)),
        slice(max(left, 0), min(left + w_out, w_in)),
    )
    target = (
        slice(max(-top, 0), max(-top, 0) + source[0].stop - source[0].start),
        slice(max(-left, 0), max(-left, 0) + source[1].stop - source[1].start),
    )
    new_image[target] = image[source]
    new_label[target] = label[source]
    return new_image, new_label
