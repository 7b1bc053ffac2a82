# SPDX-License-Identifier: Apache-2.0
import hashlib

import numpy as np
import pytest

from dilseg.data import IGNORE, Shapes, count_pixels


def _digest(dataset, indices):
    sha = hashlib.sha256()
    for index in indices:
        for array in dataset[index]:
            sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def test_a_sample_is_the_same_on_every_machine():
    # Recorded once; a change of these digests changes everybody's training set.
    assert _digest(Shapes("train"), range(16)) == "1c3ccbe454120f22"
    assert _digest(Shapes("val", size=(37, 61), seed=3), range(16)) == "6188dbb47c038429"


def test_a_sample_does_not_depend_on_order_or_length():
    long, short = Shapes("train", length=50), Shapes("train", length=5)
    later = [long[i] for i in reversed(range(5))][::-1]
    for i, (image, label) in enumerate(later):
        np.testing.assert_array_equal(image, short[i][0])
        np.testing.assert_array_equal(label, short[i][1])


def test_splits_and_seeds_share_no_image():
    sets = [Shapes(split, length=40, size=(24, 24)) for split in Shapes.splits]
    sets.append(Shapes("train", length=40, size=(24, 24), seed=1))
    images = {dataset.load_image(i).tobytes() for dataset in sets for i in range(40)}
    assert len(images) == 160


def test_every_class_occurs_and_every_image_has_ground_and_a_figure():
    dataset = Shapes("val", length=60)
    counts = count_pixels(dataset)
    assert counts.images[0] == 60
    assert (counts.images[1:] >= 8).all()
    assert set(np.unique(np.stack([dataset.load_label(i) for i in range(60)]))) == {*range(7), 255}
    assert all((dataset.load_label(i) != 0).any() for i in range(60))


def test_figures_of_different_classes_never_touch_without_void_between_figure_and_ground():
    for i in range(40):
        label = Shapes("val").load_label(i)
        for a, b in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            ground_to_figure = (a == 0) & (b != 0) | (a != 0) & (b == 0)
            assert (np.where(a == 0, b, a)[ground_to_figure] == IGNORE).all()


def test_void_ring_is_about_two_pixels_wide():
    # A disc's void ring is as wide as the difference of two radii that follow from its areas.
    widths = []
    for i in range(200):
        label = Shapes("train").load_label(i)
        whole = (label == 1) | (label == IGNORE)
        rows, columns = np.nonzero(whole)
        if (
            set(np.unique(label)) == {0, 1, IGNORE}
            and min(rows.min(), columns.min()) > 0
            and max(rows.max(), columns.max()) < 95
            and abs(np.ptp(rows) - np.ptp(columns)) <= 1
        ):
            widths.append(np.sqrt(whole.sum() / np.pi) - np.sqrt((label == 1).sum() / np.pi))
    assert len(widths) >= 2
    np.testing.assert_allclose(widths, 2.0, atol=0.15)


def test_colour_does_not_tell_the_class():
    # The mean colour of a class over many figures is that of every other class.
    dataset = Shapes("train", length=300)
    colors = [[] for _ in dataset.classes]
    for i in range(len(dataset)):
        image, label = dataset[i]
        for c in range(1, 7):
            if (label == c).any():
                colors[c].append(image[label == c].mean(axis=0))
    means = np.array([np.mean(c, axis=0) for c in colors[1:]])
    # Uniform colours have a deviation of 74; over some 100 figures the mean has one of about 8.
    assert np.abs(means - 127.5).max() < 4 * 8


def test_figures_stand_out_from_the_ground():
    # Single figures only: their middle must differ from the ground's mean in some channel.
    dataset, seen = Shapes("train", length=150), 0
    for i in range(len(dataset)):
        image, label = dataset[i]
        figure = (label != 0) & (label != IGNORE)
        if len(np.unique(label)) == 3:
            seen += 1
            difference = image[figure].mean(axis=0) - image[label == 0].mean(axis=0)
            assert np.abs(difference).max() > 20
    assert seen > 20


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (13, 97), (64, 64)])
def test_sizes(size):
    image, label = Shapes("test", size=size)[0]
    assert image.shape == (*size, 3)
    assert label.shape == size
    assert image.dtype == label.dtype == np.uint8


def test_sequence_protocol():
    dataset = Shapes("train", length=3, size=(16, 16))
    assert len(list(dataset)) == len(dataset) == 3
    np.testing.assert_array_equal(dataset[-1][0], dataset[2][0])
    assert dataset.name(-1) == dataset.name(2) == "train_00002"
    with pytest.raises(IndexError, match=r"\[-3, 3\), but got 3"):
        dataset[3]
    assert len(Shapes("train")) == 2000
    assert len(Shapes("val")) == len(Shapes("test")) == 200
    assert dataset.num_classes == len(dataset.classes) == len(dataset.palette) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "training"}, "expected split to be one of train, val, test, but got 'training'"),
        ({"length": 0}, "expected length >= 1, but got 0"),
        ({"size": (0, 4)}, r"expected size \(height, width\) >= 1, but got \(0, 4\)"),
        ({"size": (4, 4, 4)}, "expected size"),
        ({"seed": -1}, "expected seed >= 0, but got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Shapes(**arguments)
