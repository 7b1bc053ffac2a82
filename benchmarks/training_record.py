# SPDX-License-Identifier: Apache-2.0
"""Records of whole trainings on torch's operators and on dilseg's, in a short table.

`python -m benchmarks.training` writes them: a row per training, and a comparison per network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import comparison
from benchmarks.comparison import TIE, digits, mebibytes
from benchmarks.markdown import table
from benchmarks.results_file import read_json

FORMAT = "dilseg-training"
VERSION = 1
OPERATORS = (comparison.OWN, "torch")
_TEXTS = ("status", "started", "written", "data")
_ROW = ("model", "ops", "mean_iou", "images_per_s", "peak_bytes")
_COMPARISON = ("model", "loss_difference", "bitwise_equal")

HEADER = ("network", "images/s, dilseg / torch", "speed-up", "mean IoU, dilseg / torch",
          "peak MiB, dilseg / torch", "losses differ by at most", "same bits twice")  # fmt: skip


def validate(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns `record` when a table can be made of it.

    Raises:
        ValueError: it is of another version, or lacks something; the message names the place.
    """
    if record.get("version") != VERSION:
        raise ValueError(f"{name}.version: expected {VERSION}, but got {record.get('version')!r}")
    if not isinstance((record.get("machine") or {}).get("name"), str):
        raise ValueError(f"{name}.machine.name: expected a device name")
    for key in _TEXTS:
        if not isinstance(record.get(key), str):
            raise ValueError(f"{name}.{key}: expected a text, but got {record.get(key)!r}")
    for section, keys in (("rows", _ROW), ("comparisons", _COMPARISON)):
        if not isinstance(record.get(section), list):
            raise ValueError(f"{name}.{section}: expected a list, but got {record.get(section)!r}")
        for index, row in enumerate(record[section]):
            for key in keys:
                if key not in row:
                    raise ValueError(f"{name}.{section}[{index}].{key}: expected it, no such key")
    trained = {(row["model"], row["ops"]) for row in record["rows"]}
    for index, said in enumerate(record["comparisons"]):
        if not {(said["model"], ops) for ops in OPERATORS} <= trained:
            raise ValueError(
                f"{name}.comparisons[{index}].model: expected a network with rows of "
                f"{' and '.join(OPERATORS)}, but got {said['model']!r}"
            )
    return record


def load(path: Path) -> dict[str, Any]:
    """Reads a record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no training record of this version.
    """
    return validate(read_json(path), path.name)


def lines(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line under `HEADER` for every network that was trained on both."""
    told: list[tuple[str, ...]] = []
    first = {(row["model"], row["ops"]): row for row in reversed(record["rows"])}
    for said in record["comparisons"]:
        ours, theirs = (first[said["model"], ops] for ops in OPERATORS)
        ratio = ours["images_per_s"] / theirs["images_per_s"]
        verdict = "" if ratio >= TIE else " (loss)" if ratio <= 1 / TIE else " (tie)"
        speed_up = f"{ratio:.2f}x{verdict}"
        told.append(
            (said["model"], f"{digits(ours['images_per_s'])} / {digits(theirs['images_per_s'])}",
             speed_up if verdict else f"**{speed_up}**",
             f"{100 * ours['mean_iou']:.2f} / {100 * theirs['mean_iou']:.2f}",
             f"{mebibytes(ours['peak_bytes'])} / {mebibytes(theirs['peak_bytes'])}",
             f"{100 * said['loss_difference']:.2g} %",
             "yes" if said["bitwise_equal"] else "**no**")
        )  # fmt: skip
    return told


def caption(record: dict[str, Any]) -> str:
    """Device, versions, commit, when, and the data."""
    size = f", size {record['size']}" if "size" in record else ""
    return f"{comparison.caption(record)} Data: {record['data']}{size}."


def render(record: dict[str, Any]) -> str:
    """Caption and table."""
    return f"{caption(record)}\n\n{table(HEADER, lines(record))}"


def command(record: dict[str, Any]) -> str:
    """The command that made it, as far as the record says."""
    words: Sequence[str] = record.get("command") or ("python", "-m", "benchmarks.training")
    return " ".join(words)
