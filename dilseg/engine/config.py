# SPDX-License-Identifier: Apache-2.0
"""Every argument of a training, its checks, and the defaults that depend on data and model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dilseg.engine.recipes import RECIPES, find_recipe

__all__ = ["MODELS", "TrainConfig", "changed_from_recipe", "configure", "defaults"]

MODELS = ("fcn32s", "fcn32s-late", "fcn16s", "fcn8s", "frontend", "dilatednet")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All arguments of one training; `configure` fills in what is not given.

    Attributes:
        recipe: The published training whose values it starts from, by its name in RECIPES.
        data: Data set, by its name in dilseg.data.DATASETS.
        root: Its folder; None for generated data.
        train_split: Split to train on.
        eval_split: Split to evaluate on.
        limit: Train on this many images, evenly spaced over the split; None for all.
        eval_limit: Evaluate on this many images, evenly spaced over the split; None for all.
        model: fcn32s, fcn32s-late, fcn16s, fcn8s, frontend or dilatednet.
        backbone: vgg16 or demo; for fcn32s also alexnet or googlenet.
        weights: torchvision VGG-16 state dict to start the backbone from.
        init: Checkpoint of another training to start from.
        init_hha: For fcn32s-late, that of a training on HHA; `init` is then one on colour.
        context: Context module of dilatednet: basic or large.
        dilations: Of its 3x3 convolutions; None for the published eight-layer form.
        stage: all, context (front end frozen) or joint.
        store_features: In stage context, compute the frozen front end's scores once, into files of
            the run folder, in place of in every step.
        fc_channels: Channels of fc6 and fc7; None for the backbone's own.
        dropout: Probability of dropping an element after fc6 and fc7.
        at_once: FCN-16s and 8s trained at once, with scaled pool features.
        learned_upsampling: Train the deconvolutions of an FCN, the last one too.
        epochs: Passes over the training images; or else
        steps: number of optimiser steps.
        batch_size: Images per batch, over all processes.
        accumulate: Batches per step, whose gradients are averaged (Caffe's iter_size).
        replacement: Draw images uniformly with replacement; else each once an epoch.
        crop: Height and width of the training crops; None for whole images.
        scale: Range of the random scale; None for none.
        flip: Mirror half of the images.
        optimizer: sgd or adamw.
        lr: Learning rate of the weights.
        momentum: Momentum of SGD; None with AdamW.
        weight_decay: Weight decay; biases have none.
        plain_trunk_biases: Treat the biases of the trunk as its weights: same rate, same decay.
        head_lr_multiplier: Factor on the learning rate of layers that start fresh.
        schedule: constant, or poly: (1 - step/steps)^0.9.
        warmup: Steps over which the learning rate rises linearly from 0.
        clip_norm: Largest gradient norm; None for no bound.
        loss: mean over the labelled pixels of the batch, or sum over pixels, mean over images.
        class_weights: none, or median: median-frequency weights from the training labels.
        label_smoothing: In [0, 1).
        loss_sampling: Share of the network's cells whose labels count, drawn for every sample.
        amp: off, bf16 or fp16 autocast.
        channels_last: Keep weights and images channels_last.
        deterministic: Only repeatable cuDNN algorithms (what makes a resume exact on a GPU).
        workers: Loader processes per training process; None for 0, and 4 on a GPU.
        cache: GiB of memory, on each process, for decoded images; None for none.
        threads: CPU threads of torch; None for torch's choice.
        device: auto, cpu, cuda or cuda:N.
        seed: Seed of everything random.
        out: Run folder.
        save_every: Steps between checkpoints.
        eval_every: Steps between evaluations; 0 for never.
    """

    data: str
    model: str
    backbone: str
    out: str
    recipe: str | None = None
    root: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    limit: int | None = None
    eval_limit: int | None = None
    weights: str | None = None
    init: str | None = None
    init_hha: str | None = None
    context: str | None = None
    dilations: tuple[int, ...] | None = None
    stage: str = "all"
    store_features: bool = False
    fc_channels: int | None = None
    dropout: float = 0.5
    at_once: bool = False
    learned_upsampling: bool = False
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 1
    accumulate: int = 1
    replacement: bool = False
    crop: tuple[int, int] | None = None
    scale: tuple[float, float] | None = None
    flip: bool = True
    optimizer: str = "adamw"
    lr: float = 1e-4
    momentum: float | None = None
    weight_decay: float = 1e-2
    plain_trunk_biases: bool = False
    head_lr_multiplier: float = 1.0
    schedule: str = "poly"
    warmup: int = 0
    clip_norm: float | None = None
    loss: str = "mean"
    class_weights: str = "none"
    label_smoothing: float = 0.0
    loss_sampling: float = 1.0
    amp: str = "off"
    channels_last: bool = False
    deterministic: bool = True
    workers: int | None = None
    cache: float | None = None
    threads: int | None = None
    device: str = "auto"
    seed: int = 0
    save_every: int | None = None
    eval_every: int | None = None

    def model_options(self) -> dict[str, Any]:
        """The keyword arguments of `dilseg.models.build` for this model."""
        options: dict[str, Any] = {
            "backbone": self.backbone,
            "fc_channels": self.fc_channels,
            "dropout": self.dropout,
        }
        if self.model.startswith("fcn"):
            options["learned_upsampling"] = self.learned_upsampling
            if self.model in ("fcn16s", "fcn8s"):
                options["at_once"] = self.at_once
        if self.model == "dilatednet":
            options["context"] = self.context
            if self.dilations is not None:
                options["dilations"] = self.dilations
        return options

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the record and the checkpoint."""
        return dataclasses.asdict(self)


_CHOICES: dict[str, tuple[str, ...]] = {
    "model": MODELS,
    "backbone": ("vgg16", "alexnet", "googlenet", "demo"),
    "context": ("basic", "large"),
    "stage": ("all", "context", "joint"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("constant", "poly"),
    "loss": ("mean", "sum"),
    "class_weights": ("none", "median"),
    "amp": ("off", "bf16", "fp16"),
}

# Lower bound of each number, and whether the bound itself is allowed.
_BOUNDS: dict[str, tuple[float, bool]] = {
    "limit": (1, True),
    "eval_limit": (1, True),
    "fc_channels": (1, True),
    "dropout": (0, True),
    "epochs": (1, True),
    "steps": (1, True),
    "batch_size": (1, True),
    "accumulate": (1, True),
    "lr": (0, False),
    "momentum": (0, True),
    "weight_decay": (0, True),
    "head_lr_multiplier": (0, False),
    "warmup": (0, True),
    "clip_norm": (0, False),
    "label_smoothing": (0, True),
    "loss_sampling": (0, False),
    "cache": (0, False),
    "workers": (0, True),
    "threads": (1, True),
    "seed": (0, True),
    "save_every": (1, True),
    "eval_every": (0, True),
}


def option(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


_BELONGS_TO = {
    "data": ("train_split", "eval_split"),
    "epochs": ("steps",),
    "steps": ("epochs",),
    "optimizer": ("lr", "momentum", "weight_decay"),
}
"""Values of a recipe that mean nothing once another value of it is replaced."""


def defaults(backbone: str, stage: str, optimizer: str) -> dict[str, Any]:
    """The defaults that depend on what is trained; `docs/training.md` lists them.

    Args:
        backbone: vgg16 or demo.
        stage: all, context or joint.
        optimizer: sgd or adamw.
    """
    if backbone == "demo":
        # Shapes: mean IoU above 0.8 on held-out images after about 1200 of the 2000 steps.
        chosen: dict[str, Any] = {
            "batch_size": 16, "dropout": 0.0, "epochs": 16, "channels_last": True,
        }  # fmt: skip
        rates = {"adamw": 2e-3, "sgd": 0.05}
    else:
        # Layers without ImageNet weights (often fc6 and fc7) sit beside layers with them: AdamW's
        # steps suit both. One whole image per step, as in the FCN paper.
        chosen = {"batch_size": 1, "epochs": 60}
        rates = {"adamw": 1e-4, "sgd": 1e-3}
    chosen["lr"] = rates[optimizer] * (0.1 if stage == "joint" else 1.0)
    if optimizer == "sgd":
        chosen.update(momentum=0.9, weight_decay=5e-4)
    else:
        chosen.update(weight_decay=1e-4 if backbone == "demo" else 1e-2)
    return chosen


def configure(**arguments: object) -> TrainConfig:
    """Makes the configuration of a training: what is given, else the recipe's, else the defaults.

    A recipe's splits go with its data, its length with its steps or epochs, its rate, momentum and
    decay with its optimiser: where the one is given, the others of the recipe do not count.

    Args:
        arguments: Any attributes of `TrainConfig`; None stands for "not given".

    Raises:
        ValueError: An unknown name, a value out of range, or arguments that exclude each other; the
            message names the command-line option.
    """
    given: dict[str, Any] = {name: v for name, v in arguments.items() if v is not None}
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(given) - names)
    if unknown:
        raise ValueError(f"unknown training argument {unknown[0]!r}; known: {sorted(names)}.")
    _check(given)
    preset = _preset(given)
    _check(preset)  # a recipe is held to the same rules
    given = {**preset, **given}
    given.setdefault("data", "shapes")
    given.setdefault("model", "fcn8s")
    given.setdefault("backbone", "demo" if given["data"] == "shapes" else "vgg16")
    if given["model"] == "dilatednet":
        given.setdefault("context", "basic")
    given.setdefault("optimizer", "adamw")
    chosen = defaults(given["backbone"], given.get("stage", "all"), given["optimizer"])
    if "steps" in given:
        chosen.pop("epochs", None)
    chosen["batch_size"] = min(chosen["batch_size"], given.get("limit", chosen["batch_size"]))
    for name in ("crop", "scale", "dilations"):
        if name in given:
            given[name] = tuple(given[name])
    chosen["out"] = str(Path("runs") / given.get("recipe", f"{given['data']}-{given['model']}"))
    config = TrainConfig(**{**chosen, **given})
    _check_together(config, given)
    return config


def _preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the recipe that is asked for, less those that do not count."""
    if "recipe" not in given:
        return {}
    recipe = find_recipe(given["recipe"])
    if recipe.after is not None and "init" not in given:
        raise ValueError(
            f"--recipe {recipe.name} continues {recipe.after}: give its checkpoint with --init."
        )
    values = dict(recipe.arguments)
    for key, names in _BELONGS_TO.items():
        if key in given and given[key] != recipe.arguments.get(key):
            for name in names:
                values.pop(name, None)
    return values


def changed_from_recipe(config: TrainConfig) -> dict[str, Any]:
    """The fields in which a configuration differs from its recipe as published.

    Where files lie is no difference: ``root``, ``weights``, ``init``, ``init_hha`` and ``out`` are
    left out.
    Fields that a recipe does not name are compared with the defaults of `TrainConfig`.
    """
    if config.recipe is None:
        return {}
    expected = {"backbone": "vgg16", **RECIPES[config.recipe].arguments}
    places = {"recipe", "root", "weights", "init", "init_hha", "out"}
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(TrainConfig)
        if field.name not in places
        and getattr(config, field.name) != expected.get(field.name, field.default)
    }


def _check(given: Mapping[str, Any]) -> None:
    """Single values."""
    for name, choices in _CHOICES.items():
        if name in given and given[name] not in choices:
            raise ValueError(
                f"{option(name)}: expected one of {', '.join(choices)}, but got {given[name]!r}."
            )
    for name, (low, inclusive) in _BOUNDS.items():
        if name not in given:
            continue
        value = given[name]
        if not math.isfinite(value) or value < low or (value == low and not inclusive):
            sign = ">=" if inclusive else ">"
            raise ValueError(f"{option(name)}: expected a number {sign} {low}, but got {value}.")
    for name in ("dropout", "label_smoothing", "momentum"):
        if given.get(name, 0) >= 1:
            raise ValueError(f"{option(name)}: expected a number below 1, but got {given[name]}.")
    if given.get("loss_sampling", 1) > 1:
        raise ValueError(
            f"--loss-sampling: expected a number in (0, 1], but got {given['loss_sampling']}."
        )
    crop = given.get("crop")
    if crop is not None and (len(crop) != 2 or min(crop) < 1):
        raise ValueError(f"--crop: expected two sizes >= 1, height then width, but got {crop}.")
    dilations = given.get("dilations")
    if dilations is not None and (not dilations or min(dilations) < 1):
        raise ValueError(f"--dilations: expected numbers >= 1, but got {dilations}.")
    scale = given.get("scale")
    if scale is not None and (len(scale) != 2 or not 0 < scale[0] <= scale[1]):
        raise ValueError(f"--scale: expected two numbers 0 < low <= high, but got {scale}.")


def _check_together(config: TrainConfig, given: Mapping[str, Any]) -> None:
    """Arguments that need or exclude each other."""
    fcn = config.model.startswith("fcn")
    if config.steps is not None and config.epochs is not None:
        raise ValueError("--epochs and --steps: give one of them.")
    if "context" in given and config.model != "dilatednet":
        raise ValueError(f"--context: only dilatednet has a context module, not {config.model}.")
    if "dilations" in given and config.model != "dilatednet":
        raise ValueError(f"--dilations: only dilatednet has a context module, not {config.model}.")
    if config.stage != "all" and config.model != "dilatednet":
        raise ValueError(
            f"--stage {config.stage}: only dilatednet trains in stages, not {config.model}."
        )
    if config.stage != "all" and config.init is None:
        raise ValueError(
            f"--stage {config.stage} continues an earlier stage: give its checkpoint with --init."
        )
    if config.store_features and config.stage != "context":
        raise ValueError("--store-features: only --stage context has a frozen front end.")
    if config.store_features and (config.scale or config.crop):
        raise ValueError(
            "--store-features: stores the scores of whole images; leave out --scale and --crop, or "
            "give --no-store-features."
        )
    if config.weights is not None and config.init is not None:
        raise ValueError("--weights and --init: give one of them; a checkpoint has all weights.")
    if config.init_hha is not None and (config.model != "fcn32s-late" or config.init is None):
        raise ValueError("--init-hha: goes with --model fcn32s-late and --init, one on colour.")
    if config.backbone in ("alexnet", "googlenet") and not config.model.startswith("fcn32s"):
        raise ValueError(
            f"--backbone {config.backbone}: only fcn32s is defined on it, not {config.model}."
        )
    if config.backbone == "googlenet" and config.fc_channels is not None:
        raise ValueError("--fc-channels: googlenet has no fc6 and fc7.")
    if config.weights is not None and config.backbone != "vgg16":
        raise ValueError("--weights: VGG-16 weights fit --backbone vgg16 only.")
    if given.get("learned_upsampling") and not fcn:
        raise ValueError(f"--learned-upsampling: only an FCN has it, not {config.model}.")
    if given.get("at_once") and config.model not in ("fcn16s", "fcn8s"):
        raise ValueError(f"--at-once: only fcn16s and fcn8s have it, not {config.model}.")
    if config.momentum is not None and config.optimizer != "sgd":
        raise ValueError("--momentum belongs to --optimizer sgd.")
    if config.data == "shapes" and config.root is not None:
        raise ValueError("--root: shapes are generated and have no folder.")
    if config.data != "shapes" and config.root is None:
        raise ValueError(f"--root: give the folder that holds the data set {config.data}.")
