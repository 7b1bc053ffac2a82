# SPDX-License-Identifier: Apache-2.0
import os
import sys

import numpy as np
import pytest
import torch

from dilseg.data import (
    VOC2012,
    CamVid,
    Shapes,
    colorize,
    overlay,
    read_image,
    read_label,
    save_grey_png,
    save_image,
    save_palette_png,
    voc_palette,
)


def test_voc_palette_has_the_published_colours():
    palette = voc_palette()
    assert palette.shape == (256, 3)
    published = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        5: (128, 0, 128),
        7: (128, 128, 128),
        8: (64, 0, 0),
        15: (192, 128, 128),
        16: (0, 64, 0),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    for index, color in published.items():
        assert tuple(palette[index]) == color
    assert len(np.unique(palette, axis=0)) == 256
    for bad in (0, 257):
        with pytest.raises(ValueError, match=f"in 1 .. 256, but got {bad}"):
            voc_palette(bad)


@pytest.mark.parametrize("dataset", [CamVid, Shapes, VOC2012])
def test_class_colours_are_distinct(dataset):
    assert dataset.palette.shape == (len(dataset.classes), 3)
    assert dataset.palette.dtype == np.uint8
    assert len(np.unique(dataset.palette, axis=0)) == len(dataset.classes)


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (40, 23)])
def test_palette_png_keeps_every_index(tmp_path, size):
    label = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    path = tmp_path / "label.png"
    save_palette_png(path, label, Shapes.palette)
    np.testing.assert_array_equal(read_label(path, 255), label)
    np.testing.assert_array_equal(read_image(path), colorize(label, Shapes.palette))
    assert os.listdir(tmp_path) == ["label.png"]


def test_palette_png_takes_tensors_and_replaces_files(tmp_path):
    path = tmp_path / "label.png"
    path.write_bytes(b"old")
    label = torch.tensor([[0, 3, 255], [1, 2, 20]], dtype=torch.uint8)
    save_palette_png(path, label)
    assert read_label(path, 21).tolist() == label.tolist()
    assert read_image(path)[0, 1].tolist() == [128, 128, 0]


def test_failed_writes_leave_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "label.png"
    path.write_bytes(b"old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_palette_png(path, np.zeros((2, 2), np.uint8))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["label.png"]


def test_save_image_round_trip(tmp_path):
    image = Shapes("val", size=(13, 7)).load_image(0)
    save_image(tmp_path / "image.png", image)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), image)


def test_grey_png_round_trip(tmp_path):
    values = torch.arange(12, dtype=torch.uint8).view(3, 4) * 20
    save_grey_png(tmp_path / "grey.png", values)
    image = read_image(tmp_path / "grey.png")
    np.testing.assert_array_equal(image, np.repeat(values.numpy()[..., None], 3, axis=2))
    with pytest.raises(TypeError, match="values: expected dtype uint8, but got float32"):
        save_grey_png(tmp_path / "other.png", values / 255)
    with pytest.raises(ValueError, match=r"values: expected shape \[h, w\], but got \[1, 3, 4\]"):
        save_grey_png(tmp_path / "other.png", values[None])
    assert os.listdir(tmp_path) == ["grey.png"]


def test_overlay():
    image = np.full((1, 3, 3), 100, np.uint8)
    label = np.array([[0, 1, 255]], np.uint8)
    palette = np.array([(0, 0, 0), (200, 50, 0)], np.uint8)
    assert overlay(image, label, palette).tolist() == [[[50] * 3, [150, 75, 50], [100] * 3]]
    np.testing.assert_array_equal(overlay(image, label, palette, alpha=0.0), image)
    opaque = overlay(image, label, palette, alpha=1.0)
    np.testing.assert_array_equal(opaque[:, :2], colorize(label, palette)[:, :2])


def test_bad_arguments(tmp_path):
    path, palette = tmp_path / "x.png", Shapes.palette
    label, image = np.zeros((2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(TypeError, match="label: expected dtype uint8, but got int64"):
        save_palette_png(path, label.astype(np.int64))
    with pytest.raises(ValueError, match=r"label: expected shape \[h, w\], but got \[2, 3, 3\]"):
        save_palette_png(path, image)
    with pytest.raises(ValueError, match=r"palette: expected shape .* but got \[2, 3\]$|4\]"):
        save_palette_png(path, label, np.zeros((2, 4), np.uint8))
    with pytest.raises(TypeError, match="palette: expected dtype uint8, but got float64"):
        colorize(label, palette / 255.0)
    with pytest.raises(ValueError, match=r"\[2, 3, 3\] .* got \[4, 3, 3\]"):
        overlay(np.zeros((4, 3, 3), np.uint8), label, palette)
    with pytest.raises(ValueError, match=r"expected alpha in \[0, 1\], but got 1.5"):
        overlay(image, label, palette, alpha=1.5)
    with pytest.raises(ValueError, match=r"image: expected shape \[h, w, 3\], but got \[2, 3\]"):
        save_image(path, label)
    with pytest.raises(TypeError, match="image: expected dtype uint8, but got float64"):
        save_image(path, image / 255.0)
    assert os.listdir(tmp_path) == []


def test_without_pillow_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="with Pillow, which is not installed"):
        save_palette_png(tmp_path / "x.png", np.zeros((2, 2), np.uint8))
    assert Shapes("val")[0][1].shape == (96, 96)
