# SPDX-License-Identifier: Apache-2.0
"""The tables of `dilseg eval`, and the conventions of the data sets behind them."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dilseg.data import DATASETS, Cityscapes, PascalContext, SiftFlow
from dilseg.data.base import SegmentationDataset
from dilseg.engine import ConfusionMatrix, evaluate
from dilseg.engine.checkpoint import DataSpec, ModelSpec, save_checkpoint
from dilseg.engine.evaluate import _scores
from dilseg.engine.samples import Part
from dilseg.engine.tables import PUBLISHED, markdown, published

DATASET_PAGES = Path(__file__).resolve().parents[1] / "docs" / "datasets"


def matrix_of(num_classes, absent=()):
    matrix = ConfusionMatrix(num_classes)
    drawn = np.random.default_rng(0).integers(0, 1000, (num_classes, num_classes))
    matrix.counts += torch.from_numpy(drawn)
    matrix.counts[list(absent)] = 0
    return matrix


def without_files(kind):
    """A data set of this class without its files: only what describes its classes."""
    return kind.__new__(kind)


def cityscapes_category_iou(counts, names, members):
    """As cityscapesScripts computes it, from the matrix of classes."""
    inside = [i for i, name in enumerate(names) if name in members]
    outside = [i for i in range(len(names)) if i not in inside]
    tp = sum(counts[i][j] for i in inside for j in inside)
    fn = sum(sum(counts[i]) for i in inside) - tp
    fp = sum(counts[i][j] for i in outside for j in inside)
    return tp / (tp + fp + fn)


def test_categories_of_cityscapes():
    dataset, matrix = without_files(Cityscapes), matrix_of(19)
    result = _scores(matrix, dataset)
    expected = {
        name: cityscapes_category_iou(matrix.counts.tolist(), dataset.classes, members)
        for name, members in dataset.categories.items()
    }
    assert len(expected) == 7
    assert {row["class"]: row["iou"] for row in result["categories"]} == pytest.approx(expected)
    assert result["category_mean_iou"] == pytest.approx(sum(expected.values()) / 7)
    assert result["scores"] == matrix.scores()
    together = [name for members in dataset.categories.values() for name in members]
    assert sorted(together) == sorted(dataset.classes)


@pytest.fixture
def siftflow(tmp_path):
    scenes = "spatial_envelope_256x256_static_8outdoorcategories"
    for folder, end in (("Images", "jpg"), ("SemanticLabels", "mat"), ("GeoLabels", "mat")):
        (tmp_path / folder / scenes).mkdir(parents=True)
        (tmp_path / folder / scenes / f"a.{end}").touch()
    (tmp_path / "test.txt").write_text("a\n")
    return lambda labels: SiftFlow(tmp_path, "test", labels)


def test_siftflow_is_scored_over_the_30_classes_in_the_test_labels(siftflow):
    dataset = siftflow("semantic")
    absent = [8, 10, 15]
    matrix = matrix_of(33, absent)
    first, second = _scores(matrix, Part(dataset, 1))["score_sets"].items()
    present = [i for i in range(33) if i not in absent]
    n = matrix.counts.double().numpy()
    iou = n.diagonal() / (n.sum(0) + n.sum(1) - n.diagonal())
    assert first[0].startswith("30 ")
    assert first[1]["mean_iou"] == pytest.approx(iou[present].mean())
    assert second[0] == "all 33 classes"
    assert second[1]["mean_iou"] == pytest.approx(iou.sum() / 33)
    assert _scores(matrix, dataset)["scores"] == first[1]
    assert list(_scores(matrix_of(3), siftflow("geometric"))["score_sets"]) == ["all 3 classes"]


def test_pascal_context_is_scored_with_and_without_background():
    matrix = matrix_of(60)
    first, second = _scores(matrix, without_files(PascalContext))["score_sets"].values()
    assert first == matrix.scores()
    assert second["mean_iou"] == pytest.approx(matrix.class_iou()[1:].mean().item())
    assert second["mean_accuracy"] == pytest.approx(matrix.class_accuracy()[1:].mean().item())


def evaluation(dataset, matrix, **changes):
    return {
        "checkpoint": "runs/x/best.pt",
        "model": {"name": "fcn16s"},
        "data": "siftflow",
        "split": "test",
        "images": 200,
        **_scores(matrix, dataset),
        **changes,
    }


def rows_of(text):
    """The cells of every row of every table."""
    tables = re.findall(r"(?:^\|.*\|\n?)+", text, re.M)
    return [[line[2:-2].split(" | ") for line in table.splitlines()] for table in tables]


def test_markdown_holds_our_rows_beside_the_published_one(siftflow):
    dataset, matrix = siftflow("semantic"), matrix_of(33, [8])
    result = evaluation(dataset, matrix)
    scores, classes = rows_of(markdown(json.loads(json.dumps(result))))
    assert scores[0] == [
        "network", "means over", "pixel acc.", "mean acc.", "mean IoU", "f.w. IoU",
    ]  # fmt: skip
    assert scores[2][2:] == [f"{100 * value:.2f}" for value in result["scores"].values()]
    assert scores[3][1] == "all 33 classes"
    assert scores[4][0].startswith("published: FCN-16s")
    assert scores[4][2:] == ["85.2", "51.7", "39.5", "76.1"]
    assert [row[0] for row in classes[2:]] == list(dataset.classes)
    assert classes[2 + 8] == ["cow", "0.00", "-", "0.00", "0"]
    assert classes[2 + 1][1] == f"{100 * matrix.class_iou()[1]:.2f}"
    assert {len(row) for row in scores} == {6}


def test_markdown_of_categories_and_of_odd_names():
    dataset, matrix = without_files(Cityscapes), matrix_of(19)
    result = evaluation(dataset, matrix, data="cityscapes", split="val")
    result["model"] = {"name": "dilatednet"}
    scores, _, categories = rows_of(markdown(result))
    assert scores[-1][-2] == "68.7"
    assert [row[0] for row in categories[2:]] == [*dataset.categories, "mean"]
    assert categories[-1][1] == f"{100 * result['category_mean_iou']:.2f}"
    result["classes"][0]["class"] = "a|b"
    assert "| a\\|b |" in markdown(result)


def test_published_rows_are_those_of_the_pages():
    page_of = {"sbd": "sbd", "voc2011": "sbd", "nyud-hha": "nyud", "siftflow-geometric": "siftflow"}
    for row in PUBLISHED:
        assert set(row.data) <= set(DATASETS)
        assert published(row.data[0], row.split, row.model).count(row) == 1
        name = "voc" if row.split == "voc2012val" else row.data[0].removesuffix("-dilatednet")
        text = (DATASET_PAGES / f"{page_of.get(name, name)}.md").read_text(encoding="utf-8")
        for value in filter(None, row[4:]):
            assert re.search(rf"(?<![\d.]){re.escape(str(value))}0*(?![\d.])", text), row


class Flags(SegmentationDataset):
    """Two images of three classes, of which the last is never labelled."""

    split = "test"
    classes = ("red", "green", "blue")
    palette = np.eye(3, dtype=np.uint8)
    score_sets = {"warm ones": ("red",), "all three": classes}  # noqa: RUF012
    categories = {"warm": ("red",), "cold": ("green", "blue")}  # noqa: RUF012

    def __len__(self):
        return 2

    def name(self, index):
        return f"flag{index}"

    def load_image(self, index):
        return np.full((16, 24, 3), 40 * index, np.uint8)

    def load_label(self, index):
        return np.full((16, 24), index, np.uint8)


def test_eval_prints_and_writes_the_conventions_of_the_data(tmp_path, monkeypatch, capsys):
    module = importlib.import_module("dilseg.engine.evaluate")  # the package has it as a function
    monkeypatch.setattr(module, "open_dataset", lambda *_: Flags())
    spec = ModelSpec("fcn32s", 3, {"backbone": "demo"})
    save_checkpoint(
        tmp_path / "flags.pt",
        model=spec.build(),
        model_spec=spec,
        data_spec=DataSpec("flags", Flags.classes, ((1, 0, 0),) * 3, (0.5,) * 3, (0.5,) * 3),
    )
    result = evaluate(tmp_path / "flags.pt", split="test", device="cpu")
    # Zero scores: the first class everywhere.
    assert result["scores"]["mean_iou"] == 0.5
    assert result["score_sets"]["all three"]["mean_iou"] == 0.25
    assert [row["iou"] for row in result["categories"]] == [0.5, 0.0]
    assert result["category_mean_iou"] == 0.25
    written = tmp_path / "eval-test.md"
    assert written.read_text() == markdown(json.loads((tmp_path / "eval-test.json").read_text()))
    out = capsys.readouterr().out
    assert re.search(r"^mean IoU +50\.00 %$", out, re.M)
    assert "mean IoU over all three: 25.00 %" in out
    assert "mean IoU of the 2 categories: 25.00 %" in out
    with pytest.raises(ValueError, match=r"--out: expected a name for the JSON, .* but got x\.md"):
        evaluate(tmp_path / "flags.pt", out="x.md")
