# SPDX-License-Identifier: Apache-2.0
"""A made-up CamVid in SegNet's layout."""

from pathlib import Path

import numpy as np
import pytest


def make_camvid(folder: Path) -> None:
    """Four photographs of 32 x 48 a split, every class in every label map, and some void."""
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for i in range(4):
            label = np.arange(12, dtype=np.uint8).repeat(4)[None].repeat(32, 0)
            photograph = (label[..., None] * 20 + rng.integers(0, 9, (32, 48, 3))).astype(np.uint8)
            for kind, array in ((split, photograph), (f"{split}annot", label)):
                (folder / kind).mkdir(exist_ok=True)
                image_module.fromarray(array).save(folder / kind / f"{i}.png")
