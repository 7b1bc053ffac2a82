# SPDX-License-Identifier: Apache-2.0
"""The released networks by name: which model each is, of how many classes, for which input.

Names are those of the released weights. ``published(name)`` builds a network; ``dilseg convert``
reads the same table to fill it from its file.

Source: the models of Long et al. 2015 and Yu & Koltun 2016 as their authors released them: nets,
means (data layers, ``datasets/*.json``) and lists of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from dilseg.models.base import LOG_DEPTH, Normalization

__all__ = ["PUBLISHED", "Published", "find_published"]


@dataclass(frozen=True)
class Published:
    """What a released network is.

    Attributes:
        model: Name of the model, see ``build``.
        num_classes: Channels of its logits.
        mean: What its input is reduced by, on 0-255, in the channel order of its file: B, G, R;
            H, H, A for HHA; the one behind the other for both.
        data: Name of the data set whose classes it has, see ``dilseg.data.DATASETS``.
        options: Further arguments of the model.
        bgr: Whether the first three channels of its file are B, G, R.
        released: Whether its authors released weights.
    """

    model: str
    num_classes: int
    mean: tuple[float, ...]
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bgr: bool = True
    released: bool = True

    @property
    def normalization(self) -> Normalization:
        """The input convention, for channels in the order of this package."""
        found = Normalization.from_caffe(self.mean, bgr=self.bgr)
        return found + LOG_DEPTH if self.options.get("in_channels") == 4 else found


_VOC = (104.00698793, 116.66876762, 122.67891434)
_NYUD_COLOR = (116.190, 97.203, 92.318)
_NYUD_HHA = (132.431, 94.076, 118.477)
_SIFTFLOW = (114.578, 115.294, 108.353)
_BOTH = {"heads": {"sem": 33, "geo": 3}}

PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "fcn32s-heavy-pascal": Published("fcn32s", 21, _VOC, "voc"),
        "fcn16s-heavy-pascal": Published("fcn16s", 21, _VOC, "voc"),
        "fcn8s-heavy-pascal": Published("fcn8s", 21, _VOC, "voc"),
        "fcn8s-atonce-pascal": Published("fcn8s", 21, _VOC, "voc", {"at_once": True}),
        "fcn-alexnet-pascal": Published("fcn32s", 21, _VOC, "voc", {"backbone": "alexnet"}),
        # In the paper's table 1; its padding is not known, see `BACKBONES`.
        "fcn-googlenet-pascal": Published(
            "fcn32s", 21, _VOC, "voc", {"backbone": "googlenet"}, released=False
        ),
        "nyud-fcn32s-color-heavy": Published("fcn32s", 40, _NYUD_COLOR, "nyud"),
        "nyud-fcn32s-hha-heavy": Published("fcn32s", 40, _NYUD_HHA, "nyud-hha", bgr=False),
        "nyud-fcn32s-color-d": Published(
            "fcn32s", 40, _NYUD_COLOR, "nyud-rgbd", {"in_channels": 4}, released=False
        ),
        "nyud-fcn32s-color-hha-heavy": Published(
            "fcn32s-late", 40, _NYUD_COLOR + _NYUD_HHA, "nyud-rgb-hha"
        ),
        "siftflow-fcn32s-heavy": Published("fcn32s", 36, _SIFTFLOW, "siftflow-both", _BOTH),
        "siftflow-fcn16s-heavy": Published("fcn16s", 36, _SIFTFLOW, "siftflow-both", _BOTH),
        "siftflow-fcn8s-heavy": Published("fcn8s", 36, _SIFTFLOW, "siftflow-both", _BOTH),
        "pascalcontext-fcn32s-heavy": Published("fcn32s", 60, _VOC, "pascal-context"),
        "pascalcontext-fcn16s-heavy": Published("fcn16s", 60, _VOC, "pascal-context"),
        "pascalcontext-fcn8s-heavy": Published("fcn8s", 60, _VOC, "pascal-context"),
        "dilation8_pascal_voc": Published(
            "dilatednet",
            21,
            (102.93, 111.36, 116.52),
            "voc",
            {"context": "large", "padding": "input"},
        ),
        "dilation8_camvid": Published(
            "dilatednet", 11, (110.70313206, 108.77808759, 105.41212523), "camvid-dilatednet"
        ),
        "dilation7_kitti": Published(
            "dilatednet",
            11,
            (96.19429688, 95.55136972, 91.34692262),
            "kitti",
            {"dilations": (1, 1, 2, 4, 8, 1)},
        ),
        "dilation10_cityscapes": Published(
            "dilatednet",
            19,
            (72.39, 82.91, 73.16),
            "cityscapes",
            {"dilations": (1, 1, 2, 4, 8, 16, 32, 64, 1), "border": "zero"},
        ),
    }
)
"""The networks of both papers, by the names of their weights."""


def find_published(name: str) -> Published:
    """Look a network up by name, or raise a ValueError that lists the names."""
    if name not in PUBLISHED:
        raise ValueError(
            f"dilseg.models.published: expected name one of {', '.join(PUBLISHED)}, but got "
            f"{name!r}."
        )
    return PUBLISHED[name]
