# SPDX-License-Identifier: Apache-2.0
"""Which images go into which step on which process: a pure function of seed, epoch and step."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
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
    RandomVoid,
    SegmentationDataset,
    collate,
)
from dilseg.data.base import Image, Label
from dilseg.engine.config import TrainConfig
from dilseg.engine.processes import Processes

__all__ = ["Cached", "EpochBatches", "Part", "TrainingStream", "training_transform"]


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
        self.channels = dataset.channels
        self.heads = {name: Part(head, count) for name, head in dataset.heads.items()}
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


class Cached(SegmentationDataset):
    """A data set whose decoded images stay in memory, as many as a budget allows.

    They are decoded here, one after the other, before loader processes are forked, which then share
    them. The rest is read from the files every time.

    Args:
        dataset: The images and labels.
        budget: Bytes.

    Attributes:
        size: Bytes in use.
        kept: Images in memory.
    """

    def __init__(self, dataset: SegmentationDataset, budget: int) -> None:
        """See the class."""
        self.dataset = dataset
        for name in SegmentationDataset.__annotations__:
            setattr(self, name, getattr(dataset, name))
        self.size = 0
        self._samples: list[tuple[Image, Label]] = []
        for index in range(len(dataset)):
            image, label = dataset.load(index)
            if self.size + image.nbytes + label.nbytes > budget:
                break
            self.size += image.nbytes + label.nbytes
            self._samples.append((image, label))

    @property
    def kept(self) -> int:
        """Number of images in memory, the first ones of the set."""
        return len(self._samples)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def name(self, index: int) -> str:
        """As in the data set."""
        return self.dataset.name(index)

    def load_image(self, index: int) -> Image:
        """As in the data set."""
        return self.load(index)[0]

    def load_label(self, index: int) -> Label:
        """As in the data set."""
        return self.load(index)[1]

    def load(self, index: int) -> tuple[Image, Label]:
        """As in the data set; do not write to what comes from memory."""
        position = self._position(index)
        if position < self.kept:
            return self._samples[position]
        return self.dataset.load(position)


def training_transform(config: TrainConfig, mean: Sequence[float], cell: int) -> Compose:
    """The joint augmentation a configuration asks for: scale, mirror, crop, then loss sampling.

    Args:
        config: The training's arguments.
        mean: Per channel of images divided by 255; fills crops beyond the image.
        cell: Stride of the network, the side of what `loss_sampling` keeps or leaves out.
    """
    transforms: list[JointTransform] = []
    if config.scale is not None:
        transforms.append(RandomScale(*config.scale))
    if config.flip:
        transforms.append(RandomHorizontalFlip())
    if config.crop is not None:
        transforms.append(RandomCrop(config.crop, [round(255 * value) for value in mean]))
    if config.loss_sampling < 1.0:
        transforms.append(RandomVoid(config.loss_sampling, cell))
    return Compose(transforms)


class EpochBatches(Sampler[list[int]]):
    """One epoch's batches for one process.

    The epoch's order is a permutation drawn from (seed, epoch). Batch ``k`` of the epoch takes the
    images ``[k * batch_size, (k + 1) * batch_size)`` of that order over all processes together, of
    which process ``r`` of ``p`` takes every ``p``-th from the ``r``-th, and ``accumulate`` batches
    one after the other make a step. So the images of a step do not depend on the number of
    processes, and an epoch can be entered at any step. The last images of an order that do not fill
    a step are left out of that epoch, on every process alike: none runs dry before the others.

    Args:
        length: Number of images.
        batch_size: Images per batch, over all processes.
        seed: Seed of the order.
        accumulate: Batches per step.
        replacement: Draw each image of the order uniformly, as the FCN release does, in place of a
            permutation.
        rank: This process.
        count: Number of processes; divides `batch_size`.

    Raises:
        ValueError: More images per step than there are, or a batch the processes cannot share.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        *,
        accumulate: int = 1,
        replacement: bool = False,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        """See the class."""
        if batch_size * accumulate > length:
            times = f" x --accumulate {accumulate}" if accumulate > 1 else ""
            raise ValueError(
                f"--batch-size: expected at most the {length} training images, but got "
                f"{batch_size}{times}."
            )
        if batch_size % count:
            raise ValueError(
                f"--batch-size: expected a multiple of the {count} processes, but got "
                f"{batch_size}; it counts the images of a batch over all processes."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.accumulate, self.replacement = accumulate, replacement
        self.rank, self.count = rank, count
        self.epoch = self.first = 0

    def enter(self, epoch: int, first: int = 0) -> None:
        """Chooses the epoch and its first step."""
        self.epoch, self.first = epoch, first

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.length // (self.batch_size * self.accumulate)

    def __len__(self) -> int:
        """Batches left in the chosen epoch."""
        return (self.steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        """Image indices of each batch left, this process's share."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.replacement:
            order = rng.integers(self.length, size=self.length)
        else:
            order = rng.permutation(self.length)
        for index in range(self.first * self.accumulate, self.steps * self.accumulate):
            batch = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield batch[self.rank :: self.count].tolist()


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C in a terminal reaches loader processes, too, which must serve until the last save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class TrainingStream:
    """The training batches from any step on, exactly as an unbroken run sees them.

    Args:
        samples: The training images, augmented.
        config: The training's arguments.
        group: The processes that share the work.
        workers: Loader processes.

    Raises:
        ValueError: See `EpochBatches`.
    """

    def __init__(
        self,
        samples: Augmented,
        config: TrainConfig,
        group: Processes,
        *,
        workers: int = 0,
    ) -> None:
        """See the class."""
        self._samples = samples
        self._batches = EpochBatches(
            len(samples),
            config.batch_size,
            config.seed,
            accumulate=config.accumulate,
            replacement=config.replacement,
            rank=group.rank,
            count=group.count,
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
        """Images and labels of the steps ``[first, last)``, counted from 0 over all epochs.

        Every step has ``accumulate`` batches.
        """
        step = first
        while step < last:
            epoch, position = divmod(step, self.steps_per_epoch)
            self._samples.set_epoch(epoch)
            self._batches.enter(epoch, position)
            for index, batch in enumerate(self._loader, start=1):
                yield batch[0], batch[1]
                step += index % self._batches.accumulate == 0
                if step == last:
                    return
