# SPDX-License-Identifier: Apache-2.0
"""The FCN and DilatedNet families, and what it takes to build and fill them.

fcn32s, fcn16s, fcn8s          fully convolutional networks with deconvolution and skips
dilatednet                     front end and context module; DilatedFrontEnd, ContextModule
convolutionalize               any classifier with fully connected layers, made dense
shift_and_stitch, remove_stride  dense cells of a net that subsamples, the long way and the short
load_backbone, load_stage      weights from ImageNet, or from an earlier stage of training
load_caffemodel                the original weights; read_caffemodel, reorder_classes
build                          a model by its name, for commands
Scores                         what a network computes before its last, fixed upsampling
"""

from __future__ import annotations

from collections.abc import Callable

from dilseg.models.backbones import BACKBONES, Backbone
from dilseg.models.base import IMAGENET, IMAGENET_FEATURES, Normalization, SegmentationModel
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
from dilseg.models.fcn import FCN, fcn8s, fcn16s, fcn32s
from dilseg.models.scores import Scores
from dilseg.models.shift_and_stitch import remove_stride, shift_and_stitch
from dilseg.models.upsampling import BilinearUpsampling, LearnedUpsampling, bilinear_kernel
from dilseg.models.weights import LoadReport, load_backbone, load_stage, read_state_dict

__all__ = [
    "BACKBONES",
    "FCN",
    "IMAGENET",
    "IMAGENET_FEATURES",
    "MODELS",
    "Backbone",
    "BilinearUpsampling",
    "CaffeLayer",
    "CaffeModelError",
    "CaffeNet",
    "ContextModule",
    "DilatedFrontEnd",
    "DilatedNet",
    "LearnedUpsampling",
    "LoadReport",
    "Normalization",
    "Scores",
    "SegmentationModel",
    "bilinear_kernel",
    "build",
    "convolutionalize",
    "dilatednet",
    "fcn8s",
    "fcn16s",
    "fcn32s",
    "identity_init_",
    "load_backbone",
    "load_caffemodel",
    "load_stage",
    "read_caffemodel",
    "read_state_dict",
    "reflect_pad",
    "remove_stride",
    "reorder_classes",
    "shift_and_stitch",
]

MODELS: dict[str, Callable[..., SegmentationModel]] = {
    "fcn32s": fcn32s,
    "fcn16s": fcn16s,
    "fcn8s": fcn8s,
    "frontend": DilatedFrontEnd,
    "dilatednet": dilatednet,
}
"""The models that have a name."""


def build(name: str, num_classes: int, **options: object) -> SegmentationModel:
    """Build a model by its name.

    Args:
        name: "fcn32s", "fcn16s", "fcn8s", "frontend" or "dilatednet".
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
