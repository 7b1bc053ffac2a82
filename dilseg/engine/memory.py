# SPDX-License-Identifier: Apache-2.0
"""How much memory is left: an image too large ends in a sentence, not in a killed process."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dilseg.models import DilatedFrontEnd, DilatedNet, SegmentationModel
from dilseg.models.backbones import TrunkModel, output_size

__all__ = ["available", "explain_memory", "least_bytes"]


def available() -> int | None:
    """Bytes that may still be taken, swap included; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.findall(r"^(?:MemAvailable|SwapFree):\s*(\d+) kB", text, re.M)
    left = 1024 * sum(map(int, found)) if found else None
    group = Path("/sys/fs/cgroup")  # of a container
    try:
        limit, taken = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        # What the group has cached of files counts as taken, but is given back.
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # another layout, or "max", which is no limit
        return left
    limit -= taken - (int(cached[1]) if cached else 0)
    return limit if left is None else min(left, limit)


def least_bytes(
    model: SegmentationModel, images: torch.Tensor, *, tile: int | None, item: int
) -> int:
    """Bytes of the largest map of a network's layer table and of the one it is made from.

    It needs more: this is what surely does not fit where less is left.

    Args:
        model: The network; of one without a layer table this is 0.
        images: ``[n, 3, h, w]``.
        tile: As in `segment`.
        item: Bytes of an element.
    """
    trunk = model.front_end if isinstance(model, DilatedNet) else model
    if not isinstance(trunk, TrunkModel):
        return 0
    n, channels, h, w = images.shape
    if tile is not None:
        h, w = min(h, tile), min(w, tile)
    h, w = h + 2 * trunk.margin, w + 2 * trunk.margin
    layers = trunk.layers
    largest = before = channels * h * w
    for index, layer in enumerate(layers, start=1):
        channels = layer.channels or channels
        after = channels * math.prod(output_size(layers[:index], side) for side in (h, w))
        largest = max(largest, before + after)
        before = after
    return item * n * largest


@contextmanager
def explain_memory(
    model: SegmentationModel, images: torch.Tensor, *, tile: int | None, item: int
) -> Iterator[None]:
    """Says which size of image was too large for the memory, before or after trying.

    Raises:
        RuntimeError: There is, or was, too little memory; the message names the size.
    """
    h, w = images.shape[-2:]
    where = f"not enough memory on {images.device} for an image of {h} x {w} pixels"
    tiles = "--tile 512, " if isinstance(model, DilatedFrontEnd | DilatedNet) else ""
    way_out = f"try {tiles}--amp bf16, a smaller --batch-size or smaller images"
    if images.device.type == "cpu":
        needed, left = least_bytes(model, images, tile=tile, item=item), available()
        if left is not None and needed > left:
            raise RuntimeError(
                f"{where}: two of its maps alone take {needed / 2**30:.1f} GiB, and "
                f"{left / 2**30:.1f} are left; {way_out}."
            )
    try:
        yield
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        device = "" if images.device.type == "cpu" else ", or --device cpu"
        raise RuntimeError(f"{where}; {way_out}{device}.") from error
