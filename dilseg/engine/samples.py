# SPDX-License-Identifier: Apache-2.0
"""Which images go into which step on which process: a pure function of seed, epoch and step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from dilseg.data import (
    Augmented,
    Compose,
    JointTransform,
    RandomCrop,
    RandomHorizontalFlip,
    RandomScale,
    SegmentationDataset,
    collate,
)
from dilseg.data.base import Image, Label
from dilseg.engine.config import TrainConfig
from dilseg.engine.processes import Processes

__all__ = ["EpochBatches", "Part", "TrainingStream", "training_transform"]


class Part(SegmentationDataset):
    """Some images of a data set, evenly spaced over it (a video's first images are all alike).

    Args:
        dataset: The whole.
        count: How many images; more than there are means all.

    Raises:
        ValueError: `count` is below 1.
    """

    def __init__(self, dataset: SegmentationDataset, count: int) -> None:
        """See the class."""
        if count < 1:
            raise ValueError(f"--limit: expected a number of images >= 1, but got {count}.")
        self.dataset = dataset
        self.split = dataset.split
        self.classes = dataset.classes
        self.palette = dataset.palette
        self.has_labels = dataset.has_labels
        self.score_sets = dataset.score_sets
        self.categories = dataset.categories
        count = min(count, len(dataset))
        self.indices = [int(i) for i in np.linspace(0, len(dataset) - 1, count).round()]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.indices)

    def name(self, index: int) -> str:
        """The image's name in the whole data set."""
        return self.dataset.name(self.indices[index])

    def load_image(self, index: int) -> Image:
        """As in the whole data set."""
        return self.dataset.load_image(self.indices[index])

    def load_label(self, index: int) -> Label:
        """As in the whole data set."""
        return self.dataset.load_label(self.indices[index])

    def load(self, index: int) -> tuple[Image, Label]:
        """As in the whole data set, whose checks of the pair it keeps."""
        return self.dataset.load(self.indices[index])


def training_transform(config: TrainConfig) -> Compose:
    """The joint augmentation a configuration asks for: scale, then mirror, then crop."""
    transforms: list[JointTransform] = []
    if config.scale is not None:
        transforms.append(RandomScale(*config.scale))
    if config.flip:
        transforms.append(RandomHorizontalFlip())
    if config.crop is not None:
        transforms.append(RandomCrop(config.crop))
    return Compose(transforms)


class EpochBatches(Sampler[list[int]]):
    """One epoch's batches for one process.

    The epoch's order is a permutation drawn from (seed, epoch). Step ``k`` of the epoch takes the
    images ``[k * batch_size, (k + 1) * batch_size)`` of that order over all processes together, of
    which process ``r`` of ``p`` takes every ``p``-th from the ``r``-th. So the images of a step do
    not depend on the number of processes, and an epoch can be entered at any step. The last
    ``length % batch_size`` images of an order are left out of that epoch.

    Args:
        length: Number of images.
        batch_size: Images per step, over all processes.
        seed: Seed of the order.
        rank: This process.
        count: Number of processes; divides `batch_size`.

    Raises:
        ValueError: More images per step than there are, or a batch the processes cannot share.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, *, rank: int = 0, count: int = 1
    ) -> None:
        """See the class."""
        if batch_size > length:
            raise ValueError(
                f"--batch-size: expected at most the {length} training images, but got "
                f"{batch_size}."
            )
        if batch_size % count:
            raise ValueError(
                f"--batch-size: expected a multiple of the {count} processes, but got "
                f"{batch_size}; it counts the images of a step over all processes."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.count = rank, count
        self.epoch = self.first = 0

    def enter(self, epoch: int, first: int = 0) -> None:
        """Chooses the epoch and its first step."""
        self.epoch, self.first = epoch, first

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.length // self.batch_size

    def __len__(self) -> int:
        """Steps left in the chosen epoch."""
        return self.steps - self.first

    def __iter__(self) -> Iterator[list[int]]:
        """Image indices of each step left, this process's share."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        for step in range(self.first, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield batch[self.rank :: self.count].tolist()


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C in a terminal reaches loader processes, too, which must serve until the last save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class TrainingStream:
    """The training batches from any step on, exactly as an unbroken run sees them.

    Args:
        dataset: The training images.
        config: The training's arguments.
        group: The processes that share the work.
        mean: Per channel, for RGB in [0, 1].
        std: Per channel.
        workers: Loader processes.

    Raises:
        ValueError: See `EpochBatches`.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        config: TrainConfig,
        group: Processes,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        workers: int = 0,
    ) -> None:
        """See the class."""
        self._samples = Augmented(
            dataset, training_transform(config), seed=config.seed, mean=mean, std=std
        )
        self._batches = EpochBatches(
            len(dataset), config.batch_size, config.seed, rank=group.rank, count=group.count
        )
        self._loader: DataLoader[Any] = DataLoader(
            self._samples,
            batch_sampler=self._batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=group.device.type == "cuda",
            # An iterator draws its workers' seed; from a generator of its own, so that making one
            # in the middle of an epoch does not move the generator dropout draws from.
            generator=torch.Generator(),
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the images."""
        return self._batches.steps

    def batches(self, first: int, last: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images and labels of the steps ``[first, last)``, counted from 0 over all epochs."""
        step = first
        while step < last:
            epoch, position = divmod(step, self.steps_per_epoch)
            self._samples.set_epoch(epoch)
            self._batches.enter(epoch, position)
            for batch in self._loader:
                yield batch[0], batch[1]
                step += 1
                if step == last:
                    return
