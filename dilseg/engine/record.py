# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind besides weights: its record, its log and its curve."""

from __future__ import annotations

import datetime
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from dilseg.engine.files import require, write_atomic

__all__ = ["LossLog", "draw_curve", "environment", "now"]

Row = tuple[int, int, float, float]
"""Step (from 1), epoch (from 0), learning rate, loss before the step."""


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The commit of the checkout this package runs from, ``-dirty`` if changed; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # Not Linux: the platform module's shorter answer has to do.
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, build and hardware, as plain values for a record."""
    import dilseg

    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return {
        "dilseg": dilseg.__version__,
        "torch": str(torch.__version__),  # a subclass of str, which weights_only loading refuses
        "python": platform.python_version(),
        "build": {k: str(v) if isinstance(v, str) else v for k, v in dilseg.build_info().items()},
        "git_commit": _git_commit(),
        "command": sys.argv,
        "hardware": hardware,
    }


class LossLog:
    """``log.csv``: one line per step, the same bytes for the same training.

    There is no time in it on purpose: an interrupted and resumed run has the file of an unbroken
    one, and `diff` can say so. Times are in ``record.json``.

    Args:
        path: The file; written anew with `rows`.
        rows: Rows known so far (those of the checkpoint a run resumes from).
    """

    HEADER = "step,epoch,lr,loss"

    def __init__(self, path: Path, rows: Iterable[Row] = ()) -> None:
        """See the class."""
        self.rows: list[Row] = list(rows)
        content = "".join(f"{line}\n" for line in [self.HEADER, *map(self._line, self.rows)])
        write_atomic(path, lambda file: file.write(content.encode()))
        self._file: TextIO = path.open("a", encoding="utf-8", newline="\n")

    @staticmethod
    def _line(row: Row) -> str:
        step, epoch, lr, loss = row
        return f"{step},{epoch},{lr!r},{loss!r}"  # repr keeps every bit of a float

    def append(self, rows: Sequence[Row]) -> None:
        """Adds steps and hands them to the operating system, so that a kill keeps them."""
        self.rows.extend(rows)
        self._file.write("".join(f"{self._line(row)}\n" for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def draw_curve(path: Path, rows: Sequence[Row], evaluations: Sequence[dict[str, Any]]) -> None:
    """Draws loss (every step and smoothed) and mean IoU over the steps as a PNG.

    Args:
        path: The picture.
        rows: The loss log.
        evaluations: Dictionaries with ``step`` and ``mean_iou``.
    """
    figure_class = require("matplotlib.figure", "the loss curve").Figure
    figure = figure_class(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps, losses = [row[0] for row in rows], [row[3] for row in rows]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=1.6, label="training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per labelled pixel")
    axes.set_ylim(bottom=0)
    if losses:
        top = sorted(losses)[min(len(losses) - 1, math.ceil(0.99 * len(losses)))]
        axes.set_ylim(0, max(1.1 * top, 1e-6))
    axes.grid(alpha=0.3)
    lines = axes.get_lines()[1:2]
    if evaluations:
        right = axes.twinx()
        right.set_ylabel("mean IoU")
        right.set_ylim(0, 1)
        lines += right.plot(
            [e["step"] for e in evaluations],
            [e["mean_iou"] for e in evaluations],
            color="tab:orange",
            marker="o",
            markersize=3,
            label="mean IoU",
        )
    axes.legend(handles=lines, loc="center right")
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a fiftieth of the curve, unbiased at its start."""
    keep = 1.0 - 1.0 / max(1.0, len(values) / 50)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
