# SPDX-License-Identifier: Apache-2.0
import json
import os

import numpy as np
import pytest
import torch

from dilseg.data import Shapes, image_to_tensor, read_label
from dilseg.engine import (
    ConfusionMatrix,
    Processes,
    configure,
    evaluate,
    evaluate_model,
    load_model,
    segment,
    train,
)
from dilseg.engine.checkpoint import ModelSpec
from dilseg.engine.evaluate import autocast
from dilseg.engine.samples import Part

CPU = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(
        configure(
            data="shapes", model="fcn16s", limit=4, eval_limit=2, steps=30, batch_size=2, lr=0.01,
            out=str(folder), device="cpu",
        )
    )  # fmt: skip
    return folder / "best.pt"


def by_hand(checkpoint, dataset):
    """Scores from the definitions: each image alone, in its own size."""
    model, _, spec, _ = load_model(checkpoint)
    matrix = ConfusionMatrix(dataset.num_classes)
    for index in range(len(dataset)):
        image, label = dataset.load(index)
        with torch.no_grad():
            logits = model.segment(image_to_tensor(image, spec.mean, spec.std)[None])
        matrix.update(logits.argmax(1)[0], torch.from_numpy(label))
    return matrix


def test_equals_scoring_by_hand(checkpoint, tmp_path):
    out = tmp_path / "deep" / "scores.json"
    result = evaluate(checkpoint, split="test", limit=20, out=out, device="cpu")
    matrix = by_hand(checkpoint, Part(Shapes("test"), 20))
    assert result["confusion"] == matrix.counts.tolist()
    assert result["scores"] == matrix.scores()
    written = json.loads(out.read_text())
    assert written["scores"] == result["scores"]
    assert written["images"] == 20
    assert [row["class"] for row in written["classes"]] == list(Shapes.classes)
    assert written["model"]["name"] == "fcn16s"
    assert written["environment"]["torch"] == torch.__version__


def test_defaults_come_from_the_checkpoint(checkpoint, capsys):
    result = evaluate(checkpoint, limit=2)
    assert (result["data"], result["split"], result["images"]) == ("shapes", "val", 2)
    assert (checkpoint.parent / "eval-val.json").is_file()
    out = capsys.readouterr().out
    assert "mean IoU" in out
    assert all(name in out for name in Shapes.classes)


def test_label_maps_are_written(checkpoint, tmp_path):
    pytest.importorskip("PIL", reason="needs Pillow")
    folder = tmp_path / "maps"
    result = evaluate(
        checkpoint, limit=3, out=tmp_path / "x.json", predictions=folder, device="cpu"
    )
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == ["val_00000.png", "val_00100.png", "val_00199.png"]
    matrix = ConfusionMatrix(7)
    val = Shapes("val")
    for file, index in zip(files, (0, 100, 199), strict=True):
        matrix.update(
            torch.from_numpy(read_label(file, 7)), torch.from_numpy(val.load_label(index))
        )
    assert matrix.counts.tolist() == result["confusion"]


def test_images_of_every_size_are_scored_whole(checkpoint):
    model, _, spec, _ = load_model(checkpoint)
    mean, std = spec.mean, spec.std
    sizes = [(33, 47), (96, 31)]
    total = 0
    for size in sizes:
        dataset = Shapes("val", length=2, size=size)
        matrix = evaluate_model(model, dataset, group=CPU, mean=mean, std=std)
        labelled = sum(int((dataset.load_label(i) != 255).sum()) for i in range(2))
        assert matrix.counts.sum() == labelled
        total += labelled
    assert total > 0


def test_two_processes_see_each_image_once(checkpoint):
    class Two(Processes):
        def sum(self, tensor):
            return tensor

    model, _, spec, _ = load_model(checkpoint)
    dataset = Shapes("val", length=5)
    halves = [
        evaluate_model(model, dataset, group=Two(rank, 2, CPU.device), mean=spec.mean, std=spec.std)
        for rank in range(2)
    ]
    whole = evaluate_model(model, dataset, group=CPU, mean=spec.mean, std=spec.std)
    halves[0].merge(halves[1])
    assert torch.equal(halves[0].counts, whole.counts)


def test_modes_are_put_back(checkpoint):
    model, _, spec, _ = load_model(checkpoint)
    model.train()
    model.score_fr.eval()
    evaluate_model(model, Shapes("val", length=1), group=CPU, mean=spec.mean, std=spec.std)
    assert model.training
    assert model.fc6.training
    assert not model.score_fr.training


def test_workers_change_nothing(checkpoint):
    model, _, spec, _ = load_model(checkpoint)
    dataset = Shapes("val", length=4)
    counts = [
        evaluate_model(
            model, dataset, group=CPU, mean=spec.mean, std=spec.std, workers=workers
        ).counts
        for workers in (0, 2)
    ]
    assert torch.equal(*counts)


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"channels_last": True}])
def test_precision_and_layout_agree_on_most_pixels(checkpoint, options):
    model, _, _, _ = load_model(checkpoint)
    images = torch.randn(2, 3, 40, 56)
    plain, other = segment(model, images), segment(model, images, **options)
    assert plain.dtype == torch.uint8
    assert plain.shape == (2, 40, 56)
    assert (plain == other).float().mean() > 0.95


@pytest.mark.parametrize("options", [{}, {"amp": "bf16"}, {"channels_last": True}])
def test_confidence_is_the_probability_of_the_class(checkpoint, options):
    model, _, _, _ = load_model(checkpoint)
    images = torch.randn(2, 3, 40, 57)
    labels, confidence = segment(model, images, confidence=True, **options)
    assert torch.equal(labels, segment(model, images, **options))
    assert (confidence.dtype, confidence.shape) == (torch.float32, (2, 40, 57))
    with torch.no_grad():
        expected = model.segment(images).softmax(1).amax(1)
    if options:  # half-precision activations, another order of sums
        assert (confidence - expected).abs().mean() < 0.02
    else:
        torch.testing.assert_close(confidence, expected)


def test_batches_and_tiles_change_no_score(tmp_path):
    spec = ModelSpec("dilatednet", 7, {"backbone": "demo"})
    model = spec.build().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=(2 / max(1, parameter[0].numel())) ** 0.5)
        model.context.ctx_final.bias -= model.segment(torch.randn(1, 3, 32, 32)).mean((0, 2, 3))
    sizes = [(16, 24)] * 3 + [(17, 9)]

    class Mixed(Shapes):
        def load(self, index):
            image, label = super().load(index)
            h, w = sizes[index]
            return image[30 : 30 + h, 30 : 30 + w], label[30 : 30 + h, 30 : 30 + w]

    dataset = Mixed("val", length=4)
    seen = []

    def keep(index, labels):
        seen.append((index, labels.shape))

    def counts(**options):
        return evaluate_model(
            model, dataset, group=CPU, mean=(0.5,) * 3, std=(0.25,) * 3, on_prediction=keep,
            **options,
        ).counts  # fmt: skip

    whole = counts()
    assert whole.sum() > 0
    # The order of sums may differ: a pixel between two classes may go either way.
    assert (counts(batch_size=2, tile=16) - whole).abs().sum() <= 4
    assert seen == list(enumerate(sizes)) * 2
    corner = counts(anchor="corner")
    expected = ConfusionMatrix(7)
    for index in range(4):
        image, label = dataset.load(index)
        tensor = image_to_tensor(image, (0.5,) * 3, (0.25,) * 3)[None]
        expected.update(segment(model, tensor, anchor="corner")[0], torch.from_numpy(label))
    assert torch.equal(corner, expected.counts)
    assert (whole.sum(0) > 0).sum() > 2
    assert not torch.equal(corner, whole)


def test_other_classes_are_refused(checkpoint, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    for kind, shape in (("images", (9, 9, 3)), ("labels", (9, 9))):
        folder = tmp_path / kind / "val"
        folder.mkdir(parents=True)
        image.fromarray(np.zeros(shape, np.uint8)).save(folder / "0.png")
    names = list(Shapes.classes)
    for classes, text in (
        (names[:3], "trained on 7 classes .shapes., but the data has 3"),
        (
            [*names[:2], "hexagon", *names[3:]],
            "its class 2 is 'square', but the data's is 'hexagon'",
        ),
    ):
        (tmp_path / "classes.txt").write_text("\n".join(classes))
        with pytest.raises(ValueError, match=text):
            evaluate(checkpoint, data="folder", root=str(tmp_path), split="val", device="cpu")


def test_wrong_data_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="open_dataset: expected name"):
        evaluate(checkpoint, data="coco", device="cpu")
    with pytest.raises(ValueError, match="expected split"):
        evaluate(checkpoint, split="holdout", device="cpu")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        evaluate(tmp_path / "none.pt")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_bfloat16_on_a_cpu_keeps_onednn_from_amx(monkeypatch):
    """Its convolutions for AMX corrupt the heap in torch 2.13; another choice is the user's."""
    name = "ONEDNN_MAX_CPU_ISA"
    monkeypatch.delenv(name, raising=False)
    for device, amp in (("cpu", "off"), ("cuda", "bf16")):
        autocast(torch.device(device), amp)
        assert name not in os.environ
    monkeypatch.setenv(name, "AVX2")
    autocast(torch.device("cpu"), "bf16")
    assert os.environ[name] == "AVX2"
    monkeypatch.delenv(name)
    autocast(torch.device("cpu"), "bf16")
    assert os.environ[name] == "AVX512_CORE_BF16"
