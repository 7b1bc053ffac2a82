# SPDX-License-Identifier: Apache-2.0
import importlib
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from dilseg import models
from dilseg.data import (
    VOC2012,
    Cityscapes,
    Shapes,
    image_to_tensor,
    overlay,
    read_image,
    read_label,
    save_image,
    voc_palette,
)
from dilseg.engine import configure, evaluate, load_model, predict, train
from dilseg.engine.checkpoint import DataSpec, ModelSpec, save_checkpoint
from dilseg.engine.evaluate import check_inference
from dilseg.engine.memory import available, explain_memory, least_bytes
from dilseg.engine.predict import find_images

PIL = pytest.importorskip("PIL.Image", reason="needs Pillow")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(
        configure(
            data="shapes", model="fcn32s", limit=4, eval_every=0, steps=10, batch_size=2, lr=0.01,
            out=str(folder), device="cpu",
        )
    )  # fmt: skip
    return folder / "best.pt"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, size in enumerate([(40, 56), (33, 17), (96, 96)]):
        save_image(folder / f"p{index}.png", Shapes("val", size=size).load_image(index))
    return folder


def test_label_map_and_overlay_of_each_image(checkpoint, photos, tmp_path):
    out = tmp_path / "out" / "deeper"
    assert predict(checkpoint, [photos], out, device="cpu", alpha=0.3) == []
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"p{i}{end}.png" for i in range(3) for end in ("", "_overlay")
    )
    model, _, spec, _ = load_model(checkpoint)
    for index in range(3):
        image = read_image(photos / f"p{index}.png")
        with torch.no_grad():
            logits = model.segment(image_to_tensor(image, spec.mean, spec.std)[None])
        ids = read_label(out / f"p{index}.png", 7)
        assert np.array_equal(ids, logits.argmax(1)[0].numpy())
        expected = overlay(image, ids, spec.palette_array, 0.3)
        assert np.array_equal(read_image(out / f"p{index}_overlay.png"), expected)


def test_confidence_is_written_when_asked_for(checkpoint, photos, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert predict(checkpoint, [photos], plain, device="cpu") == []
    assert predict(checkpoint, [photos], out, device="cpu", confidence=True) == []
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"p{i}{end}.png" for i in range(3) for end in ("", "_overlay", "_confidence")
    )
    for file in plain.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    model, _, spec, _ = load_model(checkpoint)
    for index in range(3):
        image = read_image(photos / f"p{index}.png")
        with torch.no_grad():
            logits = model.segment(image_to_tensor(image, spec.mean, spec.std)[None])
        share = logits.softmax(1).amax(1)[0].numpy()
        with PIL.open(out / f"p{index}_confidence.png") as picture:
            assert picture.mode == "L"
            grey = np.asarray(picture).astype(float)
        assert grey.shape == image.shape[:2]
        assert abs(grey - 255 * share).max() <= 0.5 + 1e-3
        assert grey.min() >= 255 / 7 - 1  # the largest of seven probabilities


def test_a_confidence_and_another_result_of_one_name_are_refused(checkpoint, photos, tmp_path):
    (photos / "p1.png").rename(photos / "p0_confidence.png")
    assert predict(checkpoint, [photos], tmp_path / "plain", device="cpu") == []
    with pytest.raises(ValueError, match=r"both have a result named p0_confidence\.png"):
        predict(checkpoint, [photos], tmp_path / "out", device="cpu", confidence=True)
    assert not (tmp_path / "out").exists()
    (photos / "p0.png").rename(photos / "p0.jpg")
    (photos / "p0_confidence.png").rename(tmp_path / "p0_confidence.png")
    inputs = [photos / "p0.jpg", tmp_path / "p0_confidence.png"]
    with pytest.raises(ValueError, match=r"p0_confidence\.png: is an input that a result would"):
        predict(checkpoint, inputs, tmp_path, device="cpu", confidence=True)


def test_a_bad_image_is_named_and_the_others_are_done(checkpoint, photos, tmp_path):
    (photos / "p1.png").write_bytes((photos / "p1.png").read_bytes()[:60])
    (photos / "p3.png").write_text("not a picture")
    header = struct.pack(">4sIIBBBBB", b"IHDR", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb += struct.pack(">I4s", 100, b"IDAT")
    (photos / "p4.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)
    failures = predict(checkpoint, [photos], tmp_path / "out", device="cpu", batch_size=2)
    assert len(failures) == 3
    for failure, name in zip(failures, ("p1.png", "p3.png", "p4.png"), strict=True):
        assert str(photos / name) in failure
    assert "2500000000 pixels" in failures[2]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "p0.png", "p0_overlay.png", "p2.png", "p2_overlay.png",
    ]  # fmt: skip


def test_inputs_are_files_folders_and_patterns(photos):
    files = [photos / f"p{i}.png" for i in range(3)]
    assert list(find_images([photos])) == files
    assert list(find_images([str(photos / "p[02].png")])) == [files[0], files[2]]
    assert list(find_images([files[1], photos])) == [files[1], files[0], files[2]]
    (photos / "notes.txt").write_text("no picture")
    assert list(find_images([photos])) == files


def test_inputs_that_match_nothing(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    for given, text in (
        (tmp_path / "empty", "no image files in this folder"),
        (photos / "*.bmp", "no such file, folder or match"),
        (photos / "missing.png", "no such file, folder or match"),
    ):
        with pytest.raises(FileNotFoundError, match=text):
            find_images([given])


def test_two_images_of_one_name_are_refused(photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "p0.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"p0\.png and .*p0\.jpg: both would be written as p0\.png"
    ):
        find_images([photos, other])


def test_an_input_is_never_replaced(checkpoint, photos):
    before = (photos / "p0.png").read_bytes()
    with pytest.raises(ValueError, match=r"p0\.png: is an input that a result would replace"):
        predict(checkpoint, [photos / "p0.png"], photos, device="cpu")
    assert (photos / "p0.png").read_bytes() == before


def test_an_overlay_and_a_label_map_of_one_name_are_refused(checkpoint, photos, tmp_path):
    (photos / "p1.png").rename(photos / "p0_overlay.png")
    with pytest.raises(ValueError, match=r"both have a result named p0_overlay\.png"):
        predict(checkpoint, [photos], tmp_path / "out", device="cpu")


def test_opacity_out_of_range(checkpoint, photos, tmp_path):
    with pytest.raises(ValueError, match=r"--alpha: expected a number in \[0, 1\], but got 2"):
        predict(checkpoint, [photos], tmp_path, alpha=2.0)


@pytest.fixture(scope="module")
def dilated(tmp_path_factory):
    """A checkpoint of a DilatedNet whose classes all win somewhere."""
    spec = ModelSpec("dilatednet", 7, {"backbone": "demo"})
    model = spec.build().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=(2 / max(1, parameter[0].numel())) ** 0.5)
        model.context.ctx_final.bias -= model.segment(torch.randn(1, 3, 64, 64)).mean((0, 2, 3))
    path = tmp_path_factory.mktemp("dilated") / "net.pt"
    colours = tuple(tuple(int(v) for v in row) for row in Shapes.palette)
    data = DataSpec("shapes", Shapes.classes, colours, (0.5,) * 3, (0.25,) * 3)
    save_checkpoint(path, model=model, model_spec=spec, data_spec=data)
    return path


def label_maps(folder):
    return {path.name: read_label(path, 7) for path in sorted(folder.glob("*.png"))}


def shares_of(path):
    with np.load(path) as content:
        assert set(content) == {"probabilities", "classes"}
        assert tuple(content["classes"]) == Shapes.classes
        return content["probabilities"]


@pytest.mark.parametrize("anchor", ["centre", "corner"])
def test_probabilities_of_every_class(dilated, photos, tmp_path, anchor):
    options = {"device": "cpu", "overlay": False, "probabilities": True, "anchor": anchor}
    assert predict(dilated, [photos], tmp_path, **options) == []
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(
        f"p{i}{end}" for i in range(3) for end in (".png", "_probabilities.npz")
    )
    model, _, spec, _ = load_model(dilated)
    for index in range(3):
        image = read_image(photos / f"p{index}.png")
        shares = shares_of(tmp_path / f"p{index}_probabilities.npz")
        assert (shares.dtype, shares.shape) == (np.float16, (7, *image.shape[:2]))
        tensor = image_to_tensor(image, spec.mean, spec.std)[None]
        with torch.no_grad():
            scores = model.scores(tensor, anchor=anchor)
            expected = scores.probabilities()[0].numpy()
        assert abs(shares - expected).max() < 1e-3
        ids = read_label(tmp_path / f"p{index}.png", 7)
        assert np.array_equal(ids, scores.labels()[0].numpy())
    assert len(np.unique(ids)) > 2


def test_tiles_and_batches_give_the_same_label_maps(dilated, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = [(24, 32)] * 2 + [(17, 9), (24, 32)]
    for index, size in enumerate(sizes):
        save_image(folder / f"{index}.png", Shapes("val", size=size).load_image(index))
    options = {"device": "cpu", "overlay": False}
    assert predict(dilated, [folder], tmp_path / "one", **options) == []
    expected = label_maps(tmp_path / "one")
    assert [found.shape for found in expected.values()] == sizes
    for name, more in {
        "batch": {"batch_size": 2},
        "both": {"batch_size": 3, "tile": 16},
    }.items():
        assert predict(dilated, [folder], tmp_path / name, **options, **more) == []
        for file, labels in label_maps(tmp_path / name).items():
            # The order of sums may differ: a pixel between two classes may go either way.
            assert (labels != expected[file]).mean() < 1e-3, (name, file)


def test_one_of_a_batch_may_fail(dilated, photos, tmp_path, monkeypatch):
    module = importlib.import_module("dilseg.engine.predict")
    for index in range(3):
        save_image(photos / f"p{index}.png", np.full((16, 16, 3), 80 * index, np.uint8))
    whole = module.infer

    def fails_on_the_brightest(model, images, **options):
        if images.amax() > 0:
            raise RuntimeError("no room\nfor it")
        return whole(model, images, **options)

    monkeypatch.setattr(module, "infer", fails_on_the_brightest)
    failures = predict(dilated, [photos], tmp_path, device="cpu", batch_size=3)
    assert failures == [f"{photos / 'p2.png'}: no room\nfor it"]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "p0.png", "p0_overlay.png", "p1.png", "p1_overlay.png",
    ]  # fmt: skip


def test_an_image_too_large_for_the_memory_is_named(dilated, photos, tmp_path, monkeypatch):
    model = load_model(dilated)[0]
    small, large = torch.empty(1, 3, 33, 17), torch.empty(1, 3, 96, 96)
    # A 3 x 3 convolution to 16 channels on the image with its margin, and a pooling.
    limit = 4 * 16 * (181 * 165 + 91 * 83)
    assert least_bytes(model, small, tile=None, item=4) == limit
    monkeypatch.setattr("dilseg.engine.memory.available", lambda: limit)
    failures = predict(dilated, [photos], tmp_path, device="cpu")
    assert len(failures) == 2
    for failure, name, size in zip(
        failures, ("p0.png", "p2.png"), ("40 x 56", "96 x 96"), strict=True
    ):
        assert failure.startswith(f"{photos / name}: not enough memory on cpu for an image of")
        assert f"{size} pixels" in failure
        assert "--tile" in failure
    assert (tmp_path / "p1.png").is_file()
    with (
        pytest.raises(RuntimeError, match="not enough memory on cpu for an image of 96 x 96"),
        explain_memory(model, large, tile=32, item=4),
    ):
        pytest.fail("it should not be tried")
    with explain_memory(model, large, tile=16, item=4):  # so much fits
        pass


def test_memory_that_is_left_is_known_on_linux():
    assert available() > 2**20


def test_an_allocation_that_fails_is_explained():
    model, images = models.fcn8s(2, "demo"), torch.empty(1, 3, 5, 7)
    for error in (RuntimeError("you can't allocate memory: 12"), torch.OutOfMemoryError()):
        with (
            pytest.raises(RuntimeError, match="not enough memory on cpu for an image of 5 x 7 pix"),
            explain_memory(model, images, tile=None, item=4),
        ):
            raise error
    with (
        pytest.raises(RuntimeError, match="other"),
        explain_memory(model, images, tile=None, item=4),
    ):
        raise RuntimeError("other")


def test_two_processes_share_the_images(checkpoint, photos, tmp_path):
    """The same files as from one process; each image, also one that fails, is taken once."""
    (photos / "p3.png").write_text("not a picture")
    assert len(predict(checkpoint, [photos], tmp_path / "one", device="cpu")) == 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["predict", "--checkpoint", checkpoint, "--input", photos, "--out", tmp_path / "two"]
    done = subprocess.run(
        [*torchrun, "-m", "dilseg", *map(str, command), "--device", "cpu"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0  # one image failed
    assert done.stdout.count("3 of 4 images segmented") == 1
    assert sum(str(photos / "p3.png") in line for line in done.stderr.splitlines()) == 1
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert len(files) == 6
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == files


def test_frames_of_a_video_come_in_order(photos, tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    names = ["f1.png", "f2.png", "f10.png", "f100.png", "fx.png", "f1.jpg", "g1.png"]
    for name in names:
        (frames / name).write_bytes(b"")
    assert [p.name for p in find_images([frames / "f%d.png"])] == names[:4]
    assert [p.name for p in find_images([frames / "f%02d.png"])] == ["f10.png", "f100.png"]
    assert [p.name for p in find_images([frames / "f*.png"])] == names[:5]
    with pytest.raises(FileNotFoundError, match=r"f%04d\.png: there is no such file"):
        find_images([frames / "f%04d.png"])


def test_folders_inside_a_folder_keep_their_places(checkpoint, photos, tmp_path):
    for name in ("day/a", "night/a", ".hidden/a"):
        (photos / name).parent.mkdir()
        (photos / f"{name}.png").write_bytes((photos / "p0.png").read_bytes())
    assert len(find_images([photos])) == 3
    out = tmp_path / "out"
    options = {"device": "cpu", "overlay": False, "recursive": True}
    assert predict(checkpoint, [photos], out, **options) == []
    made = sorted(str(p.relative_to(out)) for p in out.rglob("*.png"))
    assert made == ["day/a.png", "night/a.png", "p0.png", "p1.png", "p2.png"]
    assert (out / "day/a.png").read_bytes() == (out / "p0.png").read_bytes()


def folder_dataset(root, classes, images=("a",)):
    """A data set without labels."""
    folder = root / "images" / "test"
    folder.mkdir(parents=True)
    for index, name in enumerate(images):
        save_image(folder / f"{name}.png", Shapes("val", size=(24, 24)).load_image(index))
    (root / "classes.txt").write_text("\n".join(classes))
    return folder


def test_the_images_of_a_data_set_need_no_labels(checkpoint, tmp_path):
    folder = folder_dataset(tmp_path / "data", Shapes.classes, images=("a", "b", "c"))
    options = {"device": "cpu", "data": "folder", "root": str(tmp_path / "data"), "split": "test"}
    assert predict(checkpoint, None, tmp_path / "out", **options) == []
    assert predict(checkpoint, [folder], tmp_path / "files", device="cpu") == []
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == sorted(
        p.name for p in (tmp_path / "out").iterdir()
    )
    for file in (tmp_path / "files").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert predict(checkpoint, None, tmp_path / "two", **options, limit=2) == []
    assert sorted(label_maps_named(tmp_path / "two")) == ["a", "c"]
    before = (folder / "a.png").read_bytes()
    with pytest.raises(ValueError, match=r"a\.png: is an input that a result would replace"):
        predict(checkpoint, None, folder, **options)
    assert (folder / "a.png").read_bytes() == before
    (folder / "b.png").write_bytes(b"nothing")
    (failure,) = predict(checkpoint, None, tmp_path / "out", **options)
    assert str(folder / "b.png") in failure


def label_maps_named(folder):
    return [p.stem for p in folder.glob("*.png") if not p.stem.endswith("_overlay")]


def test_without_input_the_data_of_the_training(checkpoint, tmp_path):
    assert predict(checkpoint, None, tmp_path, device="cpu", limit=2) == []
    assert sorted(label_maps_named(tmp_path)) == ["val_00000", "val_00199"]


def net_of(folder, dataset):
    """A checkpoint of an untrained network of a data set's classes, which do not always tie."""
    spec = ModelSpec("frontend", len(dataset.classes), {"backbone": "demo"})
    colours = tuple(tuple(int(v) for v in row) for row in dataset.palette)
    data = DataSpec("x", tuple(dataset.classes), colours, (0.5,) * 3, (0.25,) * 3)
    path = folder / f"{dataset.__name__}.pt"
    save_checkpoint(path, model=spec.build(), model_spec=spec, data_spec=data)
    return path


def test_submission_to_the_server_of_voc(tmp_path):
    voc = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for name in ("2008_000006", "2008_000011"):
        PIL.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(
            voc / "JPEGImages" / f"{name}.jpg"
        )
    (voc / "ImageSets/Segmentation/test.txt").write_text("2008_000006\n2008_000011\n")
    net, out = net_of(tmp_path, VOC2012), tmp_path / "out"
    options = {"device": "cpu", "data": "voc", "root": str(voc), "split": "test"}
    assert predict(net, None, out, **options, submission="voc2012-comp6") == []
    made = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    place = Path("results/VOC2012/Segmentation/comp6_test_cls")
    assert made == [place / "2008_000006.png", place / "2008_000011.png"]
    with PIL.open(out / made[0]) as picture:
        assert (picture.mode, picture.size) == ("P", (30, 20))
        assert picture.getpalette()[:768] == voc_palette().ravel().tolist()
    assert predict(net, None, tmp_path / "plain", **options, overlay=False) == []
    same = read_label(tmp_path / "plain" / made[0].name, 21)
    assert np.array_equal(read_label(out / made[0], 21), same)


def test_submission_to_the_server_of_cityscapes(tmp_path):
    name = "berlin_000000_000019"
    folder = tmp_path / "leftImg8bit" / "test" / "berlin"
    folder.mkdir(parents=True)
    save_image(folder / f"{name}_leftImg8bit.png", Shapes("val", size=(24, 32)).load_image(0))
    net = net_of(tmp_path, Cityscapes)
    options = {"device": "cpu", "data": "cityscapes", "root": str(tmp_path), "split": "test"}
    assert predict(net, None, tmp_path / "out", **options, submission="cityscapes") == []
    assert predict(net, None, tmp_path / "plain", **options, overlay=False) == []
    ids = read_label(tmp_path / "plain" / f"{name}.png", 19)
    with PIL.open(tmp_path / "out" / f"{name}.png") as picture:
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), Cityscapes.label_ids(ids))
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"{name}.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"submission": "coco"}, "--submission: expected voc2012-comp5, .* but got coco"),
        ({"submission": "voc2012-comp5"}, r"network of its 21 classes .* but this one has 7 "),
        ({"submission": "cityscapes", "confidence": True}, "--submission: goes without"),
        ({"data": "shapes"}, "--input: goes without --data"),
        ({"inputs": None, "recursive": True}, "--recursive: goes with --input"),
        ({"batch_size": 0}, "--batch-size: expected a number of images >= 1, but got 0"),
        ({"tile": 12}, "--tile: expected a positive multiple of 8, but got 12"),
        ({"anchor": "middle"}, "--anchor: expected centre or corner, but got middle"),
    ],
)
def test_options_that_do_not_go_together(dilated, photos, tmp_path, options, message):
    inputs = options.pop("inputs", [photos])
    with pytest.raises(ValueError, match=message):
        predict(dilated, inputs, tmp_path / "out", device="cpu", **options)
    assert not (tmp_path / "out").exists()


def test_the_net_of_cityscapes_has_an_upsampling_of_its_own():
    net = models.dilatednet(2, "demo", border="zero")
    check_inference(net, tile=8, anchor="centre")
    with pytest.raises(ValueError, match="--anchor corner: this network upsamples by its own"):
        check_inference(net, tile=None, anchor="corner")
    with pytest.raises(ValueError, match="border 'clamp' and origin"):
        net.scores(torch.zeros(1, 3, 8, 8), anchor="corner")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 64}, "--tile: expected a DilatedNet .* but got FCN, whose layers would see"),
        ({"anchor": "corner"}, "--anchor corner: expected a DilatedNet .* but got FCN"),
    ],
)
def test_an_fcn_runs_on_whole_images(checkpoint, photos, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        predict(checkpoint, [photos], tmp_path / "out", device="cpu", **options)
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, device="cpu", limit=1, **options)
