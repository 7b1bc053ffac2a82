# SPDX-License-Identifier: Apache-2.0
"""Datasets by name, for commands and configuration files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .base import SegmentationDataset
from .camvid import CamVid
from .cityscapes import Cityscapes
from .folder import Folder
from .kitti import KITTI
from .nyud import NYUDv2
from .pascal_context import PascalContext
from .sbd import SBD
from .shapes import Shapes
from .siftflow import SiftFlow, SiftFlowBoth, siftflow_classes
from .voc import VOC2011, VOC2012

DATASETS: Mapping[str, Callable[..., SegmentationDataset]] = MappingProxyType(
    {
        "shapes": Shapes,
        "folder": Folder,
        "voc": VOC2012,
        "voc2011": VOC2011,
        "sbd": SBD,
        "nyud": NYUDv2,
        "nyud-hha": partial(NYUDv2, modality="hha"),
        "nyud-rgbd": partial(NYUDv2, modality="rgbd"),
        "nyud-rgb-hha": partial(NYUDv2, modality="rgb-hha"),
        "siftflow": SiftFlow,
        "siftflow-geometric": partial(SiftFlow, labels="geometric"),
        "siftflow-both": SiftFlowBoth,
        "pascal-context": PascalContext,
        "camvid": CamVid,
        "camvid-dilatednet": partial(CamVid, class_order="dilatednet"),
        "kitti": KITTI,
        "cityscapes": Cityscapes,
    }
)
"""Dataset classes, some with an argument filled in, by their names for :func:`open_dataset`."""


def open_dataset(
    name: str,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    **options: object,
) -> SegmentationDataset:
    """Open a split of a dataset by name.

    Args:
        name: A key of :data:`DATASETS`: ``"shapes"`` (generated), ``"folder"`` (your own images,
            see :class:`dilseg.data.Folder`), or a published dataset such as ``"voc"``.
        root: Folder of the dataset; None for ``"shapes"``, which has no files.
        split: Name of the split.
        **options: Further keyword arguments of the dataset's class, e.g. ``length`` for shapes.

    Returns:
        The dataset.

    Raises:
        ValueError: If ``name`` or ``split`` is unknown, or ``root`` is missing or superfluous.
        FileNotFoundError: If files are missing below ``root``.

    Example:
        >>> open_dataset("shapes", split="test").num_classes
        7
    """
    if name not in DATASETS:
        raise ValueError(
            f"open_dataset: expected name to be one of {', '.join(DATASETS)}, but got {name!r}."
        )
    if name == "shapes":
        if root is not None:
            raise ValueError(
                f"open_dataset: expected no root for 'shapes', which is generated, but got {root}. "
                "Use 'folder' for your own images."
            )
        return DATASETS[name](split, **options)
    if root is None:
        raise ValueError(
            f"open_dataset: expected root, the folder of dataset {name!r}, but got none."
        )
    return DATASETS[name](root, split, **options)


def dataset_classes(name: str) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
    """Names and colours of a dataset's classes, without its files.

    Args:
        name: A key of :data:`DATASETS` but ``"folder"``, whose classes are in its files.

    Returns:
        The names, and uint8 ``[num_classes, 3]``.

    Raises:
        ValueError: If there is no such name.

    Example:
        >>> dataset_classes("siftflow-geometric")[0]
        ('sky', 'horizontal', 'vertical')
    """
    semantic, geometric = siftflow_classes("semantic"), siftflow_classes("geometric")
    of_instances = {
        "siftflow": semantic,
        "siftflow-geometric": geometric,
        "siftflow-both": (
            semantic[0] + geometric[0],
            np.concatenate([semantic[1], geometric[1]]),
        ),
        "camvid-dilatednet": (KITTI.classes, KITTI.palette),
    }
    if name in of_instances:
        return of_instances[name]
    opener = DATASETS.get(name)
    dataset = opener.func if isinstance(opener, partial) else opener
    if (
        not isinstance(dataset, type)
        or not issubclass(dataset, SegmentationDataset)
        or not hasattr(dataset, "classes")
    ):
        known = ", ".join(key for key in DATASETS if key != "folder")
        raise ValueError(f"dataset_classes: expected name to be one of {known}, but got {name!r}.")
    return dataset.classes, dataset.palette
