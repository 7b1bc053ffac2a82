# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from dilseg.data import Shapes, image_to_tensor, overlay, read_image, read_label, save_image
from dilseg.engine import configure, load_model, predict, train
from dilseg.engine.predict import find_images

PIL = pytest.importorskip("PIL.Image", reason="needs Pillow")


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
    failures = predict(checkpoint, [photos], tmp_path / "out", device="cpu")
    assert len(failures) == 2
    for failure, name in zip(failures, ("p1.png", "p3.png"), strict=True):
        assert str(photos / name) in failure
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "p0.png", "p0_overlay.png", "p2.png", "p2_overlay.png",
    ]  # fmt: skip


def test_inputs_are_files_folders_and_patterns(photos):
    files = [photos / f"p{i}.png" for i in range(3)]
    assert find_images([photos]) == files
    assert find_images([str(photos / "p[02].png")]) == [files[0], files[2]]
    assert find_images([files[1], photos]) == [files[1], files[0], files[2]]
    (photos / "notes.txt").write_text("no picture")
    assert find_images([photos]) == files


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
