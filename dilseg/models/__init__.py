# SPDX-License-Identifier: Apache-2.0
"""The FCN and DilatedNet families, and what it takes to build and fill them.

fcn32s, fcn16s, fcn8s          fully convolutional networks with deconvolution and skips
fcn32s_late                    two of them, on colour and HHA, with their scores averaged
dilatednet                     front end and context module; DilatedFrontEnd, ContextModule
convolutionalize               any classifier with fully connected layers, made dense
shift_and_stitch, remove_stride  dense cells of a net that subsamples, the long way and the short
load_backbone, load_stage      weights from ImageNet, or from an earlier stage of training
load_caffemodel                the original weights; read_caffemodel, reorder_classes
build                          a model by its name, for commands
published                      a released network by the name of its weights
Scores                         what a network computes before its last, fixed upsampling
"""

from __future__ import annotations

from collections.abc import Callable

from dilseg.models.backbones import BACKBONES, Backbone, Inception, Layer, TableBackbone
from dilseg.models.base import (
    IMAGENET,
    IMAGENET_FEATURES,
    LOG_DEPTH,
    Normalization,
    SegmentationModel,
)
from dilseg.models.caffe import CaffeLayer, CaffeModelError, CaffeNet, read_caffemodel
from dilseg.models.caffe_weights import load_caffemodel, reorder_classes
from dilseg.models.convolutionalize import convolutionalize
from dilseg.models.dilatednet import (
    ContextModule,
    DilatedFrontEnd,
    DilatedNet,
    dilatednet,
    identity_init_,
    reflect_pad,
)
from dilseg.models.fcn import FCN, LateFusionFCN, fcn8s, fcn16s, fcn32s, fcn32s_late
from dilseg.models.published import PUBLISHED, Published, find_published
from dilseg.models.scores import HeadScores, Scores
from dilseg.models.shift_and_stitch import remove_stride, shift_and_stitch
from dilseg.models.upsampling import BilinearUpsampling, LearnedUpsampling, bilinear_kernel
from dilseg.models.weights import LoadReport, load_backbone, load_stage, read_state_dict

__all__ = [
    "BACKBONES",
    "FCN",
    "IMAGENET",
    "IMAGENET_FEATURES",
    "LOG_DEPTH",
    "MODELS",
    "PUBLISHED",
    "Backbone",
    "BilinearUpsampling",
    "CaffeLayer",
    "CaffeModelError",
    "CaffeNet",
    "ContextModule",
    "DilatedFrontEnd",
    "DilatedNet",
    "HeadScores",
    "Inception",
    "LateFusionFCN",
    "Layer",
    "LearnedUpsampling",
    "LoadReport",
    "Normalization",
    "Published",
    "Scores",
    "SegmentationModel",
    "TableBackbone",
    "bilinear_kernel",
    "build",
    "convolutionalize",
    "dilatednet",
    "fcn8s",
    "fcn16s",
    "fcn32s",
    "fcn32s_late",
    "find_published",
    "identity_init_",
    "load_backbone",
    "load_caffemodel",
    "load_stage",
    "published",
    "read_caffemodel",
    "read_state_dict",
    "reflect_pad",
    "remove_stride",
    "reorder_classes",
    "shift_and_stitch",
]

MODELS: dict[str, Callable[..., SegmentationModel]] = {
    "fcn32s": fcn32s,
    "fcn32s-late": fcn32s_late,
    "fcn16s": fcn16s,
    "fcn8s": fcn8s,
    "frontend": DilatedFrontEnd,
    "dilatednet": dilatednet,
}
"""The models that have a name."""


def build(name: str, num_classes: int, **options: object) -> SegmentationModel:
    """Build a model by its name.

    Args:
        name: "fcn32s", "fcn32s-late", "fcn16s", "fcn8s", "frontend" or "dilatednet".
        num_classes: Channels of the logits.
        **options: Keyword arguments of the function or class of that name.

    Returns:
        The model, in training mode; ``model.segment(images)`` gives logits at image size,
        ``model.scores(images)`` the loss and the labels of them without making them.

    Raises:
        ValueError: No model has this name, or an option has an unknown value.
        TypeError: The model has no such option.

    Example:
        >>> build("dilatednet", 4, backbone="demo", context="basic").margin
        75
    """
    if name not in MODELS:
        raise ValueError(
            f"dilseg.models.build: expected name one of {sorted(MODELS)}, but got {name!r}. "
            "Pass one of these names."
        )
    return MODELS[name](num_classes, **options)


def published(name: str, **options: object) -> SegmentationModel:
    """Build a released network, with fresh weights and the input convention of its own.

    Args:
        name: A key of ``PUBLISHED``, such as "fcn8s-heavy-pascal" or "dilation10_cityscapes".
        **options: Further arguments of the model, such as ``learned_upsampling``, which take
            precedence.

    Returns:
        The model, in training mode; ``load_caffemodel`` fills it from the released file.

    Raises:
        ValueError: No network has this name.
        TypeError: The model has no such option.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     net = published("dilation10_cityscapes")
        >>> net.num_classes, net.margin, net.context.receptive_field
        (19, 186, 259)
    """
    entry = find_published(name)
    model = build(entry.model, entry.num_classes, **{**entry.options, **options})
    model.normalization = entry.normalization
    return model
