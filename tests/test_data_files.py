# SPDX-License-Identifier: Apache-2.0
"""Datasets read from files: their layouts, and what they say about bad ones."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from helpers.memory import memory_within
from PIL import Image

from dilseg.data import (
    DATASETS,
    IGNORE,
    VOC2012,
    Augmented,
    CamVid,
    Folder,
    Shapes,
    class_weights,
    collate,
    count_pixels,
    list_images,
    open_dataset,
    read_image,
    read_label,
    save_palette_png,
)
from dilseg.data.files import class_ids, identity_table, read_lines


def _photo(path, h=6, w=8, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def _mask(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(label, np.uint8)).save(path)


def _label(num_classes, h=6, w=8, void=255):
    label = np.arange(h * w, dtype=np.uint8).reshape(h, w) % num_classes
    label[0, 0] = void
    return label


# --- single files ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "1", "LA"])
def test_read_image_turns_8_bit_pictures_into_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 5, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert (image == 255).all()


def _png(width, height, *chunks, mode=2):
    """A PNG whose header declares a size, and what follows it."""
    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


@pytest.mark.parametrize("size", [(9500, 9500), (50000, 50000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("mode", [0, 2])  # grey, RGB
def test_bombs_are_refused_by_their_header(tmp_path, size, mode, recwarn):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png(*size, mode=mode))
    _photo(tmp_path / "x.png", 4, 4)
    read_image(tmp_path / "x.png")  # imports what reads pictures
    for read in (read_image, lambda path: read_label(path, 2)):
        with (
            memory_within(1e6),
            pytest.raises(
                ValueError,
                match=r"bomb.png: expected an? .* of at most 89478485 pixels, but got a head",
            ),
        ):
            read(path)
    assert not recwarn


def test_large_pictures_can_be_allowed(tmp_path, monkeypatch):
    _photo(tmp_path / "x.png", 40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1599)
    with pytest.raises(
        ValueError, match=r"of at most 1599 pixels, .* trust it, raise PIL.Image.MAX"
    ):
        read_image(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert read_image(tmp_path / "x.png").shape == (40, 40, 3)


def test_text_in_a_png_is_inflated_within_a_limit(tmp_path):
    path = tmp_path / "bomb.png"
    text = b"Comment\0\0" + zlib.compress(bytes(2**27))
    path.write_bytes(_png(1, 1, (b"zTXt", text)))
    with (
        memory_within(2**24),
        pytest.raises(ValueError, match=r"bomb.png: expected a readable image, .*too large"),
    ):
        read_image(path)


@pytest.mark.parametrize("content", [b"x" * 5000, b"2007_000032\n" * 2**21])
def test_endless_lists_are_refused(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"list.txt: expected a list of at most 16777216 bytes in"):
        read_lines(tmp_path / "list.txt")


def test_read_image_keeps_the_channel_order_and_ignores_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    Image.new("RGB", (8, 4), (250, 100, 0)).save(tmp_path / "x.jpg", exif=exif, quality=100)
    image = read_image(tmp_path / "x.jpg")
    assert image.shape == (4, 8, 3)
    np.testing.assert_allclose(image[2, 4], (250, 100, 0), atol=4)


def test_read_image_refuses_16_bits(tmp_path):
    Image.fromarray(np.zeros((3, 3), np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x.png: expected an image with 8 bits per channel"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_damaged_files_are_named(tmp_path, suffix, share):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    path = tmp_path / f"photo.{suffix}"
    path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
    with pytest.raises(ValueError, match=rf"photo.{suffix}: expected a readable image, but got"):
        read_image(path)
    with pytest.raises(ValueError, match=rf"photo.{suffix}: expected a readable label map"):
        read_label(path, 21)


def test_damage_inside_a_file_is_named(tmp_path):
    path = tmp_path / "label.png"
    _mask(path, _label(5, 64, 64))
    data = bytearray(path.read_bytes())
    middle = data.index(b"IDAT") + 20
    data[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"label.png: expected a readable label map"):
        read_label(path, 21)


def test_no_other_program_is_started(tmp_path, monkeypatch):
    # Pillow reads PostScript by running Ghostscript, and goes by the content of a file.
    def start(*command, **options):
        raise AssertionError(f"started {command}")

    monkeypatch.setattr(subprocess, "Popen", start)
    header = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.png").write_text(header)
    for read in (read_image, lambda path: read_label(path, 2)):
        with pytest.raises(ValueError, match=r"x.png: .* no image at all \(cannot identify"):
            read(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("suffix", "form"), [("jpg", "PNG"), ("png", "GIF"), ("png", "PPM"), ("bmp", "WEBP")]
)
def test_read_image_goes_by_the_content(tmp_path, suffix, form):
    Image.new("RGB", (5, 3), (255, 255, 255)).save(tmp_path / f"x.{suffix}", form)
    assert read_image(tmp_path / f"x.{suffix}").tolist() == [[[255] * 3] * 5] * 3


def test_text_is_no_image(tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(ValueError, match=r"x.png: .* no image at all .*Replace it"):
        read_image(tmp_path / "x.png")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x.png: expected an existing image"):
        read_image(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match=r"x.png: expected an existing label map"):
        read_label(tmp_path / "x.png", 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, bool])
def test_read_label_takes_indices_of_any_width(tmp_path, dtype):
    label = np.array([[0, 1], [1, 0]], dtype)
    path = tmp_path / ("x.tif" if dtype is np.int32 else "x.png")  # PNG ends at 16 bits
    Image.fromarray(label).save(path)
    read = read_label(path, 2)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, label)


def test_read_label_maps_void(tmp_path):
    _mask(tmp_path / "x.png", [[0, 1, 11, 255]])
    assert read_label(tmp_path / "x.png", 2, void=(11,)).tolist() == [[0, 1, IGNORE, IGNORE]]


def test_read_label_refuses_colours(tmp_path):
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (4, 4)).save(tmp_path / "x.png")
        with pytest.raises(ValueError, match=rf"x.png: .* got a picture of mode '{mode}'.*never"):
            read_label(tmp_path / "x.png", 2)


def test_read_label_refuses_jpeg(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"x.jpg: .* got a JPEG, which alters class ids"):
        read_label(tmp_path / "x.jpg", 2)


def test_read_label_names_wrong_values(tmp_path):
    label = np.zeros((4, 5), np.uint8)
    label[2, 3], label[3, 0] = 94, 21
    _mask(tmp_path / "x.png", label)
    with pytest.raises(
        ValueError,
        match=r"x.png: expected label values in 0 .. 20 or 255 for void, but got 21, 94 "
        r"\(2 pixels, first at row 2, column 3\)",
    ):
        read_label(tmp_path / "x.png", 21)
    assert read_label(tmp_path / "x.png", 95)[2, 3] == 94
    with pytest.raises(ValueError, match=r"in 0 .. 20 or 94 or 255 for void, but got 21 \(1 pix"):
        read_label(tmp_path / "x.png", 21, void=(94,))


def test_read_label_names_values_beyond_8_bits(tmp_path):
    Image.fromarray(np.array([[0, 300]], np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"but got 300 \(1 pixels, first at row 0, column 1\)"):
        read_label(tmp_path / "x.png", 255)


@pytest.mark.parametrize("dtype", ["u1", "i1", ">u2", "i4", "u8", "f4", "f8"])
@pytest.mark.parametrize("low", [0, -1])
def test_class_ids_of_every_type(dtype, low):
    table = np.array({0: [4, -1, 7], -1: [IGNORE, 4, -1, 7]}[low], np.int16)
    values = np.array([[0, 2], [2, 0]], dtype)
    assert class_ids("x", values, table, "ids", low=low).tolist() == [[4, 7], [7, 4]]
    bad = [1, 3, 100]
    if np.dtype(dtype).kind in "if":
        bad.append(-1 if low == 0 else -2)
    if np.dtype(dtype).kind == "f":
        bad += [0.5, np.nan, np.inf, -np.inf, 1e30]
    if np.dtype(dtype).itemsize == 8:
        bad.append(2**63 if dtype == "u8" else -(2**62))
    for value in bad:
        values[1, 0] = value
        with pytest.raises(
            ValueError, match=r"x: expected ids, but got .* \(1 pixels, first at row 1"
        ):
            class_ids("x", values, table, "ids", low=low)


def test_class_ids_of_wide_tables():
    table = np.arange(1000, dtype=np.int16) % 200
    values = np.array([[999, 200, 0]], np.uint16)
    assert class_ids("x", values, table, "ids").tolist() == [[199, 0, 0]]
    assert class_ids("x", values.astype(np.uint8), table, "ids").tolist() == [[31, 0, 0]]
    assert identity_table(3, (200,))[[0, 2, 3, 200, 255]].tolist() == [0, 2, -1, IGNORE, IGNORE]


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"different stems, but got a.jpg and a.png"):
        list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_images(tmp_path / "none")


# --- CamVid ------------------------------------------------------------------------------------


@pytest.fixture(params=["jpg", "png"])
def camvid(tmp_path, request):
    root = tmp_path / "CamVid"
    for s, split in enumerate(("train", "val", "test")):
        for i in range(3 - s):
            _photo(root / split / f"{split}{i}.{request.param}", seed=10 * s + i)
            _mask(root / f"{split}annot" / f"{split}{i}.png", _label(11, void=11))
    return root


def _write_list(root, split, count, form):
    suffix = next((root / split).iterdir()).suffix
    lines = [
        form.format(f"{split}/{split}{i}{suffix}", f"{split}annot/{split}{i}.png")
        for i in reversed(range(count))
    ]
    (root / f"{split}.txt").write_text("\n".join(lines) + "\n\n")


@pytest.mark.parametrize("form", ["{} {}", "/SegNet/CamVid/{} /SegNet/CamVid/{}", "./{}\t{}"])
def test_camvid_lists(camvid, form):
    _write_list(camvid, "train", 3, form)
    dataset = CamVid(camvid, "train")
    assert [dataset.name(i) for i in range(3)] == ["train2", "train1", "train0"]
    image, label = dataset[0]
    assert image.shape == (6, 8, 3)
    wanted = _label(11, void=IGNORE)
    np.testing.assert_array_equal(label, wanted)


def test_camvid_original_lists_find_reencoded_photographs(camvid):
    _write_list(camvid, "val", 2, "/SegNet/CamVid/{} /SegNet/CamVid/{}")
    text = (camvid / "val.txt").read_text()
    (camvid / "val.txt").write_text(text.replace("1.jpg", "1.png"))
    assert len(CamVid(camvid, "val")) == 2


def test_camvid_folders(camvid):
    for root in (camvid, camvid.parent, str(camvid)):
        assert [len(CamVid(root, split)) for split in ("train", "val", "test")] == [3, 2, 1]
    both = CamVid(camvid, "trainval")
    assert [both.name(i) for i in range(5)] == ["train0", "train1", "train2", "val0", "val1"]
    assert both.num_classes == 11


def test_camvid_problems(camvid, tmp_path):
    with pytest.raises(ValueError, match="one of train, val, test, trainval, but got 'dev'"):
        CamVid(camvid, "dev")
    with pytest.raises(FileNotFoundError, match=r"empty: expected CamVid in SegNet's layout"):
        CamVid(tmp_path / "empty")
    (camvid / "train.txt").write_text("train/train0.png\n")
    with pytest.raises(ValueError, match=r"train.txt: expected 'image label' on every line"):
        CamVid(camvid, "train")
    (camvid / "train.txt").write_text("train/none.png trainannot/none.png\n")
    with pytest.raises(FileNotFoundError, match=r"none.png: expected an existing image \(named by"):
        CamVid(camvid, "train")
    (camvid / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match="the split is empty"):
        CamVid(camvid, "train")
    (camvid / "train.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"train.txt: expected UTF-8 text"):
        CamVid(camvid, "train")
    _mask(camvid / "valannot" / "val0.png", np.full((6, 8), 12))
    with pytest.raises(
        ValueError, match=r"val0.png: .* 0 .. 10 \(sky .. bicyclist\) or 11 or 255 .* got 12 \(48"
    ):
        CamVid(camvid, "val")[0]
    (camvid / "testannot" / "test0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"test0.png: expected an existing label map"):
        CamVid(camvid, "test")


def test_sizes_must_agree(camvid):
    _mask(camvid / "valannot" / "val1.png", _label(11, 6, 7, void=11))
    with pytest.raises(
        ValueError, match=r"val1.png: .* its image .*val1.*, 6 x 8 .* but got 6 x 7. Resize"
    ):
        CamVid(camvid, "val")[1]
    _mask(camvid / "valannot" / "val1.png", _label(11, 8, 6, void=11))
    with pytest.raises(ValueError, match="EXIF orientation"):
        CamVid(camvid, "val")[1]


# --- PASCAL VOC --------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, ids in {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}.items():
        (lists / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for i in ids:
            _photo(root / "JPEGImages" / f"{i}.jpg")
            path = root / "SegmentationClass" / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            save_palette_png(path, _label(21))
    (lists / "test.txt").write_text("2008_000001\n")
    _photo(root / "JPEGImages" / "2008_000001.jpg")
    return root


def test_voc(voc):
    for root in (voc, voc.parent, voc.parent.parent):
        dataset = VOC2012(root, "train")
        assert len(dataset) == 2
    image, label = dataset[1]
    assert dataset.name(1) == "2007_000039"
    assert image.shape == (6, 8, 3)
    np.testing.assert_array_equal(label, _label(21))
    assert dataset.num_classes == 21
    assert tuple(dataset.palette[15]) == (192, 128, 128)


def test_voc_test_split_has_images_only(voc):
    dataset = VOC2012(voc, "test")
    assert not dataset.has_labels
    assert dataset.load_image(0).shape == (6, 8, 3)
    for use in (dataset.load, dataset.load_label):
        with pytest.raises(ValueError, match="VOC2012: expected a split with labels, but 'test'"):
            use(0)
    with pytest.raises(ValueError, match="segmented, not trained on or scored"):
        Augmented(dataset)
    with pytest.raises(ValueError, match="expected a split with labels"):
        class_weights(dataset)


@pytest.mark.parametrize(
    "line", ["2007_000032", "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png"]
)
def test_voc_augmented_annotations(voc, line):
    (voc / "ImageSets" / "Segmentation" / "trainaug.txt").write_text(f"{line}\n")
    path = voc / "SegmentationClassAug" / "2007_000032.png"
    _mask(path, np.full((6, 8), 7))
    assert (VOC2012(voc, "trainaug")[0][1] == 7).all()


def test_voc_problems(voc, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected PASCAL VOC 2012"):
        VOC2012(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"trainval.txt: expected an existing text file"):
        VOC2012(voc, "trainval")
    (voc / "SegmentationClass" / "2007_000033.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2007_000033.png: .*named by .*val.txt"):
        VOC2012(voc, "val")
    Image.open(voc / "SegmentationClass" / "2007_000032.png").convert("RGB").save(
        voc / "SegmentationClass" / "2007_000032.png"
    )
    with pytest.raises(ValueError, match=r"2007_000032.png: .*class indices themselves"):
        VOC2012(voc, "train")[0]


# --- folders -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "classes.txt").write_text("# mine\nground\n\nred car 200 10 20\n  wet road  \n")
    for split in ("train", "val", "raw"):
        for i, suffix in enumerate(("jpg", "png")):
            _photo(tmp_path / "images" / split / f"{i}.{suffix}", 6 + i, 8)
            if split != "raw":
                _mask(tmp_path / "labels" / split / f"{i}.png", _label(3, 6 + i, 8))
    return tmp_path


def test_folder(folder):
    dataset = Folder(folder, "train")
    assert dataset.classes == ("ground", "red car", "wet road")
    assert dataset.palette.tolist() == [[0, 0, 0], [200, 10, 20], [0, 128, 0]]
    assert len(dataset) == 2
    np.testing.assert_array_equal(dataset[1][1], _label(3, 7, 8))
    images, labels = collate([Augmented(dataset)[i] for i in range(2)])
    assert images.shape == (2, 3, 7, 8)
    assert (labels[0, 6] == IGNORE).all()


def test_folder_without_labels(folder):
    dataset = Folder(folder, "raw")
    assert not dataset.has_labels
    assert dataset.load_image(1).shape == (7, 8, 3)
    with pytest.raises(ValueError, match=r"'raw' has none. Put its label maps into .*labels/raw"):
        dataset[0]


def test_folder_problems(folder):
    with pytest.raises(FileNotFoundError, match=r"images/test: .*Splits found: raw, train, val"):
        Folder(folder, "test")
    (folder / "labels" / "val" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels/val/0.png: expected an existing label"):
        Folder(folder, "val")
    for text, message in {
        "": "expected 1 to 255 class names, one per line, but got 0",
        "a\nb\na 1 2 3\n": "expected each class once, but got 'a' twice",
        "a 1 2 256\n": "expected colours in 0 .. 255, but got 'a 1 2 256'",
        "\n".join(f"c{i}" for i in range(256)): "but got 256",
    }.items():
        (folder / "classes.txt").write_text(text)
        with pytest.raises(ValueError, match=rf"classes.txt: {message}|classes.txt: .*{message}"):
            Folder(folder, "train")
    (folder / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes.txt: expected an existing text file"):
        Folder(folder, "train")
    with pytest.raises(FileNotFoundError, match="no such"):
        Folder(folder / "nowhere")


# --- registry and statistics -------------------------------------------------------------------


def test_registry(folder, voc, tmp_path):
    assert {"shapes", "camvid", "voc", "folder"} <= set(DATASETS)
    assert isinstance(open_dataset("shapes"), Shapes)
    assert len(open_dataset("shapes", split="val", length=3)) == 3
    assert isinstance(open_dataset("folder", folder, "val"), Folder)
    assert isinstance(open_dataset("voc", str(voc), "val"), VOC2012)
    with pytest.raises(ValueError, match=r"one of shapes, .*voc.*, but got 'coco'"):
        open_dataset("coco", folder)
    with pytest.raises(ValueError, match=r"expected root, the folder of dataset 'camvid'"):
        open_dataset("camvid")
    with pytest.raises(ValueError, match="expected no root for 'shapes'"):
        open_dataset("shapes", folder)


def test_class_weights_are_median_frequency(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\nc\nnever\n")
    # a: 8 pixels of 2 images (20 pixels), b: 4 of 1 image (10), c: 6 of 1 image (10); void: 2.
    first = np.array([[0] * 4 + [1] * 4 + [255] * 2], np.uint8)
    second = np.array([[0] * 4 + [2] * 6], np.uint8)
    for i, label in enumerate((first, second)):
        _photo(tmp_path / "images" / "train" / f"{i}.png", 1, 10)
        _mask(tmp_path / "labels" / "train" / f"{i}.png", label)
    dataset = Folder(tmp_path, "train")
    counts = count_pixels(dataset)
    assert counts.pixels.tolist() == [8, 4, 6, 0]
    assert counts.images.tolist() == [2, 1, 1, 0]
    assert counts.image_pixels.tolist() == [20, 10, 10, 0]
    assert counts.void == 2
    weights = class_weights(dataset)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.4 / 0.6, 1.0]))
    with pytest.raises(ValueError, match="expected kind to be 'median', but got 'mean'"):
        class_weights(dataset, "mean")
    _mask(tmp_path / "labels" / "train" / "0.png", np.full((1, 10), 255))
    _mask(tmp_path / "labels" / "train" / "1.png", np.full((1, 10), 255))
    with pytest.raises(ValueError, match="every pixel is void"):
        class_weights(dataset)


# --- real data ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_camvid(data_root):
    root = data_root / "camvid"
    if not root.is_dir():
        pytest.skip(f"no CamVid: {root} does not exist")
    return root


@pytest.mark.data
def test_camvid_has_the_published_split(real_camvid):
    counts = {split: len(CamVid(real_camvid, split)) for split in CamVid.splits}
    assert counts == {"train": 367, "val": 101, "test": 233, "trainval": 468}
    names = set()
    for split in ("train", "val", "test"):
        dataset = CamVid(real_camvid, split)
        names |= {dataset.name(i) for i in range(len(dataset))}
        for index in (0, len(dataset) // 2, -1):
            image, label = dataset[index]
            assert image.shape == (360, 480, 3)
            assert label.shape == (360, 480)
            assert set(np.unique(label)) <= {*range(11), IGNORE}
    assert len(names) == 701


@pytest.mark.data
def test_camvid_class_counts_and_weights(real_camvid):
    dataset = CamVid(real_camvid, "train")
    counts = count_pixels(dataset)
    assert counts.pixels.tolist() == [
        10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877, 405385,
        184967,
    ]  # fmt: skip
    assert counts.images.tolist() == [366, 365, 366, 367, 349, 319, 351, 173, 360, 317, 201]
    assert counts.void == 2503995
    frequencies = counts.frequencies
    expected = [
        0.2793, 0.2017, 4.7865, 0.1490, 1.0, 0.4217, 3.8467, 1.9736, 0.7889, 6.3747, 8.8587,
    ]  # fmt: skip
    np.testing.assert_allclose(np.median(frequencies) / frequencies, expected, atol=6e-5)


@pytest.mark.data
def test_camvid_labels_lie_on_the_photographs(real_camvid):
    # Sky is above the road and brighter than it: a shifted or mirrored pairing would show.
    dataset = CamVid(real_camvid, "test")
    image, label = dataset[100]
    rows = [np.nonzero(label == c)[0].mean() for c in (0, 3)]
    assert rows[0] < rows[1]
    assert image[label == 0].mean() > image[label == 3].mean()
