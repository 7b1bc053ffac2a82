# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, learning-rate schedule and gradient scaler of a training."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from dilseg.engine.config import TrainConfig
from dilseg.models.backbones import TrunkModel, single_layers

__all__ = ["learning_rate_factor", "make_optimizer", "set_learning_rate"]

POLY_POWER = 0.9
"""Exponent of the poly schedule, that of torchvision's segmentation recipe."""

BIAS_LR_MULTIPLIER = 2.0
"""Both papers' solvers give biases twice the learning rate and no decay."""


def make_optimizer(
    model: nn.Module, fresh: Collection[str], config: TrainConfig
) -> torch.optim.Optimizer:
    """Makes the optimiser over the parameters that train, in groups of equal treatment.

    Weights of convolutions have the configured learning rate and decay; biases have no decay and
    with SGD twice the learning rate, as in both papers; norm layers have no decay. With
    `plain_trunk_biases` the biases of the trunk have the rate and decay of its weights, as Caffe's
    AlexNet. Parameters of layers named in `fresh` have their learning rate multiplied by
    `head_lr_multiplier`.

    Args:
        model: The network; parameters with ``requires_grad=False`` stay out.
        fresh: Names of layers that start fresh beside loaded ones.
        config: The training's arguments.

    Raises:
        ValueError: No parameter trains.
    """
    bias_multiplier = BIAS_LR_MULTIPLIER if config.optimizer == "sgd" else 1.0
    plain = _trunk_layers(model) if config.plain_trunk_biases else frozenset()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = name.rpartition(".")[0]
        multiplier = config.head_lr_multiplier if layer in fresh else 1.0
        decay = config.weight_decay
        if layer in plain:
            pass
        elif name.endswith("bias"):
            multiplier, decay = multiplier * bias_multiplier, 0.0
        elif parameter.ndim < 2:
            decay = 0.0
        groups.setdefault((multiplier, decay), []).append(parameter)
    if not groups:
        raise ValueError("no parameter of the model trains; check --stage.")
    parameters: list[dict[str, Any]] = [
        {"params": members, "lr": config.lr * multiplier, "weight_decay": decay}
        for (multiplier, decay), members in groups.items()
    ]
    for group, (multiplier, _) in zip(parameters, groups, strict=True):
        group["lr_multiplier"] = multiplier
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum or 0.0)


def _trunk_layers(model: nn.Module) -> frozenset[str]:
    """Names of the convolutions between the image and fc7."""
    return frozenset(
        f"{prefix}.{layer.name}".removeprefix(".")
        for prefix, module in model.named_modules()
        if isinstance(module, TrunkModel)
        for layer in single_layers(module.layers)
    )


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: int) -> float:
    """Factor on the learning rate at a step: a pure function, so a resumed run needs no state.

    Args:
        step: Steps done so far, ``0 <= step < steps``.
        steps: Steps of the whole training.
        schedule: constant, or poly: ``(1 - step/steps) ** 0.9``.
        warmup: Steps of a linear rise that multiplies the schedule.

    Example:
        >>> [learning_rate_factor(s, 4, "constant", 2) for s in range(4)]
        [0.5, 1.0, 1.0, 1.0]
    """
    factor = 1.0 if schedule == "constant" else (1.0 - step / steps) ** POLY_POWER
    return factor * min(1.0, (step + 1) / warmup) if warmup else factor


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group `lr` times the group's own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
