# SPDX-License-Identifier: Apache-2.0
"""The papers' tables: scores of an evaluation as Markdown, beside what was published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["PUBLISHED", "Published", "markdown", "published"]


class Published(NamedTuple):
    """A published row, in per cent; None where the source has no figure.

    `data`, `split` and `model` are names of the commands. `network` says which one it was.
    """

    data: tuple[str, ...]
    split: str
    model: str
    network: str
    pixel_accuracy: float | None = None
    mean_accuracy: float | None = None
    mean_iou: float | None = None
    frequency_weighted_iou: float | None = None


_FCN = "Long et al. 2015"
_RELEASED = "weights released by its authors"
_DILATED = "Yu & Koltun 2016"
_VOC11 = ("sbd", "voc2011", "voc")
_CAMVID = ("camvid", "camvid-dilatednet")

PUBLISHED: tuple[Published, ...] = (
    Published(_VOC11, "seg11valid", "fcn32s", f"FCN-32s, {_FCN}", 89.1, 73.3, 59.4, 81.4),
    Published(_VOC11, "seg11valid", "fcn16s", f"FCN-16s, {_FCN}", 90.0, 75.7, 62.4, 83.0),
    Published(_VOC11, "seg11valid", "fcn8s", f"FCN-8s, {_FCN}", 90.3, 75.9, 62.7, 83.2),
    Published(
        _VOC11, "seg11valid", "fcn32s", f"FCN-32s, {_RELEASED}", 90.4810, 76.4824, 63.6261, 83.4580
    ),
    Published(
        _VOC11, "seg11valid", "fcn16s", f"FCN-16s, {_RELEASED}", 90.9971, 78.0710, 65.0050, 84.2614
    ),
    Published(
        _VOC11, "seg11valid", "fcn8s", f"FCN-8s, {_RELEASED}", 91.2212, 77.6146, 65.5126, 84.5445
    ),
    Published(
        _VOC11,
        "seg11valid",
        "fcn8s",
        f"FCN-8s at once, {_RELEASED}",
        91.1288,
        78.4979,
        65.3998,
        84.4326,
    ),
    *(
        Published((data,), split, model, f"{network} with COCO, {_DILATED}", mean_iou=score)
        for data, split in (("voc", "val"), ("sbd", "voc2012val"))
        for model, network, score in (
            ("frontend", "front end", 69.8),
            ("dilatednet", "front end, context Basic,", 71.3),
            ("dilatednet", "front end, context Large,", 72.1),
        )
    ),
    Published(("nyud",), "test", "fcn32s", f"FCN-32s RGB, {_FCN}", 60.0, 42.2, 29.2, 43.9),
    Published(("nyud-hha",), "test", "fcn32s", f"FCN-32s HHA, {_FCN}", 57.1, 35.2, 24.2, 40.4),
    Published(
        ("siftflow",), "test", "fcn16s", f"FCN-16s, both heads, {_FCN}", 85.2, 51.7, 39.5, 76.1
    ),
    Published(("siftflow-geometric",), "test", "fcn16s", f"FCN-16s, both heads, {_FCN}", 94.3),
    *(
        Published(("pascal-context",), "val", f"fcn{stride}s", f"FCN-{stride}s, {_FCN}", *scores)
        for stride, scores in (
            (32, (63.8, 42.7, 31.8, 48.3)),
            (16, (65.7, 46.2, 34.8, 50.7)),
            (8, (65.9, 46.5, 35.1, 51.0)),
        )
    ),
    Published(
        _CAMVID,
        "test",
        "dilatednet",
        f"Dilation8, images of 640 x 480, {_DILATED}",
        mean_iou=65.3,
    ),
    Published(("kitti",), "test", "dilatednet", f"Dilation7, {_DILATED}", mean_iou=59.2),
    Published(("cityscapes",), "val", "dilatednet", f"Dilation10, {_DILATED}", mean_iou=68.7),
)
"""What the papers, or those who scored their weights, report; the pages of docs/datasets say more.
"""

_SCORES = {
    "pixel_accuracy": "pixel acc.",
    "mean_accuracy": "mean acc.",
    "mean_iou": "mean IoU",
    "frequency_weighted_iou": "f.w. IoU",
}


def published(data: str, split: str, model: str) -> list[Published]:
    """Rows of `PUBLISHED` for a network of this name on this split.

    Example:
        >>> [row.mean_iou for row in published("kitti", "test", "dilatednet")]
        [59.2]
    """
    return [
        row for row in PUBLISHED if data in row.data and (split, model) == (row.split, row.model)
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of an evaluation, in per cent.

    Args:
        result: What `evaluate` returns, or what its JSON file holds.

    Returns:
        Markdown: the scores beside published ones of the same network and split, the classes, and
        the categories where the data set has any; for every head, where there are several.
    """
    data, split, model = result["data"], result["split"], result["model"]["name"]
    others = [
        [f"published: {row.network}", "", *("" if v is None else str(v) for v in row[4:])]
        for row in published(data, split, model)
    ]
    parts = [
        f"# {model} on {data}, {split}",
        f"{result['images']} images, `{Path(result['checkpoint']).name}`. In per cent.",
    ]
    for head, found in (result.get("heads") or {"": result}).items():
        scores = [
            ["this checkpoint", name, *(_percent(values[key]) for key in _SCORES)]
            for name, values in found["score_sets"].items()
        ]
        parts += [f"## Head {head}"] if head else []
        parts += [
            _table(["network", "means over", *_SCORES.values()], 2, scores + others),
            _figures("class", found["classes"]),
        ]
        if found["categories"]:
            mean = ["mean", _percent(found["category_mean_iou"]), "", "", ""]
            parts.append(_figures("category", found["categories"], mean))
    return "\n\n".join(parts) + "\n"


def _figures(kind: str, rows: Sequence[Mapping[str, Any]], *last: list[str]) -> str:
    cells = [
        [
            row["class"],
            *(_percent(row[key]) for key in ("iou", "accuracy", "precision")),
            f"{row['pixels']:,}",
        ]
        for row in rows
    ]
    return _table([kind, "IoU", "accuracy", "precision", "pixels"], 1, [*cells, *last])


def _table(heads: Sequence[str], words: int, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first columns, `words` of them, are text and the others numbers."""
    rule = ["---"] * words + ["--:"] * (len(heads) - words)
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *escaped))


def _percent(value: float | None) -> str:
    """Two decimals; a dash for what is undefined, which JSON holds as null."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"
