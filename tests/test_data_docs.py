# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/datasets: their commands are understood, their classes those of the code."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from dilseg import cli
from dilseg.data import DATASETS, KITTI, VOC2012, Cityscapes, NYUDv2, PascalContext, SiftFlow
from dilseg.engine import configure

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [*sorted((DOCS / "datasets").glob("*.md")), DOCS / "training.md"]


def commands(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        shlex.split(line, comments=True) for line in re.findall(r"^ {4}(dilseg .*)$", text, re.M)
    ]


COMMANDS = [
    pytest.param(words, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, words in enumerate(commands(page))
    if any(word.startswith("--") for word in words)  # not the table of commands
]


def dataset_class(name):
    opener = DATASETS[name]
    return opener.func if isinstance(opener, partial) else opener


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_understood(words):
    assert words[0] == "dilseg"
    given = vars(cli._parser().parse_args(words[1:]))
    name = given.get("data")
    splits = [given.get(key) for key in ("train_split", "eval_split", "split")]
    if words[1] == "train":
        given = {key: value for key, value in given.items() if key not in ("run", "resume")}
        if "--resume" not in words:
            config = configure(**given)
            splits = [config.train_split, config.eval_split]
            name = config.data
    if name not in (None, "folder"):  # which takes any split
        assert name in DATASETS
        known = dataset_class(name).splits
        assert {split for split in splits if split} <= set(known)


def test_every_dataset_has_a_page_with_a_command():
    index = (DOCS / "datasets" / "README.md").read_text(encoding="utf-8")
    shown = set()
    for page in PAGES[:-1]:
        for words in commands(page):
            if "--data" in words:
                shown.add(words[words.index("--data") + 1])
        assert page.name == "README.md" or f"({page.name})" in index
    assert shown == set(DATASETS) - {"shapes"}
    for name in shown:
        assert f"`{name}`" in index


@pytest.mark.parametrize(
    ("page", "dataset"),
    [
        ("voc", VOC2012),
        ("nyud", NYUDv2),
        ("pascal-context", PascalContext),
        ("cityscapes", Cityscapes),
        ("kitti", KITTI),
    ],
)
def test_pages_list_the_classes(page, dataset):
    text = " ".join((DOCS / "datasets" / f"{page}.md").read_text(encoding="utf-8").split())
    for index, name in enumerate(dataset.classes):
        assert re.search(rf"\b{index} {name}\b", text), f"{index} {name}"


def test_the_siftflow_page_lists_its_classes(tmp_path):
    text = " ".join((DOCS / "datasets" / "siftflow.md").read_text(encoding="utf-8").split())
    for labels, folder in (("semantic", "SemanticLabels"), ("geometric", "GeoLabels")):
        (tmp_path / "Images").mkdir(exist_ok=True)
        (tmp_path / folder).mkdir()
        scenes = "spatial_envelope_256x256_static_8outdoorcategories"
        for name in (f"Images/{scenes}/a.jpg", f"{folder}/{scenes}/a.mat"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "test.txt").write_text("a\n")
        for index, name in enumerate(SiftFlow(tmp_path, "test", labels).classes):
            assert re.search(rf"\b{index} {name}\b", text), f"{index} {name}"
