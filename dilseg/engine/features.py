# SPDX-License-Identifier: Apache-2.0
"""The scores of a frozen front end, computed once and read by every epoch after that."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dilseg.data import Augmented, JointTransform, SegmentationDataset, to_tensors
from dilseg.data.base import Image
from dilseg.engine.console import Progress
from dilseg.engine.evaluate import autocast
from dilseg.engine.files import write_atomic
from dilseg.engine.processes import Processes
from dilseg.models import DilatedFrontEnd

__all__ = ["StoredFeatures"]


class StoredFeatures(Augmented):
    """Samples whose images are replaced by a frozen front end's scores, read from files.

    A file per image holds the scores of the image and of its mirror image, float32
    ``[2, num_classes, rows, columns]``. Their folder is named after everything they depend on, so
    files of other weights or images are never read.

    Args:
        dataset: The images and labels.
        transform: Joint transform; it may mirror and may change labels, but neither scale nor crop.
        folder: Run folder, in which the folder of the files is made.
        seed: See `Augmented`.
        mean: See `Augmented`.
        std: See `Augmented`.
        amp: Precision of the front end: off, bf16 or fp16.
        channels_last: Memory format of the front end.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: JointTransform,
        folder: Path,
        *,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        amp: str,
        channels_last: bool,
    ) -> None:
        """See the class."""
        super().__init__(dataset, transform, seed=seed, mean=mean, std=std)
        self.folder = folder
        self.amp, self.channels_last = amp, channels_last

    def store(self, front_end: DilatedFrontEnd, group: Processes) -> None:
        """Computes what is not there yet; several processes share the images.

        Args:
            front_end: In eval mode, with the weights of the training; not changed.
            group: The processes.
        """
        self.folder /= f"features-{self._key(front_end)}"
        # Shares by number: what is missing changes while other processes write.
        share = range(group.rank, len(self), group.count)
        mine = [index for index in share if not self._path(index).exists()]
        with Progress(len(mine), "store features", quiet=not group.is_first) as progress:
            for index in mine:
                scores = self._compute(front_end, index, group.device)
                write_atomic(self._path(index), partial(np.save, arr=scores))
                progress.advance()
        group.sum(torch.zeros(1, device=group.device))  # nobody reads before all have written

    def _compute(
        self, front_end: DilatedFrontEnd, index: int, device: torch.device
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        image, label = self.dataset.load(index)
        mirrored: Image = image[:, ::-1].copy()
        pair = torch.stack(
            [to_tensors(view, label, self.mean, self.std)[0] for view in (image, mirrored)]
        )
        if self.channels_last:
            pair = pair.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), autocast(device, self.amp):
            scores = [front_end.cells(one[None].to(device)) for one in pair]
        return torch.cat(scores).float().cpu().numpy()

    def _key(self, front_end: DilatedFrontEnd) -> str:
        """Hash of the weights, of how they are fed, and of the names of the images."""
        digest = hashlib.sha256()
        for name, value in front_end.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        digest.update(repr((self.mean, self.std, self.amp)).encode())
        digest.update(repr([self.dataset.name(i) for i in range(len(self))]).encode())
        return digest.hexdigest()[:16]

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample as float32 scores ``[num_classes, rows, columns]`` and uint8 ``[h, w]``."""
        position = index + len(self) if index < 0 else index
        rng = np.random.default_rng([self.seed, int(self._epoch), position])
        # The transform sees two pixels in the image's place: their order says whether it mirrored.
        pixels: Image = np.array([[[0], [1]]], np.uint8)
        label = self.dataset.load_label(index)
        assert self.transform is not None
        pixels, label = self.transform(pixels, label, rng)
        scores = np.load(self._path(position), mmap_mode="r")[pixels[0, 0, 0]]
        return torch.from_numpy(scores.copy()), torch.from_numpy(label.copy())
