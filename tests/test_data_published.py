# SPDX-License-Identifier: Apache-2.0
"""The published datasets, each read from files of its true format that the tests write."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dilseg import cli, models
from dilseg.data import (
    DATASETS,
    IGNORE,
    KITTI,
    SBD,
    VOC2011,
    VOC2012,
    Augmented,
    CamVid,
    Cityscapes,
    NYUDv2,
    PascalContext,
    SiftFlow,
    SiftFlowBoth,
    class_weights,
    dataset_classes,
    open_dataset,
    read_label,
    save_palette_png,
)
from dilseg.engine import ConfusionMatrix, SegmentationLoss, load_model

H, W = 6, 8


def photo(path, seed=0, size=(H, W)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def lines(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def mat(path, compressed=True, **variables):
    scipy_io = pytest.importorskip("scipy.io", reason="needs scipy")
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, variables, do_compression=compressed)


def values(*specials, size=(H, W), dtype=np.uint8):
    """A map of zeros that begins with the given values, row by row."""
    flat = np.zeros(size, dtype)
    flat.ravel()[: len(specials)] = specials
    return flat


def head(label, count):
    return label.ravel()[:count].tolist()


# --- VOC 2011 and 2012, SBD --------------------------------------------------------------------

IDS_2011_VAL = ["2007_000033", "2007_000042", "2008_000051"]
IDS_2012 = {"train": ["2007_000032", "2009_000001"], "val": ["2007_000033", "2011_000003"]}
SBD_IDS = {
    "train": ["2008_000051", "2008_000002", "2011_000003", "2007_000032"],
    "val": ["2008_000007", "2007_000033", "2009_000001"],
    "train_noval": ["2008_000002"],
}


def gtcls(path, segmentation, **options):
    """As SBD's annotators saved it: a struct with sparse boundaries in a cell array."""
    sparse = pytest.importorskip("scipy.sparse", reason="needs scipy")
    boundaries = np.empty((20, 1), object)
    for i in range(20):
        boundaries[i, 0] = sparse.csc_matrix((segmentation == i + 1).astype(float))
    present = np.unique(segmentation)[:, None]
    content = {
        "Boundaries": boundaries,
        "Segmentation": segmentation,
        "CategoriesPresent": present,
    }
    mat(path, GTcls=content, **options)


def voc_folder(folder, **splits):
    for split, ids in splits.items():
        lines(folder / "ImageSets" / "Segmentation" / f"{split}.txt", *ids)
        for identity in ids:
            photo(folder / "JPEGImages" / f"{identity}.jpg")
            path = folder / "SegmentationClass" / f"{identity}.png"
            path.parent.mkdir(exist_ok=True)
            save_palette_png(path, values(1, 20, 255))


@pytest.fixture
def pascal(tmp_path):
    devkit = tmp_path / "VOCdevkit"
    voc_folder(devkit / "VOC2012", **IDS_2012)
    voc_folder(tmp_path / "TrainVal" / "VOCdevkit" / "VOC2011", val=IDS_2011_VAL)
    sbd = tmp_path / "benchmark_RELEASE" / "dataset"
    for split, ids in SBD_IDS.items():
        lines(sbd / f"{split}.txt", *ids)
        for i, identity in enumerate(ids):
            photo(sbd / "img" / f"{identity}.jpg")
            gtcls(sbd / "cls" / f"{identity}.mat", values(15, 20, 7), compressed=i % 2 == 0)
    return tmp_path


@pytest.mark.parametrize("root", ["", "benchmark_RELEASE", "benchmark_RELEASE/dataset"])
def test_sbd_splits(pascal, root):
    for split, ids in SBD_IDS.items():
        dataset = SBD(pascal / root, split)
        assert [dataset.name(i) for i in range(len(dataset))] == ids
        for image, label in dataset:
            assert image.shape == (H, W, 3)
            assert label.dtype == np.uint8
            np.testing.assert_array_equal(label, values(15, 20, 7))


def test_sbd_joined_with_voc(pascal):
    dataset = SBD(pascal, "trainaug")
    # VOC's own annotations come first; what VOC 2012's val holds is left out.
    names = [dataset.name(i) for i in range(len(dataset))]
    assert names == [*IDS_2012["train"], "2008_000051", "2008_000002", "2008_000007"]
    assert [head(dataset.load_label(i), 3) for i in (1, 2)] == [[1, 20, IGNORE], [15, 20, 7]]
    assert [SBD(pascal, "voc2012val").name(i) for i in range(2)] == IDS_2012["val"]
    assert not set(names) & set(IDS_2012["val"])


def test_seg11valid_is_voc_2011s_val_without_sbds_train(pascal):
    dataset = SBD(pascal, "seg11valid")
    names = [dataset.name(i) for i in range(len(dataset))]
    assert names == ["2007_000033", "2007_000042"]
    assert "VOC2011" in dataset.files(0).label.parts
    assert head(dataset.load_label(1), 4) == [1, 20, IGNORE, 0]


@pytest.mark.parametrize("year", [2011, 2012])
def test_seg11valid_by_its_list(pascal, year):
    base = pascal / "TrainVal/VOCdevkit" if year == 2011 else pascal / "VOCdevkit"
    listing = base / f"VOC{year}" / "ImageSets" / "Segmentation" / "seg11valid.txt"
    lines(listing, "2007_000033")
    for dataset in (
        SBD(pascal, "seg11valid"),
        {2011: VOC2011, 2012: VOC2012}[year](pascal, "seg11valid"),
    ):
        assert [dataset.name(i) for i in range(len(dataset))] == ["2007_000033"]
        assert f"VOC{year}" in dataset.files(0).label.parts


def test_seg11valid_without_anything_to_work_it_out(pascal):
    (pascal / "TrainVal").rename(pascal / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"seg11valid.txt in VOC2011 or VOC2012, or else"):
        SBD(pascal, "seg11valid")


def test_voc_2011(pascal):
    folder = pascal / "TrainVal" / "VOCdevkit" / "VOC2011"
    for root in (pascal, folder, folder.parent):
        dataset = VOC2011(root, "val")
        assert [dataset.name(i) for i in range(3)] == IDS_2011_VAL
    assert head(dataset[0][1], 3) == [1, 20, IGNORE]
    with pytest.raises(ValueError, match=r"VOC2011: expected split to be one of .* got 'trainaug'"):
        VOC2011(pascal, "trainaug")


def test_another_year_of_voc_is_not_taken(pascal):
    with pytest.raises(FileNotFoundError, match=r"VOC2012: expected PASCAL VOC 2011 \(ImageSets"):
        VOC2011(pascal / "VOCdevkit" / "VOC2012", "val")


def test_sbd_problems(pascal, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected SBD \(img and cls in one of"):
        SBD(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected PASCAL VOC 2012 .*VOCdevkit/VOC2012"):
        SBD(pascal / "benchmark_RELEASE", "trainaug")
    path = pascal / "benchmark_RELEASE/dataset/cls/2008_000051.mat"
    gtcls(path, values(21))
    with pytest.raises(
        ValueError, match=r"2008_000051.mat: expected GTcls.Segmentation in 0 .. 20 .* got 21 \(1 p"
    ):
        SBD(pascal, "train")[0]
    mat(path, GTinst={"Segmentation": values()})
    with pytest.raises(ValueError, match=r"variable 'GTcls' and its .*, but got the variables 'GT"):
        SBD(pascal, "train")[0]
    mat(path, GTcls={"Boundaries": values()})
    with pytest.raises(ValueError, match=r"its field 'Segmentation', but got fields 'Boundaries'"):
        SBD(pascal, "train")[0]
    mat(path, GTcls=values())
    with pytest.raises(ValueError, match=r"but got 'GTcls' that is no 1 x 1 struct"):
        SBD(pascal, "train")[0]
    gtcls(path, values(size=(H, W + 1)))
    with pytest.raises(ValueError, match=r"2008_000051.mat: expected a label map as large as its"):
        SBD(pascal, "train")[0]


# --- NYUDv2 ------------------------------------------------------------------------------------


def depth_map(path, seed=0):
    """A 16-bit depth map in millimetres, with a pixel that was not measured."""
    depth = np.random.default_rng(seed).integers(500, 10000, (H, W)).astype(np.uint16)
    depth[1, 2] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(depth).save(path)
    return depth


@pytest.fixture
def nyud(tmp_path):
    root = tmp_path / "nyud"
    splits = {"train": [5003, 5001], "val": [5002], "test": [5004, 5005, 6449]}
    for split, ids in splits.items():
        lines(root / f"{split}.txt", *ids)
        for identity in ids:
            photo(root / "data/images" / f"img_{identity}.png", identity)
            photo(root / "data/hha" / f"img_{identity}.png", identity + 10000)
            depth_map(root / "data/depth" / f"img_{identity}.png", identity)
            label = values(0, 1, 40, 17, dtype=np.float64)  # as MATLAB saves numbers
            mat(root / "segmentation" / f"img_{identity}.mat", segmentation=label)
    return root


@pytest.mark.parametrize("modality", ["color", "hha"])
def test_nyud_of_the_fcn_release(nyud, modality):
    for root in (nyud, nyud.parent):
        sizes = [len(NYUDv2(root, split, modality)) for split in NYUDv2.splits]
        assert sizes == [2, 1, 3, 3]
    dataset = NYUDv2(nyud, "trainval", modality)
    assert [dataset.name(i) for i in range(3)] == ["img_5003", "img_5001", "img_5002"]
    image, label = dataset[-1]
    offset = 10000 if modality == "hha" else 0  # channels as in the file, for both
    np.testing.assert_array_equal(image, photo(nyud / "again.png", 5002 + offset))
    assert head(label, 5) == [IGNORE, 0, 39, 16, IGNORE]
    lines(nyud / "trainval.txt", 5001)
    assert len(NYUDv2(nyud, "trainval")) == 1


def test_nyud_with_depth_and_hha_behind_the_photograph(nyud):
    color, hha = NYUDv2(nyud, "val"), NYUDv2(nyud, "val", "hha")
    both = NYUDv2(nyud, "val", "rgb-hha")
    image, label = both[0]
    assert (both.channels, image.shape, image.dtype) == (6, (H, W, 6), np.uint8)
    np.testing.assert_array_equal(image[..., :3], color.load_image(0))
    np.testing.assert_array_equal(image[..., 3:], hha.load_image(0))
    np.testing.assert_array_equal(label, color.load_label(0))

    early = NYUDv2(nyud, "val", "rgbd")
    image, label = early[0]
    assert (early.channels, image.shape, image.dtype) == (4, (H, W, 4), np.float32)
    np.testing.assert_array_equal(image[..., :3], color.load_image(0))
    depth = depth_map(nyud / "again.png", 5002).astype(np.float64)
    depth[1, 2] = np.exp(7.844)  # not measured: the mean
    np.testing.assert_allclose(image[..., 3], np.log(depth), rtol=1e-6)

    (nyud / "data/depth/img_5002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"depth/img_5002.png: expected an existing file"):
        NYUDv2(nyud, "val", "rgbd")
    photo(nyud / "data/depth/img_5002.png")
    with pytest.raises(ValueError, match=r"expected a depth map as a 16-bit grey picture.*'RGB'"):
        NYUDv2(nyud, "val", "rgbd").load_image(0)
    Image.fromarray(np.ones((H, W + 1), np.uint16)).save(nyud / "data/depth/img_5002.png")
    with pytest.raises(
        ValueError, match=rf"as large as its photograph, {H} x {W} .* {H} x {W + 1}"
    ):
        NYUDv2(nyud, "val", "rgbd").load_image(0)


def nyu_labelled(path, images, labels, names, depths=None):
    """As MATLAB saves -v7.3: axes reversed, a header before HDF5's, cells as references."""
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    with h5py.File(path, "w", userblock_size=512) as file:
        arrays = {"images": images, "labels": labels, "depths": depths}
        for name, array in arrays.items():
            if array is None:
                continue
            stored = np.ascontiguousarray(array.T)
            chunks = (1, *stored.shape[1:])
            dataset = file.create_dataset(name, data=stored, chunks=chunks, compression="gzip")
            dataset.attrs["MATLAB_class"] = np.bytes_(array.dtype.name)
        cells = file.create_group("#refs#")
        references = file.create_dataset("names", (1, len(names)), h5py.ref_dtype)
        for i, name in enumerate(names):
            text = np.array([[ord(letter)] for letter in name], np.uint16)
            references[0, i] = cells.create_dataset(f"c{i}", data=text).ref
        references.attrs["MATLAB_class"] = np.bytes_("cell")
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM")


LABEL_NAMES = ["book", "wall", "alien", "floor", "bag"]
LABEL_CLASSES = [23, 1, 40, 2, 37]
FRAMES = 5


@pytest.fixture
def nyud_official(tmp_path):
    root = tmp_path / "official"
    root.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (H, W, 3, FRAMES)).astype(np.uint8)
    labels = rng.integers(0, 6, (H, W, FRAMES)).astype(np.uint16)
    nyu_labelled(root / "nyu_depth_v2_labeled.mat", images, labels, LABEL_NAMES)
    mapping = np.array([LABEL_CLASSES], np.float64)
    cells = np.array(LABEL_NAMES, object)[None]
    mat(root / "classMapping40.mat", mapClass=mapping, allClassName=cells)
    train, test = np.array([[2.0], [5.0], [1.0]]), np.array([[3.0], [4.0]])
    mat(root / "splits.mat", trainNdxs=train, testNdxs=test)
    return root, images, labels


def test_nyud_in_the_official_file(nyud_official):
    root, images, labels = nyud_official
    dataset = NYUDv2(root, "trainval")
    assert [dataset.name(i) for i in range(3)] == ["img_5002", "img_5005", "img_5001"]
    table = np.array([IGNORE, *(c - 1 for c in LABEL_CLASSES)], np.uint8)
    for index, frame in enumerate((1, 4, 0)):
        image, label = dataset[index]
        np.testing.assert_array_equal(image, images[..., frame])
        np.testing.assert_array_equal(label, table[labels[..., frame]])
        assert image.dtype == label.dtype == np.uint8
        assert image.flags.c_contiguous
    assert [NYUDv2(root, "test").name(i) for i in range(2)] == ["img_5003", "img_5004"]
    with pytest.raises(IndexError, match=r"NYUDv2 'test': expected an index in \[-2, 2\)"):
        NYUDv2(root, "test")[2]


def test_nyud_depth_in_the_official_file(nyud_official):
    """There it is in metres."""
    root, images, labels = nyud_official
    depths = np.random.default_rng(1).uniform(0.5, 10, (H, W, FRAMES)).astype(np.float32)
    path = root / "nyu_depth_v2_labeled.mat"
    nyu_labelled(path, images, labels, LABEL_NAMES, depths)
    image, _ = NYUDv2(root, "trainval", "rgbd")[0]
    np.testing.assert_array_equal(image[..., :3], images[..., 1])
    np.testing.assert_allclose(image[..., 3], np.log(1000 * depths[..., 1]), rtol=1e-6)
    nyu_labelled(path, images, labels, LABEL_NAMES, depths[..., :3])
    with pytest.raises(ValueError, match=r"labels \(and depths\) for each of its 5 images"):
        NYUDv2(root, "trainval", "rgbd")


def test_nyud_official_with_the_fcn_releases_lists(nyud_official):
    root, _, _ = nyud_official
    with pytest.raises(FileNotFoundError, match=r"train.txt: expected .* split 'trainval'"):
        NYUDv2(root, "train")
    lines(root / "train.txt", 5005, 5001)
    lines(root / "val.txt", 5002)
    assert [NYUDv2(root, "train").name(i) for i in range(2)] == ["img_5005", "img_5001"]
    for bad in (5006, 5000, "x"):
        lines(root / "val.txt", bad)
        with pytest.raises(ValueError, match=r"val.txt: expected frames of the 5 in nyu_depth"):
            NYUDv2(root, "val")


def test_nyud_problems(nyud, nyud_official, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: expected NYUDv2, either as .* found neither"
    ):
        NYUDv2(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"modality to be one of color, hha, .*, but got 'depth'"):
        NYUDv2(nyud, "train", "depth")
    mat(nyud / "segmentation/img_5002.mat", segmentation=values(41))
    with pytest.raises(
        ValueError, match=r"img_5002.mat: expected segmentation in 1 .. 40 .*got 41"
    ):
        NYUDv2(nyud, "val")[0]
    mat(nyud / "segmentation/img_5002.mat", segmentation=values(0.5, dtype=np.float32))
    with pytest.raises(ValueError, match=r"or 0 for void, but got 0.5 \(1 pixels"):
        NYUDv2(nyud, "val")[0]
    (nyud / "data/hha").rename(nyud / "data/elsewhere")
    with pytest.raises(FileNotFoundError, match=r"expected NYUDv2 \(data/hha and segmentation in"):
        NYUDv2(nyud, "val", "hha")

    root, images, labels = nyud_official
    with pytest.raises(ValueError, match=r"layout \(data/hha, segmentation\) for modality 'hha'"):
        NYUDv2(root, "test", "hha")
    mat(root / "classMapping40.mat", mapClass=np.array([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"class for each of the 5 labels of nyu_.*, but got 3"):
        NYUDv2(root, "test")
    mat(root / "classMapping40.mat", mapClass=np.array([[1, 2, 3, 4, 41]]))
    with pytest.raises(ValueError, match=r"mapClass with classes in 1 .. 40, but got 1 .. 41"):
        NYUDv2(root, "test")
    mat(root / "classMapping40.mat", mapClass=np.array([LABEL_CLASSES]))
    mat(root / "splits.mat", trainNdxs=np.array([[6]]), testNdxs=np.array([[1.5]]))
    for split, number in (("trainval", 6), ("test", 0)):
        with pytest.raises(ValueError, match=rf"frames of the 5 in nyu.*, but got number {number}"):
            NYUDv2(root, split)
    mat(root / "splits.mat", testNdxs=np.array([[1]]))
    path = root / "nyu_depth_v2_labeled.mat"
    labels[2, 3, 0] = 6
    nyu_labelled(path, images, labels, LABEL_NAMES)
    with pytest.raises(
        ValueError, match=r"frame 1: expected labels in 0 .. 5, .* got 6 \(1 .* row 2, column 3\)"
    ):
        NYUDv2(root, "test")[0]
    nyu_labelled(path, images, labels[..., :3], LABEL_NAMES)
    with pytest.raises(ValueError, match=r"labels .* for each of its 5 images of 8 x 6 \(width"):
        NYUDv2(root, "test")
    (root / "splits.mat").unlink()
    nyu_labelled(path, images, labels, LABEL_NAMES)
    with pytest.raises(FileNotFoundError, match=r"splits.mat: expected an existing .mat file"):
        NYUDv2(root, "test")


# --- SIFT Flow ---------------------------------------------------------------------------------

SCENES = "spatial_envelope_256x256_static_8outdoorcategories"


@pytest.fixture
def siftflow(tmp_path):
    root = tmp_path / "SiftFlowDataset"
    splits = {"trainval": ["coast_a1", "street_b2", "forest_c3"], "test": ["coast_d4"]}
    for split, ids in splits.items():
        lines(root / f"{split}.txt", *ids)
        for identity in ids:
            photo(root / "Images" / SCENES / f"{identity}.jpg")
            semantic = values(1, 33, 0, 9)
            mat(root / "SemanticLabels" / SCENES / f"{identity}.mat", S=semantic, names=SCENES)
            geometric = values(-1, 1, 2, 3, 0, dtype=np.int16)
            mat(root / "GeoLabels" / SCENES / f"{identity}.mat", S=geometric, names=SCENES)
    return root


def test_siftflow(siftflow):
    for root in (siftflow, siftflow.parent):
        assert [len(SiftFlow(root, split)) for split in SiftFlow.splits] == [3, 1]
    semantic = SiftFlow(siftflow, "test")
    assert (semantic.num_classes, semantic.name(0)) == (33, "coast_d4")
    image, label = semantic[0]
    assert image.shape == (H, W, 3)
    assert head(label, 5) == [0, 32, IGNORE, 8, IGNORE]
    assert [semantic.classes[i] for i in (0, 8, 10, 15, 32)] == [
        "awning", "cow", "desert", "moon", "window",
    ]  # fmt: skip
    geometric = SiftFlow(siftflow, "trainval", "geometric")
    assert geometric.classes == ("sky", "horizontal", "vertical")
    assert head(geometric.load_label(2), 6) == [IGNORE, 0, 1, 2, IGNORE, IGNORE]


def test_siftflow_with_both_label_maps(siftflow):
    both = SiftFlowBoth(siftflow, "trainval")
    semantic, geometric = SiftFlow(siftflow), SiftFlow(siftflow, "trainval", "geometric")
    assert (len(both), both.num_classes, both.name(2)) == (3, 36, "forest_c3")
    assert both.classes == semantic.classes + geometric.classes
    assert {name: head.num_classes for name, head in both.heads.items()} == {"sem": 33, "geo": 3}
    image, label = both[1]
    np.testing.assert_array_equal(image, semantic.load_image(1))
    assert label.shape == (H, W, 2)
    np.testing.assert_array_equal(label[..., 0], semantic.load_label(1))
    np.testing.assert_array_equal(label[..., 1], geometric.load_label(1))
    assert dataset_classes("siftflow-both")[0] == both.classes
    np.testing.assert_array_equal(dataset_classes("siftflow-both")[1], both.palette)
    with pytest.raises(IndexError):
        both[3]

    path = siftflow / "GeoLabels" / SCENES / "street_b2.mat"
    mat(path, S=np.ones((H, W + 1), np.int16), names=SCENES)
    with pytest.raises(ValueError, match=r"street_b2: expected label maps of one size"):
        both[1]


def test_siftflow_problems(siftflow, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected SIFT Flow \(Images and SemanticLabels"):
        SiftFlow(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one of trainval, test, but got 'val'"):
        SiftFlow(siftflow, "val")
    with pytest.raises(ValueError, match="'semantic' or 'geometric', but got 'both'"):
        SiftFlow(siftflow, "test", "both")
    path = siftflow / "SemanticLabels" / SCENES / "coast_d4.mat"
    for bad, shown in ((values(34), "34"), (values(-1, dtype=np.int8), "-1")):
        mat(path, S=bad)
        with pytest.raises(ValueError, match=rf"S in 1 .. 33 \(awn.*0 for void, but got {shown} "):
            SiftFlow(siftflow, "test")[0]
    path = siftflow / "GeoLabels" / SCENES / "coast_d4.mat"
    mat(path, S=values(4, -2, dtype=np.int8))
    with pytest.raises(ValueError, match=r"in 1 .. 3 \(sky .. vertical\) or 0 or -1 .* got -2, 4 "):
        SiftFlow(siftflow, "test", "geometric")[0]
    mat(path, names="x", T=values())
    with pytest.raises(
        ValueError, match=r"coast_d4.mat: .*'S', but got the variables 'names', 'T'"
    ):
        SiftFlow(siftflow, "test", "geometric")[0]
    (siftflow / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test.txt: expected an existing text file"):
        SiftFlow(siftflow, "test")


# --- PASCAL-Context ----------------------------------------------------------------------------


def context_labels():
    """A list like that of PASCAL-Context: many names, in alphabetical order, some with blanks."""
    renamed = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}
    names = [renamed.get(name, name) for name in PascalContext.classes[1:]]
    # Decoys: labels whose names contain, or are, what the 59 classes are called.
    names += ["clothes tree", "air conditioner", "table ware", "unknown", *"abcdefgh"]
    return sorted(names)


@pytest.fixture
def context(tmp_path):
    ids = {"train": ["2008_000002", "2008_000003"], "val": ["2010_000001"]}
    names = context_labels()
    lines(
        tmp_path / "pascal-context" / "labels.txt",
        *(f"{i}: {name}" for i, name in enumerate(names, 1)),
    )
    stored = [
        names.index(name) + 1 for name in ("aeroplane", "wood", "table", "cloth", "bedclothes")
    ]
    stored += [names.index("clothes tree") + 1, 0, len(names)]
    for split, part in ids.items():
        lines(tmp_path / "VOCdevkit/VOC2010/ImageSets/Main" / f"{split}.txt", *part)
        for identity in part:
            photo(tmp_path / "VOCdevkit/VOC2010/JPEGImages" / f"{identity}.jpg")
            label = values(*stored, dtype=np.uint16)
            mat(tmp_path / "pascal-context/trainval" / f"{identity}.mat", LabelMap=label)
    return tmp_path


def test_pascal_context(context):
    assert [len(PascalContext(context, split)) for split in PascalContext.splits] == [2, 1]
    dataset = PascalContext(context, "val")
    assert dataset.num_classes == 60
    label = dataset[0][1]
    # aeroplane, wood, diningtable, clothes, bedcloth, and three of the rest
    assert head(label, 8) == [1, 59, 11, 28, 52, 0, 0, dataset.classes.index(context_labels()[-1])]
    assert IGNORE not in label
    (context / "VOCdevkit").rename(context / "pascal")
    assert len(PascalContext(context, "train")) == 2


def test_pascal_context_problems(context, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected VOC 2010 \(JPEGImages and ImageSets/M"):
        PascalContext(tmp_path / "nowhere")
    count = len(context_labels())
    path = context / "pascal-context/trainval/2010_000001.mat"
    mat(path, LabelMap=values(count + 1))
    with pytest.raises(ValueError, match=rf"LabelMap in 0 .. {count}, .* but got {count + 1} \("):
        PascalContext(context, "val")[0]
    listing = context / "pascal-context" / "labels.txt"
    text = listing.read_text()
    for old, new, message in [
        ("cloth\n", "fabric\n", "a label 'cloth' for class 'clothes', but the list has none"),
        ("7:", "8:", r"expected '7: name' on line 7, got '8: "),
        (":", "", r"expected '1: name' on line 1, got '1 a"),
        (text, "", "a label 'aeroplane' .* the list has none of its 0"),
    ]:
        listing.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=rf"labels.txt: .*{message}"):
            PascalContext(context, "val")
    listing.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected PASCAL-Context \(labels.txt and train"):
        PascalContext(context, "val")


# --- CamVid in both orders ---------------------------------------------------------------------

DILATEDNET_CLASSES = (
    "building", "tree", "sky", "car", "sign", "road", "pedestrian", "fence", "pole", "pavement",
    "bicyclist",
)  # fmt: skip


@pytest.fixture
def camvid(tmp_path):
    for i, split in enumerate(("train", "val", "test")):
        photo(tmp_path / split / f"{i}.png")
        grey(tmp_path / f"{split}annot" / f"{i}.png", values(*range(12)))
    return tmp_path


def test_camvid_in_both_orders(camvid):
    segnet, dilatednet = CamVid(camvid, "val"), CamVid(camvid, "val", "dilatednet")
    first, second = segnet[0][1], dilatednet[0][1]
    assert head(first, 12) == [*range(11), IGNORE]
    # id of the DilatedNet release for sky, building, pole, road, pavement, tree, ...
    assert head(second, 12) == [2, 0, 8, 5, 9, 1, 4, 7, 3, 6, 10, IGNORE]
    assert dilatednet.classes == DILATEDNET_CLASSES
    for one, other in zip(head(first, 11), head(second, 11), strict=True):
        assert segnet.classes[one] == dilatednet.classes[other]
    # The released palette: CamVid's own blue for the pavement, SegNet's for all others.
    assert dilatednet.palette[9].tolist() == [0, 0, 192]
    others = [i for i in range(11) if i != 9]
    order = [segnet.classes.index(name) for name in dilatednet.classes]
    np.testing.assert_array_equal(dilatednet.palette[others], segnet.palette[order][others])
    assert segnet.palette[4].tolist() == [60, 40, 222]
    assert CamVid(camvid, "trainval", "dilatednet").classes == dilatednet.classes
    with pytest.raises(ValueError, match="'segnet' or 'dilatednet', but got 'fyu'"):
        CamVid(camvid, "val", "fyu")
    grey(camvid / "valannot" / "1.png", values(12))
    with pytest.raises(ValueError, match=r"in 0 .. 10 \(sky .. bicyclist\) or 11 or 255 .* got 12"):
        dilatednet[0]


@pytest.mark.data
def test_camvid_orders_agree_on_real_labels(data_root):
    root = data_root / "camvid"
    if not root.is_dir():
        pytest.skip(f"no CamVid: {root} does not exist")
    one, other = CamVid(root, "test"), CamVid(root, "test", "dilatednet")
    for index in (0, 120, 232):
        names = [
            np.array([*dataset.classes, "void"])[np.minimum(dataset.load_label(index), 11)]
            for dataset in (one, other)
        ]
        np.testing.assert_array_equal(*names)


# --- KITTI -------------------------------------------------------------------------------------


@pytest.fixture
def kitti(tmp_path):
    root = tmp_path / "KITTI_SEMANTIC"
    colors = np.concatenate([KITTI.palette, [(0, 0, 0)]]).astype(np.uint8)
    for folder, count in {"Training_00": 3, "Validation_07": 2}.items():
        for i in range(count):
            photo(root / folder / "RGB" / f"{i:06}.png")
            path = root / folder / "GT" / f"{i:06}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(colors[values(*range(12))]).save(path)
    return root


@pytest.mark.parametrize("form", ["RGB", "RGBA", "P", "L"])
def test_kitti_labels_as_colours_or_ids(kitti, form):
    path = kitti / "Validation_07" / "GT" / "000000.png"
    with Image.open(path) as picture:
        colors = picture.convert("RGB")
    if form == "L":
        grey(path, values(*range(11), IGNORE))
    elif form == "P":
        colors.quantize(12).save(path)  # exactly these 12 colours, in any order
    else:
        colors.convert(form).save(path)
    dataset = KITTI(kitti, "test")
    assert head(dataset[0][1], 13) == [*range(11), IGNORE, 0]
    assert dataset.classes == DILATEDNET_CLASSES


def test_kitti_splits(kitti):
    for root in (kitti, kitti.parent):
        assert [len(KITTI(root, split)) for split in KITTI.splits] == [3, 2]
    assert KITTI(kitti, "train").name(2) == "000002"


def test_kitti_problems(kitti, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected KITTI .*Training_00/RGB and Training_00"
    ):
        KITTI(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one of train, test, but got 'val'"):
        KITTI(kitti, "val")
    path = kitti / "Training_00" / "GT" / "000001.png"
    pixels = np.full((H, W, 3), (128, 0, 0), np.uint8)
    pixels[2, 5] = 129, 0, 0
    Image.fromarray(pixels).save(path)
    with pytest.raises(
        ValueError,
        match=r"000001.png: expected the 11 class colours .* got \(129, 0, 0\) \(1 pixels of other "
        r"colours, first at row 2, column 5\)",
    ):
        KITTI(kitti, "train")[1]
    Image.fromarray(pixels).save(path, "JPEG")
    with pytest.raises(ValueError, match=r"000001.png: .* got a JPEG, which alters"):
        KITTI(kitti, "train")[1]
    grey(path, values(11))
    with pytest.raises(ValueError, match=r"in 0 .. 10 \(building .. bicyclist\) or 255 .* got 11"):
        KITTI(kitti, "train")[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"000001.png: expected an existing label map"):
        KITTI(kitti, "train")


# --- Cityscapes --------------------------------------------------------------------------------


@pytest.fixture
def cityscapes(tmp_path):
    frames = {
        "train": ["aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313"],
        "val": ["frankfurt_000000_000294", "lindau_000000_000019"],
        "test": ["berlin_000000_000019"],
    }
    for split, names in frames.items():
        for name in names:
            city = name.split("_")[0]
            photo(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            labels = tmp_path / "gtFine" / split / city
            grey(labels / f"{name}_gtFine_labelIds.png", values(*range(34)))
            # Files that also lie there and must not be taken.
            grey(labels / f"{name}_gtFine_instanceIds.png", values(*range(40)))
            photo(labels / f"{name}_gtFine_color.png")
    return tmp_path


def test_cityscapes_ids(cityscapes):
    image, label = Cityscapes(cityscapes, "val")[1]
    assert image.shape == (H, W, 3)
    void = IGNORE
    assert head(label, 34) == [
        void, void, void, void, void, void, void, 0, 1, void, void, 2, 3, 4, void, void, void, 5,
        void, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, void, void, 16, 17, 18,
    ]  # fmt: skip
    back = Cityscapes.label_ids(label)
    np.testing.assert_array_equal(back[label != void], values(*range(34))[label != void])
    assert (back[label == void] == 0).all()


def test_cityscapes_splits(cityscapes):
    assert [len(Cityscapes(cityscapes, split)) for split in Cityscapes.splits] == [3, 2, 1]
    train = Cityscapes(cityscapes, "train")
    assert [train.name(i) for i in (0, 2)] == ["aachen_000000_000019", "bochum_000000_000313"]
    test = Cityscapes(cityscapes, "test")
    assert not test.has_labels
    with pytest.raises(ValueError, match="Cityscapes: expected a split with labels, but 'test'"):
        test[0]


def test_cityscapes_problems(cityscapes, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected Cityscapes \(leftImg8bit/val and gtFine/val in one of"
    ):
        Cityscapes(tmp_path / "nowhere", "val")
    path = cityscapes / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png"
    grey(path, values(34))
    with pytest.raises(
        ValueError, match=r"labelIds.png: expected label values in 0 .. 33 .*got 34"
    ):
        Cityscapes(cityscapes, "val")[1]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"gtFine_labelIds.png: expected an existing label"):
        Cityscapes(cityscapes, "val")


# --- by name -----------------------------------------------------------------------------------


def test_every_name_opens_its_dataset(pascal, nyud, siftflow, context, camvid, kitti, cityscapes):
    # All of the fixtures above lie in one folder.
    opened = {
        "voc": ("train", 21),
        "voc2011": ("val", 21),
        "sbd": ("trainaug", 21),
        "nyud": ("test", 40),
        "nyud-hha": ("test", 40),
        "nyud-rgbd": ("test", 40),
        "nyud-rgb-hha": ("test", 40),
        "siftflow": ("test", 33),
        "siftflow-geometric": ("test", 3),
        "siftflow-both": ("test", 36),
        "pascal-context": ("val", 60),
        "camvid": ("val", 11),
        "camvid-dilatednet": ("val", 11),
        "kitti": ("test", 11),
        "cityscapes": ("val", 19),
    }
    assert set(DATASETS) == {"shapes", "folder", *opened}
    for name, (split, classes) in opened.items():
        dataset = open_dataset(name, pascal, split)
        assert dataset.num_classes == classes == len(dataset.palette)
        for part in dataset.heads.values() or [dataset]:
            assert len(np.unique(part.palette, axis=0)) == part.num_classes
        assert dataset_classes(name)[0] == dataset.classes
        np.testing.assert_array_equal(dataset_classes(name)[1], dataset.palette)
        image, label = dataset[0]
        assert image.shape == (*label.shape[:2], dataset.channels)
        assert label.shape[2:] == ((len(dataset.heads),) if dataset.heads else ())
        assert set(np.unique(label)) <= {*range(classes), IGNORE}
    assert (
        open_dataset("nyud-hha", nyud).load_image(0)[0, 0].tolist()
        == photo(nyud / "again.png", 15003)[0, 0].tolist()
    )
    assert open_dataset("camvid-dilatednet", camvid).classes[0] == "building"
    with pytest.raises(ValueError, match=r"expected name to be one of shapes, voc.*got 'folder'"):
        dataset_classes("folder")


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("shapes", "folder")])
def test_a_wrong_folder_says_what_it_expected(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: expected .*Pass .* as root"):
        open_dataset(name, tmp_path, "val" if name in ("sbd", "pascal-context") else "test")


@pytest.mark.parametrize(("library", "name"), [("scipy.io", "scipy"), ("h5py", "h5py")])
def test_without_a_library_the_message_says_how_to_get_it(
    nyud, nyud_official, monkeypatch, library, name
):
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'with {name}, which is not installed. Run: pip .*"dil'):
        NYUDv2(nyud, "val")[0] if name == "scipy" else NYUDv2(nyud_official[0], "test")


def test_a_command_trains_and_scores_on_a_name_with_arguments(siftflow, tmp_path, capsys):
    pytest.importorskip("tqdm", reason="needs tqdm")
    run = tmp_path / "run"
    words = (
        f"train --data siftflow-geometric --root {siftflow} --train-split trainval --eval-split "
        f"test --model fcn32s --backbone demo --batch-size 3 --steps 1 --device cpu --out {run}"
    )
    assert cli.main(words.split()) == 0
    words = f"eval --checkpoint {run / 'best.pt'} --data siftflow --device cpu"
    assert cli.main(f"{words} --root {siftflow}".split()) == 2
    assert "trained on 3 classes (siftflow-geometric)" in capsys.readouterr().err
    assert cli.main(f"eval --checkpoint {run / 'best.pt'} --device cpu".split()) == 0
    assert "horizontal" in capsys.readouterr().out


# --- by command: several inputs, several label maps ----------------------------------------------


def dilseg(words) -> int:
    return cli.main([*words.split(), "--device", "cpu"])


def test_one_trunk_trains_and_answers_with_both_heads(siftflow, tmp_path, capsys):
    pytest.importorskip("tqdm", reason="needs tqdm")
    run, place = tmp_path / "run", f"--data siftflow-both --root {siftflow}"
    splits = "--train-split trainval --eval-split test --backbone demo --batch-size 3"
    shape = "--crop 12 9 --scale 0.5 1.5 --class-weights median"
    assert dilseg(f"train {place} {splits} {shape} --model fcn8s --steps 2 --out {run}") == 0
    out = capsys.readouterr().out
    assert "geo: mean IoU" in out
    assert f"a uniform guess over the classes has {(math.log(33) + math.log(3)) / 2:.4f}" in out
    model, spec, data, _ = load_model(run / "best.pt")
    assert spec.options["heads"] == {"sem": 33, "geo": 3}
    assert (model.num_classes, len(data.classes)) == (36, 36)
    record = json.loads((run / "record.json").read_text())
    assert {"mean_iou", "mean_iou_geo"} <= set(record["evaluations"][-1])

    made = tmp_path / "made"
    assert dilseg(f"eval --checkpoint {run / 'best.pt'} --predictions {made}") == 0
    out = capsys.readouterr().out
    assert "head sem" in out
    assert "head geo" in out
    result = json.loads((run / "eval-test.json").read_text())
    assert [len(head["confusion"]) for head in result["heads"].values()] == [33, 3]
    assert result["scores"] == result["heads"]["sem"]["scores"]
    assert sorted(path.name for path in made.iterdir()) == ["coast_d4_geo.png", "coast_d4_sem.png"]
    dataset = SiftFlowBoth(siftflow, "test")
    for index, head in enumerate(("sem", "geo")):
        pixels = read_label(made / f"coast_d4_{head}.png", 33)
        matrix = ConfusionMatrix(dataset.heads[head].num_classes)
        matrix.update(torch.from_numpy(pixels), torch.from_numpy(dataset[0][1][..., index].copy()))
        assert matrix.counts.tolist() == result["heads"][head]["confusion"]

    photograph = siftflow / "Images" / SCENES / "coast_d4.jpg"
    for option, head in (("", "sem"), ("--head geo", "geo")):
        words = f"predict --checkpoint {run / 'best.pt'} --input {photograph} --out {tmp_path} "
        assert dilseg(words + option) == 0
        labels = read_label(tmp_path / "coast_d4.png", 33)
        np.testing.assert_array_equal(labels, read_label(made / f"coast_d4_{head}.png", 33))
    assert dilseg(words.replace("geo", "sky") + "--head sky") == 2
    assert "--head: expected one of the network's (sem, geo)" in capsys.readouterr().err
    assert dilseg(f"train {place} {splits} --model frontend --out {tmp_path / 'other'}") == 2
    assert "which frontend has not; use fcn32s" in capsys.readouterr().err
    words = f"eval --checkpoint {run / 'best.pt'} --data siftflow --root {siftflow}"
    assert dilseg(words) == 2


def test_both_losses_add_up(siftflow):
    """Their sum over pixels; their mean over the labelled pixels of both maps."""
    dataset = SiftFlowBoth(siftflow, "trainval")
    model = models.fcn32s(36, "demo", heads={"sem": 33, "geo": 3}, dropout=0.0)
    loss = SegmentationLoss(model, class_weights(dataset))
    weight = torch.cat([class_weights(part) for part in dataset.heads.values()])
    assert torch.equal(loss.weight, weight)
    images, target = Augmented(dataset)[0]
    logits = model(images[None])
    expected = sum(
        torch.nn.functional.cross_entropy(
            part, labels[None].long(), own, ignore_index=IGNORE, reduction="sum"
        )
        for part, labels, own in zip(
            logits.split([33, 3], 1), target, weight.split([33, 3]), strict=True
        )
    )
    torch.testing.assert_close(loss(images[None], target[None]), expected)
    total = sum(
        own[labels[labels != IGNORE].long()].sum().item()
        for labels, own in zip(target, weight.split([33, 3]), strict=True)
    )
    assert loss.target_weight(target[None]).item() == pytest.approx(total)


def test_colour_with_depth_and_with_hha_trains(nyud, tmp_path, capsys):
    pytest.importorskip("tqdm", reason="needs tqdm")
    common = f"--root {nyud} --train-split trainval --eval-split test --backbone demo --steps 1"
    common += " --batch-size 3 --crop 12 9 --scale 0.5 1.5"
    runs = {name: tmp_path / name for name in ("nyud", "nyud-hha", "nyud-rgbd")}
    for name, run in runs.items():
        assert dilseg(f"train --data {name} {common} --model fcn32s --out {run}") == 0
    model, _, data, _ = load_model(runs["nyud-rgbd"] / "best.pt")
    assert (model.in_channels, len(data.mean)) == (4, 4)
    assert data.mean[3] * 255 == pytest.approx(7.844)
    assert dilseg(f"eval --checkpoint {runs['nyud-rgbd'] / 'best.pt'}") == 0
    words = f"predict --checkpoint {runs['nyud-rgbd'] / 'best.pt'} --out {tmp_path / 'out'}"
    assert dilseg(f"{words} --input {nyud / 'data/images'}") == 2
    assert "takes images of 4 channels" in capsys.readouterr().err

    late = tmp_path / "late"
    words = f"train --data nyud-rgb-hha {common} --model fcn32s-late --out {late} --lr 1e-30"
    starts = [runs[name] / "best.pt" for name in ("nyud", "nyud-hha")]
    assert dilseg(f"{words} --init {starts[0]} --init-hha {starts[1]} --optimizer sgd") == 0
    model, _, data, _ = load_model(late / "best.pt")
    assert (model.in_channels, len(data.mean)) == (6, 6)
    for stream, path in zip((model.color, model.hha), starts, strict=True):
        torch.testing.assert_close(stream.conv1_1.weight, load_model(path)[0].conv1_1.weight)
    assert dilseg(f"eval --checkpoint {late / 'best.pt'}") == 0
    capsys.readouterr()
    for data, model, text in [
        ("nyud-rgb-hha", "fcn32s", "6 channels, but fcn32s takes 3 or 4"),
        ("nyud-rgbd", "frontend", "4 channels, but frontend takes 3"),
        ("nyud", "fcn32s-late", "3 channels, but fcn32s-late takes 6"),
    ]:
        assert dilseg(f"train --data {data} {common} --model {model} --out {tmp_path / 'x'}") == 2
        assert text in capsys.readouterr().err
