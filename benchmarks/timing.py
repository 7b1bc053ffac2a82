# SPDX-License-Identifier: Apache-2.0
"""How it is measured: many launches per reading, device clocks, no synchronisation per launch.

Two labelled modes. *Hot*: N launches between one pair of CUDA events, as they follow each other in
a program; for a short kernel that is the rate at which the host can submit it. *Cold*: the level-2
cache is overwritten before every launch and each launch has its own pair of events, so operands
come from memory; all of a sample is queued before the single synchronisation. On a CPU there is
only *hot*, by `time.perf_counter`.
"""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# One launch of a job; what it returns is its results.
Launch = Callable[[], tuple[torch.Tensor, ...]]

# One hot sample is long enough that the ends of the interval (one event, or one clock reading) do
# not show.
SAMPLE_SECONDS = 0.01
# Enough for a median with quantiles; a slow kernel gets fewer, and the row says how many.
MAX_SAMPLES = 50
MIN_SAMPLES = 3
MAX_LAUNCHES = 500
# The flush must exceed twice the largest level-2 cache in use (126 MB on a B200) and must take the
# device longer than the host needs to queue the next launch through autograd (some 100 us), so that
# a cold reading holds no host time: 512 MiB takes 110 us at 4.8 TB/s and more on anything slower.
FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Summary:
    """Quantiles of seconds per launch over `samples` readings."""

    p20: float
    p25: float
    p50: float
    p75: float
    p80: float
    samples: int

    def as_dict(self) -> dict[str, float | int]:
        """A plain dictionary, as it stands in a results file."""
        return asdict(self)


def quantile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile (0..1) of `values`, linear between neighbours.

    Raises:
        ValueError: `values` is empty or `q` is outside 0..1.
    """
    if not values:
        raise ValueError("cannot take a quantile of no readings")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"expected a quantile between 0 and 1, but got {q}")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(values: Sequence[float]) -> Summary:
    """The quantiles of a list of readings in seconds per launch."""
    return Summary(
        p20=quantile(values, 0.2),
        p25=quantile(values, 0.25),
        p50=quantile(values, 0.5),
        p75=quantile(values, 0.75),
        p80=quantile(values, 0.8),
        samples=len(values),
    )


@dataclass(frozen=True)
class Plan:
    """How often to launch: `samples` readings of `launches` launches each."""

    samples: int
    launches: int


def make_plans(seconds: Sequence[float], limit_s: float) -> list[Plan]:
    """Plans for launches of so many `seconds` each that take turns: all get as many readings.

    Together they take about `limit_s` seconds for each. Launches that alone exceed it are still
    read MIN_SAMPLES times: a slow row is a result.
    """
    for each in seconds:
        if not each > 0.0:
            raise ValueError(f"expected a positive time per launch, but got {each}")
    launches = [min(MAX_LAUNCHES, max(1, math.ceil(SAMPLE_SECONDS / each))) for each in seconds]
    round_s = sum(count * each for count, each in zip(launches, seconds, strict=True))
    samples = min(MAX_SAMPLES, max(MIN_SAMPLES, int(limit_s * len(seconds) / round_s)))
    return [Plan(samples, count) for count in launches]


def synchronise(device: torch.device) -> None:
    """Waits for everything queued on `device`; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(launch: Launch, device: torch.device) -> float:
    """Wall-clock seconds of one launch, to plan by; not a measurement to report."""
    synchronise(device)
    start = time.perf_counter()
    launch()
    synchronise(device)
    return max(time.perf_counter() - start, 1e-7)


def measure_hot(launch: Launch, device: torch.device, launches: int) -> float:
    """Seconds per launch of `launches` that follow each other, by the device's own clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(launches):
            launch()
        return (time.perf_counter() - begin) / launches
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(launches):
        launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / launches


def take_turns(readers: Sequence[Callable[[], Sequence[float]]], rounds: int) -> list[list[float]]:
    """The readings of each reader, taken in turns, every other round in reverse.

    A clock that drifts or a neighbour that wakes up then meets all of them alike, and none is
    always the one after the slowest.
    """
    readings: list[list[float]] = [[] for _ in readers]
    order = list(range(len(readers)))
    for _ in range(rounds):
        for index in order:
            readings[index] += readers[index]()
        order.reverse()
    return readings


def measure_cold(
    launch: Launch, device: torch.device, samples: int, batch: int = 20
) -> list[float]:
    """Seconds of each of `samples` launches, every one after an overwritten level-2 cache.

    Raises:
        ValueError: `device` is not a CUDA device: a CPU's caches cannot be flushed from here.
    """
    if device.type != "cuda":
        raise ValueError(f"cold readings need a CUDA device, but got {device}")
    free, _ = torch.cuda.mem_get_info(device)
    flush = torch.empty(min(FLUSH_BYTES, free // 4), dtype=torch.uint8, device=device)
    readings: list[float] = []
    while len(readings) < samples:
        pairs = []
        for _ in range(min(batch, samples - len(readings))):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            launch()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(device)
        readings += [start.elapsed_time(end) * 1e-3 for start, end in pairs]
    return readings


def peak_memory(launch: Launch, device: torch.device) -> int | None:
    """Bytes that one launch takes at its peak beyond those before, its result included.

    On CUDA the caching allocator counts them. On a CPU the kernel counts the resident pages of the
    process, whoever asked for them; None where it does not say (anything but Linux). Launch once
    before: the first launch also pays for code and threads.
    """
    if device.type != "cuda":
        return _resident_peak(launch)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = launch()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _resident_peak(launch: Launch) -> int | None:
    gc.collect()
    try:
        # Freed memory that malloc kept would be used again without becoming any more resident.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5", encoding="ascii")  # the peak starts anew at what there is
        before = proc_bytes(_STATUS, "VmRSS")
    except (OSError, AttributeError, ValueError):
        return None
    result = launch()
    peak = proc_bytes(_STATUS, "VmHWM")
    del result
    return max(peak - before, 0)


def proc_bytes(path: Path, field: str) -> int:
    """A count of KiB that Linux reports in a file of lines "field: count kB", in bytes.

    Raises:
        OSError: there is no such file here.
        ValueError: it has no such field.
    """
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"{path} has no {field}")
