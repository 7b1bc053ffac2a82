# SPDX-License-Identifier: Apache-2.0
"""Label maps as the servers of benchmarks take them: file names, folders and values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dilseg.data import VOC2012, Cityscapes, save_grey_png, save_palette_png
from dilseg.data.base import Label

__all__ = ["Submission", "find_submission"]


@dataclass(frozen=True)
class Submission:
    """The form that a server expects.

    Attributes:
        classes: Names of the classes that it scores, in the order of their ids.
        path: Where a label map belongs below the folder of results, from the image's name.
        save: Writes a label map of class ids, uint8 ``[h, w]``, to a path.
    """

    classes: tuple[str, ...]
    path: Callable[[str], Path]
    save: Callable[[Path, Label], None]


def find_submission(name: str, split: str, classes: Sequence[str]) -> Submission:
    """The form of a benchmark's server.

    Args:
        name: ``voc2012-comp5`` or ``voc2012-comp6`` (5 for a network trained on VOC's images alone,
            6 for one that has seen others too), the same of 2011, or ``cityscapes``.
        split: Split that is predicted on, which VOC has in its path.
        classes: Classes of the network.

    Raises:
        ValueError: An unknown name, or a network of other classes.

    Source: the development kit of VOC (``VOCopts.seg.clsrespath``); Cityscapes takes the "ids" of
    its label files, not the class ids.

    Example:
        >>> str(find_submission("voc2012-comp6", "test", VOC2012.classes).path("2008_000006"))
        'results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png'
    """
    voc = re.fullmatch(r"voc(2011|2012)-(comp[56])", name)
    if voc is not None:
        folder = Path("results", f"VOC{voc[1]}", "Segmentation", f"{voc[2]}_{split}_cls")
        form = Submission(VOC2012.classes, lambda image: folder / f"{image}.png", save_palette_png)
    elif name == "cityscapes":
        form = Submission(Cityscapes.classes, lambda image: Path(f"{image}.png"), _save_label_ids)
    else:
        raise ValueError(
            "--submission: expected voc2012-comp5, voc2012-comp6, voc2011-comp5, voc2011-comp6 or "
            f"cityscapes, but got {name}."
        )
    if tuple(classes) != form.classes:
        raise ValueError(
            f"--submission {name}: expected a network of its {len(form.classes)} classes "
            f"({form.classes[0]} .. {form.classes[-1]}), but this one has {len(classes)} "
            f"({classes[0]} .. {classes[-1]})."
        )
    return form


def _save_label_ids(path: Path, label: Label) -> None:
    save_grey_png(path, Cityscapes.label_ids(label))
