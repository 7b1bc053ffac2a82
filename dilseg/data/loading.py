# SPDX-License-Identifier: Apache-2.0
"""From datasets of arrays to batches of tensors: reproducible augmentation and collation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .base import IGNORE, SegmentationDataset
from .transforms import IMAGENET_MEAN, IMAGENET_STD, JointTransform, to_tensors


class Augmented(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A dataset of arrays, transformed at random and converted to tensors.

    Sample ``index`` of epoch ``e`` is drawn with ``numpy.random.default_rng([seed, e, index])``:
    it depends on nothing else, so neither the order of access, nor the number of workers or
    processes, nor a resumed run changes it.

    Args:
        dataset: The samples.
        transform: Joint transform; None leaves samples as they are (evaluation).
        seed: Seed of the augmentation, >= 0.
        mean: Mean per channel, for values in ``[0, 1]``.
        std: Standard deviation per channel, for values in ``[0, 1]``.

    Raises:
        ValueError: If ``seed`` is negative or the dataset has no labels.

    Example:
        >>> from dilseg.data import Augmented, RandomCrop, Shapes
        >>> train = Augmented(Shapes("train"), RandomCrop((48, 64)), seed=0)
        >>> image, label = train[7]
        >>> image.shape, label.shape
        (torch.Size([3, 48, 64]), torch.Size([48, 64]))
        >>> bool((train[7][0] == image).all())
        True
        >>> train.set_epoch(1)
        >>> bool((train[7][0] == image).all())
        False
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: JointTransform | None = None,
        *,
        seed: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        """See the class."""
        if seed < 0:
            raise ValueError(f"Augmented: expected seed >= 0, but got {seed}.")
        dataset.require_labels()
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.mean = tuple(mean)
        self.std = tuple(std)
        # In shared memory, so that set_epoch also reaches workers that live on between epochs.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, >= 0, whose samples are drawn; call before iterating a loader."""
        if epoch < 0:
            raise ValueError(f"Augmented.set_epoch: expected epoch >= 0, but got {epoch}.")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample as float32 ``[c, h, w]`` (normalised) and uint8 ``[h, w]`` (void 255).

        With several heads the label maps come as ``[heads, h, w]``.
        """
        image, label = self.dataset.load(index)
        if self.transform is not None:
            # A negative index names the same sample, so it must draw the same numbers.
            position = index + len(self) if index < 0 else index
            rng = np.random.default_rng([self.seed, int(self._epoch), position])
            image, label = self.transform(image, label, rng)
        return to_tensors(image, label, self.mean, self.std)


def collate(
    batch: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack samples of equal or unequal size into one batch.

    Smaller samples are padded at the bottom and at the right: images with 0, which is the mean
    colour after normalising, label maps with void (255). Suits ``DataLoader(collate_fn=...)``.

    Args:
        batch: Samples ``(image [c, h, w], label [h, w] or [heads, h, w])``, at least one. In the
            place of images there may be maps of another resolution than the labels.

    Returns:
        Images ``[n, c, h_max, w_max]`` and labels ``[n, h_max, w_max]`` or ``[n, heads, h_max,
        w_max]``, dtypes as given.

    Raises:
        ValueError: If the batch is empty.

    Example:
        >>> import torch
        >>> samples = [
        ...     (torch.ones(3, 1, 2), torch.zeros(1, 2, dtype=torch.uint8)),
        ...     (torch.ones(3, 2, 1), torch.zeros(2, 1, dtype=torch.uint8)),
        ... ]
        >>> images, labels = collate(samples)
        >>> images.shape
        torch.Size([2, 3, 2, 2])
        >>> labels.tolist()
        [[[0, 0], [255, 255]], [[0, 255], [0, 255]]]
    """
    if not batch:
        raise ValueError("collate: expected at least one sample, but got an empty batch.")
    images, labels = zip(*batch, strict=True)
    return _stack(images, 0), _stack(labels, IGNORE)


def _stack(maps: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
    h, w = (max(one.shape[axis] for one in maps) for axis in (-2, -1))
    stacked = maps[0].new_full((len(maps), *maps[0].shape[:-2], h, w), fill)
    for row, one in zip(stacked, maps, strict=True):
        row[..., : one.shape[-2], : one.shape[-1]] = one
    return stacked
