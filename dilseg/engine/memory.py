# SPDX-License-Identifier: Apache-2.0
"""How much memory is left: an image too large ends in a sentence, not in a killed process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dilseg.models import FCN, DilatedFrontEnd, DilatedNet, SegmentationModel

__all__ = ["available", "explain_memory", "least_bytes"]


def available() -> int | None:
    """Bytes a process may still take, swap included; None where the system does not say."""
    try:
        found = re.findall(
            r"^(?:MemAvailable|SwapFree):\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M
        )
    except OSError:
        return None
    left = 1024 * sum(map(int, found)) if found else None
    group = Path("/sys/fs/cgroup")  # of a container
    try:
        limit = int((group / "memory.max").read_text()) - int(
            (group / "memory.current").read_text()
        )
    except (OSError, ValueError):  # another layout, or "max"
        return left
    # What the group's page cache holds counts as taken, but is given back.
    cache = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
    limit += int(cache[1]) if cache else 0
    return limit if left is None else min(left, limit)


def least_bytes(
    model: SegmentationModel, images: torch.Tensor, *, tile: int | None, item: int
) -> int:
    """Bytes that the first two maps of a network take: less than what it needs.

    Args:
        model: The network; 0 for one that is not of this package's families.
        images: ``[n, 3, h, w]``.
        tile: As in `segment`.
        item: Bytes of an element.
    """
    front_end = model.front_end if isinstance(model, DilatedNet) else model
    if not isinstance(front_end, DilatedFrontEnd | FCN):
        return 0
    n, _, h, w = images.shape
    if tile is not None:
        h, w = min(h, tile), min(w, tile)
    around = 2 * max(front_end.margin, front_end.layers[0].padding)
    channels = front_end.layers[0].channels or 0
    return 2 * item * n * channels * (h + around) * (w + around)


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
                f"{where}: its first two maps alone take {needed / 2**30:.1f} GiB, and "
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
