# SPDX-License-Identifier: Apache-2.0
"""What a network computes before its last upsampling, against the logits it stands for."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dilseg import models
from dilseg.data import Shapes, image_to_tensor
from dilseg.engine import ConfusionMatrix, Processes, SegmentationLoss, evaluate_model, segment
from dilseg.models import Scores, SegmentationModel

CLASSES = 5
SIZES = [(40, 56), (33, 47), (7, 9), (1, 1)]
FUSED: dict[str, Callable[[], SegmentationModel]] = {
    "fcn32s": lambda: models.fcn32s(CLASSES, "demo"),
    "fcn16s": lambda: models.fcn16s(CLASSES, "demo"),
    "fcn8s": lambda: models.fcn8s(CLASSES, "demo"),
    "frontend": lambda: models.DilatedFrontEnd(CLASSES, "demo"),
    "dilatednet": lambda: models.dilatednet(CLASSES, "demo"),
}
# VGG-16's geometry, and so the published crops and offsets, with few channels.
PUBLISHED = models.Backbone("tiny", ((8,) * 2,) * 2 + ((12,) * 3,) * 3, 7, 12, 100, 0)
ALL = {
    **FUSED,
    "published": lambda: models.fcn8s(CLASSES, PUBLISHED),
    "learned": lambda: models.fcn8s(CLASSES, "demo", learned_upsampling=True),
}


class OwnModel(SegmentationModel):
    """Somebody else's network, which knows `segment` only."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__(num_classes, output_stride=1, margin=0)
        self.conv = nn.Conv2d(3, num_classes, 1)

    def segment(self, images):
        return self.conv(images)


def made(build, dtype=torch.float32) -> SegmentationModel:
    """A network in eval mode whose scores are of order one; no class wins everywhere."""
    model = build().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=math.sqrt(2 / max(1, parameter[0].numel())))
        last = {"FCN": "score_fr", "DilatedFrontEnd": "final", "DilatedNet": "context.ctx_final"}
        name = next(last[base.__name__] for base in type(model).mro() if base.__name__ in last)
        images = torch.randn(2, 3, 40, 56, dtype=dtype)
        means = model.segment(images).mean((0, 2, 3))
        model.get_submodule(name).bias -= means
    return model


def labels_of(n, size):
    target = torch.randint(0, CLASSES, (n, *size), dtype=torch.uint8)
    target[torch.rand(n, *size) < 0.2] = 255
    return target


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(ALL))
def test_logits_are_those_of_segment(name, size):
    model = made(ALL[name])
    images = torch.randn(2, 3, *size)
    scores = model.scores(images)
    assert scores.size == size
    assert torch.equal(scores.logits(), model.segment(images))
    assert (scores.scale_factor is None) == (name == "learned")
    if scores.scale_factor is not None:
        assert scores.scale_factor == model.output_stride


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", sorted(ALL))
def test_cross_entropy_is_that_of_the_logits(name, reduction):
    model = made(ALL[name], torch.float64)
    size = (40, 53)
    target = labels_of(2, size)
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.5
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    options = {"ignore_index": 255, "reduction": reduction, "label_smoothing": 0.1}

    def gradients(loss):
        model.zero_grad()
        loss.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss = model.scores(images).cross_entropy(target, weight, **options)
    expected = F.cross_entropy(model.segment(images), target.long(), weight, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for got, wanted in zip(gradients(loss), gradients(expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(ALL))
def test_labels_are_the_argmax_of_the_logits(name, size):
    model = made(ALL[name])
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        scores, logits = model.scores(images), model.segment(images)
        labels = scores.labels()
        with_shares, shares = scores.labels(confidence=True)
        assert torch.equal(labels, logits.argmax(1).to(torch.uint8))
        assert len(labels.unique()) >= 2 or size != SIZES[0]
        assert labels.dtype == torch.uint8
        assert torch.equal(with_shares, labels)
        torch.testing.assert_close(shares, logits.softmax(1).amax(1))
        for dtype in (torch.int32, torch.int64):
            assert torch.equal(scores.labels(dtype=dtype), logits.argmax(1).to(dtype))


@pytest.mark.parametrize("name", sorted(FUSED))
def test_confusion_equals_that_of_the_logits(name):
    """Fused labels are those of logits at image size, pixel by pixel: no count may differ."""
    model, spec = made(FUSED[name]), {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    dataset = Shapes("val", length=4, size=(61, 78))
    expected = ConfusionMatrix(7)
    group = Processes(0, 1, torch.device("cpu"))
    matrix = evaluate_model(model, dataset, group=group, **spec)
    for index in range(4):
        image, label = dataset.load(index)
        with torch.no_grad():
            logits = model.segment(image_to_tensor(image, **spec)[None])
        expected.update(logits.argmax(1)[0], torch.from_numpy(label))
    assert torch.equal(matrix.counts, expected.counts)
    assert (matrix.counts.sum(0) > 0).sum() >= 2


@pytest.mark.parametrize("tile", [8, 24])
@pytest.mark.parametrize("name", ["frontend", "dilatednet"])
def test_tiles_reach_the_scores(name, tile):
    model = made(FUSED[name], torch.float64)
    images = torch.randn(1, 3, 37, 61, dtype=torch.float64)
    tiled = model.scores(images, tile=tile)
    torch.testing.assert_close(tiled.scores, model.scores(images).scores, rtol=1e-10, atol=1e-10)
    assert torch.equal(tiled.logits(), model.segment(images, tile=tile))
    with pytest.raises(ValueError, match="positive multiple of 8, but got 12"):
        model.scores(images, tile=12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_full_resolution_scores_are_used_as_they_are(dtype):
    logits = torch.randn(2, 4, 5, 7).to(dtype).requires_grad_()
    scores = Scores(logits, (5, 7))
    assert scores.logits() is logits
    labels, shares = scores.labels(confidence=True)
    assert torch.equal(labels.long(), logits.argmax(1))
    wide = logits.double() if dtype == torch.float64 else logits.float()
    torch.testing.assert_close(shares, wide.softmax(1).amax(1).detach())
    assert not shares.requires_grad
    target = torch.randint(0, 4, (2, 5, 7))
    expected = F.cross_entropy(wide, target)
    torch.testing.assert_close(scores.cross_entropy(target), expected)


# A third party's model ---------------------------------------------------------------------------


def test_a_model_with_segment_only_trains_and_predicts():
    model = OwnModel()
    images, target = torch.randn(2, 3, 9, 6), labels_of(2, (9, 6))
    scores = model.scores(images)
    assert scores.scale_factor is None
    assert torch.equal(scores.logits(), model.segment(images))
    loss = SegmentationLoss(model)(images, target)
    expected = F.cross_entropy(
        model.segment(images), target.long(), ignore_index=255, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.conv.weight.grad.any()
    labels, shares = segment(model, images, confidence=True)
    assert torch.equal(labels.long(), model.segment(images).argmax(1))
    torch.testing.assert_close(shares, model.segment(images).softmax(1).amax(1).detach())


class HalvedForward(models.FCN):
    def forward(self, images):
        return super().forward(images) / 2


class HalvedSegment(models.DilatedFrontEnd):
    def segment(self, images, *, tile=None):
        return super().segment(images, tile=tile) / 2


class HalvedScores(models.FCN):
    def scores(self, images):
        scores = super().scores(images)
        return dataclasses.replace(scores, scores=scores.scores / 2)

    def forward(self, images):
        return super().forward(images) / 2


@pytest.mark.parametrize("kind", [HalvedForward, HalvedSegment, HalvedScores])
def test_a_subclass_trains_what_it_computes(kind):
    model = made(lambda: kind(CLASSES, "demo"))
    images = torch.randn(1, 3, 24, 32)
    torch.testing.assert_close(model.scores(images).logits(), model.segment(images))
    assert (model.scores(images).scale_factor is not None) == (kind is HalvedScores)

    class Further(kind):
        pass

    further = made(lambda: Further(CLASSES, "demo"))
    torch.testing.assert_close(further.scores(images).logits(), further.segment(images))


# Modes and errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fcn8s", "dilatednet"])
def test_autocast_and_channels_last_change_rounding_only(name):
    model = made(FUSED[name])
    images, target = torch.randn(2, 3, 40, 53), labels_of(2, (40, 53))
    expected = model.scores(images).cross_entropy(target, ignore_index=255)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.scores(images)
        assert scores.scores.dtype == torch.bfloat16
        loss = scores.cross_entropy(target, ignore_index=255)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    loss.backward()
    model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    loss = model.scores(images).cross_entropy(target, ignore_index=255)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_compiles_as_one_graph_for_any_size():
    model = made(FUSED["fcn8s"])

    def loss_and_labels(images, target):
        scores = model.scores(images)
        return scores.cross_entropy(target, ignore_index=255), scores.labels()

    compiled = torch.compile(loss_and_labels, backend="eager", fullgraph=True, dynamic=True)
    for size in [(40, 56), (33, 47), (64, 49)]:
        images, target = torch.randn(1, 3, *size), labels_of(1, size)
        loss, labels = compiled(images, target)
        expected_loss, expected_labels = loss_and_labels(images, target)
        torch.testing.assert_close(loss, expected_loss)
        assert torch.equal(labels, expected_labels)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"size \(6, 8\), as the images, but got \(3, 4\)"):
        Scores(torch.zeros(1, 2, 3, 4), (6, 8))
    scores = Scores(torch.zeros(1, 2, 3, 4), (6, 8), scale_factor=2)
    for wrong in ((1, 6, 7), (2, 6, 8), (6, 8), (1, 1, 6, 8)):
        with pytest.raises(ValueError, match=r"shape \[n, h, w\] = \[1, 6, 8\], but got"):
            scores.cross_entropy(torch.zeros(wrong, dtype=torch.uint8))
    for many in (
        Scores(torch.zeros(1, 257, 1, 1), (1, 1)),
        Scores(torch.zeros(1, 257, 1, 1), (2, 2), scale_factor=2),
    ):
        with pytest.raises(ValueError, match="at most 256 classes"):
            many.labels()
        assert many.labels(dtype=torch.int32).dtype == torch.int32
        with pytest.raises(TypeError, match=r"dtype.*torch\.int16"):
            many.labels(dtype=torch.int16)


# Memory ----------------------------------------------------------------------------------------


class FloatTensors(TorchDispatchMode):
    """Sorted shapes of every float tensor that an operator returns, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.shapes.add(tuple(sorted(value.shape)))
        return result


@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize("name", sorted(FUSED))
def test_neither_training_nor_evaluation_makes_full_resolution_logits(name, confidence):
    # No activation of these networks has this shape, in whatever order: 5 classes are no width.
    images, target = torch.randn(2, 3, 47, 61), labels_of(2, (47, 61))
    full = tuple(sorted((2, CLASSES, 47, 61)))
    model = made(FUSED[name]).train()
    with FloatTensors() as seen:
        SegmentationLoss(model)(images, target).backward()
    assert tuple(sorted(model.scores(images).scores.shape)) in seen.shapes
    assert full not in seen.shapes
    model.eval()
    with FloatTensors() as seen:
        segment(model, images, confidence=confidence)
    assert len(seen.shapes) > 5
    assert full not in seen.shapes
    with FloatTensors() as seen:
        F.cross_entropy(model.segment(images), target.long(), ignore_index=255).backward()
    assert full in seen.shapes


def interp_map(cells, zoom, height, width):
    """As the code published with DilatedNet has it, but for the clamp at the last row and column.

    ``cells`` are probabilities ``[c, rows, columns]``, float64.
    """
    zoomed = np.empty((len(cells), height, width))
    for y in range(height):
        for x in range(width):
            r0, c0 = y // zoom, x // zoom
            r1, c1 = min(r0 + 1, cells.shape[1] - 1), min(c0 + 1, cells.shape[2] - 1)
            rt, ct = y / zoom - r0, x / zoom - c0
            left = rt * cells[:, r1, c0] + (1 - rt) * cells[:, r0, c0]
            right = rt * cells[:, r1, c1] + (1 - rt) * cells[:, r0, c1]
            zoomed[:, y, x] = (1 - ct) * left + ct * right
    return zoomed


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("size", [(40, 56), (33, 47), (7, 9), (1, 1)])
@pytest.mark.parametrize("name", ["frontend", "dilatednet"])
def test_anchored_at_the_corner_as_the_released_nets_zoom(name, size, tile):
    model = made(ALL[name])
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        scores = model.scores(images, tile=tile, anchor="corner")
        cells = model.cells(images).double().numpy()
    cells = np.exp(cells - cells.max(1, keepdims=True))
    cells /= cells.sum(1, keepdims=True)
    expected = np.stack([interp_map(one, 8, *size) for one in cells])
    probabilities = scores.probabilities().double().numpy()
    assert abs(probabilities - expected).max() < 2e-6
    assert np.allclose(scores.logits().exp().numpy(), expected, rtol=1e-4, atol=1e-6)
    labels, confidence = scores.labels(confidence=True)
    assert torch.equal(labels, scores.labels())
    assert abs(confidence.numpy() - expected.max(1)).max() < 2e-6
    first, second = np.sort(expected, 1)[:, [-1, -2]].transpose(1, 0, 2, 3)
    clear = first - second > 1e-5
    assert clear.mean() > 0.9
    assert np.array_equal(labels.numpy()[clear], expected.argmax(1)[clear])
    if min(size) > 8:  # the other convention is another one
        other = model.scores(images).probabilities().detach().numpy()
        assert abs(other - expected).max() > 0.01


def test_labels_anchored_at_the_corner_need_no_map_of_the_images_size():
    scores = Scores(torch.randn(2, CLASSES, 6, 8), (47, 61), 8, anchor="corner")
    with FloatTensors() as seen:
        scores.labels()
    assert seen.shapes
    assert max(math.prod(shape) for shape in seen.shapes) == 2 * CLASSES * 7 * 9
    with FloatTensors() as seen:
        scores.probabilities()
    assert max(math.prod(shape) for shape in seen.shapes) >= 2 * CLASSES * 47 * 61


def test_the_loss_of_corner_anchored_scores():
    cells = torch.randn(2, CLASSES, 3, 4, dtype=torch.float64, requires_grad=True)
    scores = Scores(cells, (21, 30), 8, anchor="corner")
    target = labels_of(2, (21, 30))
    expected = F.nll_loss(scores.probabilities().log(), target.long(), ignore_index=255)
    loss = scores.cross_entropy(target, ignore_index=255)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, cells)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, cells)[0])
    half = Scores(cells.detach().bfloat16(), (21, 30), 8, anchor="corner")
    assert (half.logits().dtype, half.probabilities().dtype) == (torch.bfloat16, torch.float32)
    assert half.cross_entropy(target, ignore_index=255).item() == pytest.approx(loss.item(), 0.01)


@pytest.mark.parametrize("name", sorted(ALL))
def test_probabilities_are_the_softmax_of_the_logits(name):
    model = made(ALL[name])
    scores = model.scores(torch.randn(2, 3, 33, 47))
    with torch.no_grad():
        torch.testing.assert_close(scores.probabilities(), scores.logits().softmax(1))
        labels, confidence = scores.labels(dtype=torch.int64, confidence=True)
        chosen = scores.probabilities().gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(confidence, chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor": "middle"}, "anchor 'centre' or 'corner', but got 'middle'"),
        ({"border": "zero"}, r"with anchor 'corner', but got 8, 'zero' and \(0, 0\)"),
        ({"origin": (1, 0)}, r"with anchor 'corner', but got 8, 'clamp' and \(1, 0\)"),
        ({"scale_factor": None, "size": (2, 2)}, "with anchor 'corner', but got None"),
    ],
)
def test_what_goes_with_the_corner(options, message):
    given = {"size": (9, 9), "scale_factor": 8, "anchor": "corner", **options}
    with pytest.raises(ValueError, match=message):
        Scores(torch.zeros(1, 3, 2, 2), **given)
