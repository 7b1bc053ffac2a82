# SPDX-License-Identifier: Apache-2.0
"""Datasets, joint transforms and class colours for semantic segmentation.

Samples are plain arrays: images uint8 ``[h, w, 3]`` in RGB, label maps uint8 ``[h, w]`` with class
ids and :data:`IGNORE` (255) for void. :class:`Augmented` and :func:`collate` make batches of
tensors of them. This package needs torch and numpy; files are read and written with Pillow.

Example:
    >>> import torch
    >>> from dilseg.data import Augmented, RandomHorizontalFlip, collate, open_dataset
    >>> train = Augmented(open_dataset("shapes", split="train"), RandomHorizontalFlip(), seed=0)
    >>> loader = torch.utils.data.DataLoader(train, batch_size=4, collate_fn=collate)
    >>> images, labels = next(iter(loader))
    >>> images.shape, labels.shape
    (torch.Size([4, 3, 96, 96]), torch.Size([4, 96, 96]))
"""

from .base import IGNORE, SegmentationDataset
from .camvid import CamVid
from .files import IMAGE_SUFFIXES, list_images, read_image, read_label
from .folder import Folder
from .loading import Augmented, collate
from .palette import (
    colorize,
    overlay,
    save_grey_png,
    save_image,
    save_palette_png,
    voc_palette,
)
from .registry import DATASETS, open_dataset
from .shapes import Shapes
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
    ReflectPad,
    image_to_tensor,
    to_tensors,
)
from .voc import VOC2012

__all__ = [
    "DATASETS",
    "IGNORE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_SUFFIXES",
    "VOC2012",
    "Augmented",
    "CamVid",
    "CenterCrop",
    "Compose",
    "Folder",
    "JointTransform",
    "PixelCounts",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomScale",
    "ReflectPad",
    "SegmentationDataset",
    "Shapes",
    "class_weights",
    "collate",
    "colorize",
    "count_pixels",
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
