# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation, prediction, conversion: what the commands call, usable from Python too.

    configure, train, resume_config   a training and its exact continuation
    RECIPES                           the published trainings, by name
    reproduce                         a published experiment: trainings, scores, one record
    evaluate, evaluate_model          scores of a checkpoint, or of a network in memory
    predict                           label maps and overlays of image files
    convert                           a checkpoint from a .caffemodel or a torchvision VGG-16
    load_model                        a network from a checkpoint, with its classes and colours
    ConfusionMatrix                   the four scores of the papers

Example:
    >>> from dilseg.engine import configure
    >>> configure(data="shapes", model="fcn8s", steps=10).optimizer
    'adamw'
"""

from dilseg.engine.checkpoint import DataSpec, ModelSpec, load_checkpoint, load_model
from dilseg.engine.config import TrainConfig, configure
from dilseg.engine.convert import convert
from dilseg.engine.evaluate import evaluate, evaluate_model, segment
from dilseg.engine.metrics import ConfusionMatrix
from dilseg.engine.predict import predict
from dilseg.engine.processes import Processes, processes
from dilseg.engine.recipes import RECIPES, Recipe
from dilseg.engine.reproduce import REPRODUCTIONS, reproduce
from dilseg.engine.train import DivergedError, SegmentationLoss, resume_config, train

__all__ = [
    "RECIPES",
    "REPRODUCTIONS",
    "ConfusionMatrix",
    "DataSpec",
    "DivergedError",
    "ModelSpec",
    "Processes",
    "Recipe",
    "SegmentationLoss",
    "TrainConfig",
    "configure",
    "convert",
    "evaluate",
    "evaluate_model",
    "load_checkpoint",
    "load_model",
    "predict",
    "processes",
    "reproduce",
    "resume_config",
    "segment",
    "train",
]
