# SPDX-License-Identifier: Apache-2.0
"""The published trainings as named presets: values of `TrainConfig`'s fields, and nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["RECIPES", "Recipe", "find_recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published training; what is given beside it takes the place of its values.

    Attributes:
        name: How ``--recipe`` calls it.
        title: What it trains.
        source: Where its values were published.
        arguments: Fields of `TrainConfig` and their values.
        after: The recipe whose ``best.pt`` it starts from (``--init``); None for one that starts
            from a classifier's weights (``--weights``, or a converted classifier's ``--init``).
        note: What is ours because nothing was published, and what differs.
    """

    name: str
    title: str
    source: str
    arguments: Mapping[str, Any]
    after: str | None = None
    note: str = ""

    def __str__(self) -> str:
        """Several lines: everything about the recipe, its values as on a command line."""
        option = "--init" if "backbone" in self.arguments or self.after else "--weights"
        start = f"{self.after or 'a classifier'} ({option})"
        rows = {"source": self.source, "from": start, "note": self.note}
        rows["values"] = " ".join(_option(key, value) for key, value in self.arguments.items())
        lines = [f"{self.name}: {self.title}"]
        for row, text in rows.items():
            lines += textwrap.wrap(
                text,
                width=100,
                initial_indent=f"  {row:<8}",
                subsequent_indent=" " * 10,
                break_on_hyphens=False,
            )
        return "\n".join(lines)


def _option(name: str, value: object) -> str:
    """A field as on the command line."""
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    return f"--{words} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


_SOLVER = {"optimizer": "sgd", "weight_decay": 5e-4, "schedule": "constant"}
"""What all of them share: Caffe's SGD at a fixed rate. Biases learn twice as fast, undecayed."""

_FCN = {**_SOLVER, "flip": False, "replacement": True}
"""Whole images, unchanged, drawn uniformly with replacement."""

_HEAVY = {**_FCN, "loss": "sum", "momentum": 0.99, "batch_size": 1}

_ACCUMULATED = {
    **_FCN, "loss": "mean", "momentum": 0.9, "batch_size": 1, "accumulate": 20,
}  # fmt: skip

_DILATED = {**_SOLVER, "loss": "mean", "eval_every": 2000}

_SBD = {"data": "sbd", "train_split": "train", "eval_split": "seg11valid"}
_SBD_AUGMENTED = {"data": "sbd", "train_split": "trainaug", "eval_split": "voc2012val"}
_NYUD = {"train_split": "trainval", "eval_split": "test"}
_SIFTFLOW = {"data": "siftflow-both", "train_split": "trainval", "eval_split": "test"}
_CONTEXT59 = {"data": "pascal-context", "train_split": "train", "eval_split": "val"}
_CAMVID = {"data": "camvid", "train_split": "train", "eval_split": "val"}
_KITTI = {"data": "kitti", "train_split": "train", "eval_split": "test"}
_CITYSCAPES = {"data": "cityscapes", "train_split": "train", "eval_split": "val"}

_RELEASED = "Long et al., the released solver of"
_YU = "Yu & Koltun 2016,"

_HEAVY_NOTE = (
    "The rate belongs to VGG-16 weights of Caffe's scale (BGR, 0 to 255) and to the summed loss."
)
_LABELS_NOTE = (
    "The published loss compares each cell with the top left pixel of its block of 8 x 8; here all "
    "pixels count, through the upsampling that prediction uses."
)


def _heavy(
    data: str,
    values: Mapping[str, Any],
    *,
    steps: int,
    every: int,
    last_rate: float = 1e-14,
    note: str = "",
) -> list[Recipe]:
    """FCN-32s, 16s and 8s, each from the one before."""
    rates = {"fcn32s": 1e-10, "fcn16s": 1e-12, "fcn8s": last_rate}
    recipes: list[Recipe] = []
    for model, rate in rates.items():
        recipes.append(
            Recipe(
                name=f"{model}-{data}",
                title=f"FCN-{model[3:]}, heavy learning (one image a step, momentum 0.99), staged",
                source=f"{_RELEASED} {data.replace('-', '')}-{model}",
                after=recipes[-1].name if recipes else None,
                arguments={
                    **values, "model": model, **_HEAVY, "lr": rate, "steps": steps,
                    "eval_every": every,
                },
                note=f"{_HEAVY_NOTE} {note}".strip(),
            )
        )  # fmt: skip
    return recipes


def _nyud(data: str, what: str, net: str) -> Recipe:
    return Recipe(
        name=f"fcn32s-{data}",
        title=f"FCN-32s on {what}, heavy learning",
        source=f"{_RELEASED} nyud-fcn32s-{net}",
        arguments={
            "data": data, **_NYUD, "model": "fcn32s", **_HEAVY, "lr": 1e-10, "steps": 100_000,
            "eval_every": 2000,
        },
        note=_HEAVY_NOTE,
    )  # fmt: skip


def _front_end(data: str, values: Mapping[str, Any], section: str, steps: int) -> Recipe:
    return Recipe(
        name=f"frontend-{data}",
        title="DilatedNet's front end alone",
        source=f"{_YU} appendix {section}",
        arguments={
            **values, "model": "frontend", **_DILATED, "momentum": 0.99, "lr": 1e-4,
            "batch_size": 8, "crop": (256, 256), "steps": steps,
        },
        note=f"256 is the published crop of 628 less its margins of 186. {_LABELS_NOTE}",
    )  # fmt: skip


def _table(*recipes: Recipe) -> Mapping[str, Recipe]:
    return MappingProxyType({recipe.name: recipe for recipe in recipes})


RECIPES: Mapping[str, Recipe] = _table(
    *_heavy("voc", _SBD, steps=100_000, every=4000),
    Recipe(
        name="fcn8s-atonce-voc",
        title="FCN-8s at once (scaled pools), heavy learning",
        source=f"{_RELEASED} voc-fcn8s-atonce",
        arguments={
            **_SBD, "model": "fcn8s", "at_once": True, **_HEAVY, "lr": 1e-10, "steps": 300_000,
            "eval_every": 4000,
        },
        note=_HEAVY_NOTE,
    ),
    Recipe(
        name="fcn32s-accumulated-voc",
        title="FCN-32s, twenty images a step, momentum 0.9",
        source="Long et al. 2015, section 4.3",
        arguments={
            "data": "voc2011", "train_split": "train", "eval_split": "val", "model": "fcn32s",
            **_ACCUMULATED, "lr": 1e-4, "epochs": 175,
        },
        note="The paper does not say how it normalises the loss: the mean is ours, after the "
        "authors' accumulated solver (voc-fcn-alexnet). Weight decay is printed as 5^-4 or 2^-4.",
    ),
    Recipe(
        name="fcn32s-alexnet-voc",
        title="FCN-AlexNet, twenty images a step, momentum 0.9",
        source=f"{_RELEASED} voc-fcn-alexnet",
        arguments={
            **_SBD, "model": "fcn32s", "backbone": "alexnet", **_ACCUMULATED,
            "plain_trunk_biases": True, "lr": 1e-4, "steps": 100_000, "eval_every": 4000,
        },
        note="Biases of the trunk learn and decay as its weights do. It starts from CaffeNet's "
        "weights, which `dilseg convert` makes a checkpoint of: give it with --init.",
    ),
    _nyud("nyud", "colour", "color"),
    _nyud("nyud-hha", "HHA", "hha"),
    _nyud("nyud-rgbd", "colour and depth, fused early,", "color-d"),
    Recipe(
        name="fcn32s-nyud-rgb-hha",
        title="FCN-32s on colour and HHA, fused late, heavy learning",
        source=f"{_RELEASED} nyud-fcn32s-color-hha",
        after="fcn32s-nyud",
        arguments={
            "data": "nyud-rgb-hha", **_NYUD, "model": "fcn32s-late", **_HEAVY, "lr": 1e-12,
            "steps": 100_000, "eval_every": 2000,
        },
        note=f"It also starts from fcn32s-nyud-hha: give that with --init-hha. {_HEAVY_NOTE}",
    ),
    *_heavy(
        "siftflow",
        _SIFTFLOW,
        steps=100_000,
        every=2000,
        last_rate=1e-12,
        note="Two heads, semantic and geometric, whose losses are added.",
    ),
    *_heavy("pascal-context", _CONTEXT59, steps=400_000, every=8000),
    Recipe(
        name="frontend-voc",
        title="DilatedNet's front end alone",
        source=f"{_YU} section 4",
        arguments={
            **_SBD_AUGMENTED, "model": "frontend", **_DILATED, "momentum": 0.9, "lr": 1e-3,
            "batch_size": 14, "crop": (128, 128), "steps": 60_000,
        },
        note="The released code has a rate of 1e-4. The paper states no crop: 128 is that of the "
        f"released instructions, 500, less its margins of 186. {_LABELS_NOTE}",
    ),
    Recipe(
        name="context-voc",
        title="DilatedNet's context module Large on the frozen front end",
        source=f"{_YU} section 5; batch and momentum from the released instructions",
        after="frontend-voc",
        arguments={
            **_SBD_AUGMENTED, "model": "dilatednet", "context": "large", "stage": "context",
            "store_features": True, **_DILATED, "momentum": 0.9, "lr": 1e-3, "batch_size": 60,
            "steps": 30_000,
        },
        note=f"The number of steps is ours: none was published. {_LABELS_NOTE}",
    ),
    Recipe(
        name="joint-voc",
        title="DilatedNet, front end and context module Large together",
        source="the released instructions of Yu & Koltun 2016",
        after="context-voc",
        arguments={
            **_SBD_AUGMENTED, "model": "dilatednet", "context": "large", "stage": "joint",
            **_DILATED, "momentum": 0.9, "lr": 1e-5, "batch_size": 14, "crop": (128, 128),
            "steps": 20_000,
        },
        note="The number of steps is ours: none was published. The paper found no significant "
        f"gain in this stage. {_LABELS_NOTE}",
    ),
    _front_end("camvid", _CAMVID, "A.1", 20_000),
    Recipe(
        name="joint-camvid",
        title="DilatedNet, front end and context module Basic together",
        source=f"{_YU} appendix A.1",
        after="frontend-camvid",
        arguments={
            **_CAMVID, "model": "dilatednet", "context": "basic", "stage": "joint", **_DILATED,
            "momentum": 0.9, "lr": 1e-5, "batch_size": 1, "crop": (480, 480), "steps": 20_000,
        },
        note="The number of steps is ours: none was published. The published images have 640 x 480 "
        f"pixels. 480 is the published crop of 852 less its margins of 186. {_LABELS_NOTE}",
    ),
    _front_end("kitti", _KITTI, "A.2", 10_000),
    Recipe(
        name="joint-kitti",
        title="DilatedNet, front end and context module Basic of seven layers together",
        source=f"{_YU} appendix A.2",
        after="frontend-kitti",
        arguments={
            **_KITTI, "model": "dilatednet", "context": "basic", "dilations": (1, 1, 2, 4, 8, 1),
            "stage": "joint", **_DILATED, "momentum": 0.99, "lr": 1e-5, "batch_size": 1,
            "crop": (528, 528), "steps": 20_000,
        },
        note=f"528 is the published crop of 900 less its margins of 186. {_LABELS_NOTE}",
    ),
    _front_end("cityscapes", _CITYSCAPES, "A.3", 40_000),
    Recipe(
        name="context-cityscapes",
        title="DilatedNet's context module Basic of ten layers on the frozen front end",
        source=f"{_YU} appendix A.3",
        after="frontend-cityscapes",
        arguments={
            **_CITYSCAPES, "model": "dilatednet", "context": "basic",
            "dilations": (1, 1, 2, 4, 8, 16, 32, 64, 1), "stage": "context",
            "store_features": True, **_DILATED, "momentum": 0.99, "lr": 1e-4, "batch_size": 100,
            "steps": 24_000,
        },
        note=_LABELS_NOTE,
    ),
    Recipe(
        name="joint-cityscapes",
        title="DilatedNet, front end and context module Basic of ten layers together",
        source=f"{_YU} appendix A.3",
        after="context-cityscapes",
        arguments={
            **_CITYSCAPES, "model": "dilatednet", "context": "basic",
            "dilations": (1, 1, 2, 4, 8, 16, 32, 64, 1), "stage": "joint", **_DILATED,
            "momentum": 0.99, "lr": 1e-5, "batch_size": 1, "crop": (1024, 1024), "steps": 60_000,
        },
        note="Halves of the images, published as 1396 with their margins of 186, are crops of 1024 "
        "at random places here.",
    ),
)  # fmt: skip
"""The published trainings by name; `docs/training.md` explains what their numbers mean."""


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: There is none.

    Example:
        >>> find_recipe("fcn16s-voc").after
        'fcn32s-voc'
    """
    if name not in RECIPES:
        raise ValueError(
            f"--recipe: expected one of {', '.join(RECIPES)}, but got {name!r}; `dilseg recipes` "
            "describes them."
        )
    return RECIPES[name]
