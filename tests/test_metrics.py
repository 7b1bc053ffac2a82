# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from dilseg.engine import ConfusionMatrix


def naive_scores(prediction, target, num_classes, ignore=255):
    """The definitions of the FCN paper, pixel by pixel in plain Python."""
    n = [[0] * num_classes for _ in range(num_classes)]
    for p, t in zip(prediction.ravel().tolist(), target.ravel().tolist(), strict=True):
        if t != ignore:
            n[t][p] += 1
    total = sum(map(sum, n))
    labelled = [sum(row) for row in n]
    predicted = [sum(n[j][i] for j in range(num_classes)) for i in range(num_classes)]
    accuracies = [n[i][i] / labelled[i] for i in range(num_classes) if labelled[i]]
    unions = [labelled[i] + predicted[i] - n[i][i] for i in range(num_classes)]
    ious = [n[i][i] / unions[i] for i in range(num_classes) if unions[i]]
    weighted = sum(labelled[i] * n[i][i] / unions[i] for i in range(num_classes) if labelled[i])
    return {
        "pixel_accuracy": sum(n[i][i] for i in range(num_classes)) / total,
        "mean_accuracy": sum(accuracies) / len(accuracies),
        "mean_iou": sum(ious) / len(ious),
        "frequency_weighted_iou": weighted / total,
    }, n


@pytest.mark.parametrize("num_classes", [1, 2, 7, 21])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_equals_the_definitions(num_classes, dtype):
    rng = np.random.default_rng(num_classes)
    matrix = ConfusionMatrix(num_classes)
    predictions, targets = [], []
    for _ in range(3):
        # Classes are drawn from a part of the range, so that some occur in one map alone.
        prediction = rng.integers(0, num_classes, (17, 13))
        target = rng.integers(0, max(1, num_classes - 2), (17, 13))
        target[rng.random((17, 13)) < 0.2] = 255
        matrix.update(torch.tensor(prediction).to(dtype), torch.tensor(target).to(dtype))
        predictions.append(prediction)
        targets.append(target)
    scores, counts = naive_scores(np.stack(predictions), np.stack(targets), num_classes)
    assert matrix.counts.tolist() == counts
    assert matrix.counts.dtype == torch.int64
    assert matrix.scores() == pytest.approx(scores, rel=1e-14)


def test_perfect_prediction_scores_one():
    target = torch.arange(5).repeat(4)
    matrix = ConfusionMatrix(5)
    matrix.update(target, target)
    assert set(matrix.scores().values()) == {1.0}


def test_a_class_that_occurs_nowhere_drops_out():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]))
    assert math.isnan(matrix.class_iou()[2])
    assert matrix.mean_iou() == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert matrix.mean_accuracy() == pytest.approx((1 / 2 + 1) / 2)
    row = matrix.per_class(["a", "b", "c"])[2]
    assert row == {"class": "c", "iou": None, "accuracy": None, "precision": None, "pixels": 0}


def test_a_class_only_predicted_has_iou_zero_and_no_accuracy():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 2]), torch.tensor([0, 0]))
    assert matrix.class_iou().tolist()[::2] == [0.5, 0.0]
    assert matrix.mean_iou() == 0.25
    assert matrix.mean_accuracy() == 0.5
    assert matrix.frequency_weighted_iou() == 0.5


def test_ignored_pixels_do_not_count_whatever_was_predicted():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1, 255]), torch.tensor([255, 255, 255]))
    assert matrix.counts.sum() == 0
    assert all(math.isnan(value) for value in matrix.scores().values())


def test_another_ignore_index():
    matrix = ConfusionMatrix(2, ignore_index=-1)
    matrix.update(torch.tensor([0, 1]), torch.tensor([-1, 1]))
    assert matrix.counts.tolist() == [[0, 0], [0, 1]]


def test_merged_parts_equal_the_whole():
    rng = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 4, (2, 9, 11), generator=rng)
    target = torch.randint(0, 4, (2, 9, 11), generator=rng)
    whole, merged, part = (ConfusionMatrix(4) for _ in range(3))
    whole.update(prediction, target)
    merged.update(prediction[0], target[0])
    part.update(prediction[1], target[1])
    merged.merge(part)
    assert torch.equal(whole.counts, merged.counts)


def test_an_empty_map_changes_nothing():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.empty(0, 5, dtype=torch.uint8), torch.empty(0, 5, dtype=torch.uint8))
    assert matrix.counts.sum() == 0


def test_counts_beyond_32_bits_stay_exact():
    matrix = ConfusionMatrix(2)
    matrix.counts[0, 0] = 2**40
    matrix.counts[1, 0] = 2**40
    matrix.update(torch.tensor([1]), torch.tensor([1]))
    assert matrix.counts.sum() == 2**41 + 1
    assert matrix.pixel_accuracy() == (2**40 + 1) / (2**41 + 1)
    assert f"{2**40 + 1:,}" in matrix.table(["a", "b"])


def test_table_names_every_class_and_score():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 0, 0]), torch.tensor([0, 0, 0]))
    lines = matrix.table(["background", "cat"]).splitlines()
    assert lines[1].split() == ["background", "100.00", "100.00", "100.00", "3"]
    assert lines[2].split() == ["cat", "-", "-", "-", "0"]
    assert [line.split("  ")[0] for line in lines[4:]] == [
        "pixel accuracy", "mean accuracy", "mean IoU", "frequency-weighted IoU",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "target", "text"),
    [
        ([0, 1], [0], r"prediction's shape \(2,\), but got \(1,\)"),
        ([0, 0], [0, 3], r"target values in \[0, 3\) or ignore_index=255, but got 3"),
        ([0, 3], [0, 1], r"prediction values in \[0, 3\), but got 3"),
        ([0, 0], [0, -1], r"but got -1"),
    ],
)
def test_wrong_values_are_named(prediction, target, text):
    with pytest.raises(ValueError, match=text):
        ConfusionMatrix(3).update(torch.tensor(prediction), torch.tensor(target))


def test_logits_instead_of_classes_are_refused():
    with pytest.raises(TypeError, match=r"integer dtype, but got torch\.float32.*argmax"):
        ConfusionMatrix(3).update(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_other_errors():
    with pytest.raises(ValueError, match="num_classes >= 1, but got 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="2 classes, but got one of 3"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))
    with pytest.raises(ValueError, match="expected 2 class names, but got 1"):
        ConfusionMatrix(2).table(["a"])


def drawn_matrix(num_classes, absent=()):
    """A matrix of random counts, without labelled pixels of the absent classes."""
    rng = np.random.default_rng(0)
    matrix = ConfusionMatrix(num_classes)
    matrix.counts += torch.from_numpy(rng.integers(0, 1000, (num_classes, num_classes)))
    matrix.counts[list(absent)] = 0
    return matrix


def test_means_over_some_classes():
    matrix = drawn_matrix(5, absent=[1])
    n = matrix.counts.tolist()
    unions = [sum(n[i]) + sum(row[i] for row in n) - n[i][i] for i in range(5)]
    kept = [0, 2, 4]
    expected = {
        "pixel_accuracy": sum(n[i][i] for i in range(5)) / sum(map(sum, n)),
        "mean_accuracy": sum(n[i][i] / sum(n[i]) for i in kept) / 3,
        "mean_iou": sum(n[i][i] / unions[i] for i in kept) / 3,
        "frequency_weighted_iou": matrix.frequency_weighted_iou(),
    }
    assert matrix.scores(kept) == pytest.approx(expected, rel=1e-14)
    # The absent class is predicted, so the mean over all counts it with an IoU of 0.
    assert matrix.mean_iou() < matrix.mean_iou([0, 2, 3, 4])
    shown = f"mean IoU{100 * matrix.mean_iou(kept):22.2f} %"
    assert shown in matrix.table([*"abcde"], kept).splitlines()


def test_merged_equals_relabelling():
    rng = torch.Generator().manual_seed(0)
    prediction, target = torch.randint(0, 6, (2, 400), generator=rng)
    groups = [[4, 0], [5], [1, 2, 3]]
    group_of = torch.tensor([0, 2, 2, 2, 0, 1])
    fine, coarse = ConfusionMatrix(6), ConfusionMatrix(3)
    fine.update(prediction, target)
    coarse.update(group_of[prediction], group_of[target])
    assert torch.equal(fine.merged(groups).counts, coarse.counts)
    assert fine.merged([[2]]).counts.tolist() == [[int(fine.counts[2, 2])]]
    for wrong in ([[0, 1], [1]], [[6]], [[-1]]):
        with pytest.raises(ValueError, match=r"different classes in \[0, 6\), but got"):
            fine.merged(wrong)
