# SPDX-License-Identifier: Apache-2.0
"""Datasets, joint transforms and class colours for semantic segmentation.

Samples are plain arrays: images uint8 ``[h, w, 3]`` in RGB, label maps uint8 ``[h, w]`` with class
ids and :data:`IGNORE` (255) for void. :class:`Augmented` and :func:`collate` make batches of
tensors of them. This package needs torch and numpy; pictures are read and written with Pillow,
MATLAB files read with scipy and h5py, all three imported when they are needed.

Example:
    >>> import torch
    >>> from dilseg.data import Augmented, RandomHorizontalFlip, collate, open_dataset
    >>> train = Augmented(open_dataset("shapes", split="train"), RandomHorizontalFlip(), seed=0)
    >>> loader = torch.utils.data.DataLoader(train, batch_size=4, collate_fn=collate)
    >>> images, labels = next(iter(loader))
    >>> images.shape, labels.shape
    (torch.Size([4, 3, 96, 96]), torch.Size([4, 96, 96]))
"""

from .base import IGNORE, SegmentationDataset, SeveralHeads
from .camvid import CamVid
from .cityscapes import Cityscapes
from .files import IMAGE_SUFFIXES, list_images, read_image, read_label
from .folder import Folder
from .kitti import KITTI
from .loading import Augmented, collate
from .nyud import NYUDv2
from .palette import (
    colorize,
    overlay,
    save_grey_png,
    save_image,
    save_palette_png,
    voc_palette,
)
from .pascal_context import PascalContext
from .registry import DATASETS, dataset_classes, open_dataset
from .sbd import SBD
from .shapes import Shapes
from .siftflow import SiftFlow, SiftFlowBoth
from .statistics import PixelCounts, class_weights, count_pixels
from .transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    Compose,
    JointTransform,
    RandomCrop,
    RandomHorizontalFlip,
    RandomScale,
    RandomVoid,
    ReflectPad,
    image_to_tensor,
    to_tensors,
)
from .voc import VOC2011, VOC2012

__all__ = [
    "DATASETS",
    "IGNORE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_SUFFIXES",
    "KITTI",
    "SBD",
    "VOC2011",
    "VOC2012",
    "Augmented",
    "CamVid",
    "CenterCrop",
    "Cityscapes",
    "Compose",
    "Folder",
    "JointTransform",
    "NYUDv2",
    "PascalContext",
    "PixelCounts",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomScale",
    "RandomVoid",
    "ReflectPad",
    "SegmentationDataset",
    "SeveralHeads",
    "Shapes",
    "SiftFlow",
    "SiftFlowBoth",
    "class_weights",
    "collate",
    "colorize",
    "count_pixels",
    "dataset_classes",
    "image_to_tensor",
    "list_images",
    "open_dataset",
    "overlay",
    "read_image",
    "read_label",
    "save_grey_png",
    "save_image",
    "save_palette_png",
    "to_tensors",
    "voc_palette",
]
