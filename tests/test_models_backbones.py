# SPDX-License-Identifier: Apache-2.0
"""AlexNet and GoogLeNet as backbones, fusion of inputs, and several heads, in plain torch."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from test_models_fcn import bilinear_by_loops, randomise
from torch import nn

from dilseg import models
from dilseg.models.backbones import grids, output_size, single_layers
from dilseg.models.geometry import PIXELS
from dilseg.models.upsampling import BilinearUpsampling, LearnedUpsampling


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("backbone", "crop", "receptive_field", "count"),
    [
        ("alexnet", 18, 355, 56_954_261),
        # GoogLeNet with its last classifier has 6,998,552 parameters, 1,025,000 of them there.
        ("googlenet", 16, 715, 6_998_552 - 1_025_000 + 21 * 1024 + 21),
    ],
)
def test_published_numbers(backbone, crop, receptive_field, count):
    with torch.device("meta"):
        model = models.fcn32s(21, backbone)
    assert (model.crop, model.receptive_field) == (crop, receptive_field)
    assert (model.output_stride, model.margin, model.num_classes) == (32, 0, 21)
    assert parameters(model) == count
    assert model.upscore.kernel == 63


def test_receptive_field_of_googlenet_with_the_pooling_that_is_dropped():
    """The published 907 counts the average over 7 x 7 cells behind inception_5b."""
    grid = grids(models.BACKBONES["googlenet"].layers)["inception_5b"]
    assert (grid.receptive_field, grid.window(7).receptive_field) == (715, 907)


def test_published_layer_shapes():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in models.fcn32s(21, "alexnet").state_dict().items()}
    assert shapes["conv1.weight"] == (96, 3, 11, 11)
    assert shapes["conv2.weight"] == (256, 48, 5, 5)
    assert shapes["conv4.weight"] == (384, 192, 3, 3)
    assert shapes["conv5.weight"] == (256, 192, 3, 3)
    assert shapes["fc6.weight"] == (4096, 256, 6, 6)
    assert len(shapes) == 2 * 8
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in models.fcn32s(21, "googlenet").state_dict().items()}
    assert shapes["inception_4d/3x3.weight"] == (288, 144, 3, 3)
    assert shapes["inception_5b/pool_proj.weight"] == (128, 832, 1, 1)
    assert shapes["score_fr.weight"] == (21, 1024, 1, 1)
    assert len(shapes) == 2 * (3 + 9 * 6 + 1)


def test_sizes_of_alexnet_at_500():
    layers = models.BACKBONES["alexnet"].layers
    ends = [i for i, layer in enumerate(layers, 1) if layer.name in ("conv1", "pool1", "pool2")]
    assert [output_size(layers[:i], 500) for i in ends] == [173, 86, 43]
    assert output_size(layers[:10], 500) == 21
    assert output_size(layers, 500) == 16


@pytest.mark.parametrize("name", ["alexnet", "googlenet"])
def test_every_image_size_is_answered(name):
    layers = models.BACKBONES[name].fcn_layers()
    crop = models.fcn32s(1, name, fc_channels=8 if name == "alexnet" else None).crop
    for size in range(1, 1500):
        cells = output_size(layers, size)
        assert cells >= 1
        assert crop + size <= 32 * (cells - 1) + 63  # the crop stays inside the deconvolution
    # Less padding would leave GoogLeNet without a cell for an image of one pixel.
    if name == "googlenet":
        first, *rest = layers
        narrower = models.Layer(first.name, 7, 64, stride=2, padding=first.padding - 1)
        assert output_size([narrower, *rest], 1) == 0


def test_grids_of_an_inception_block_are_those_of_its_widest_branch():
    block = models.BACKBONES["googlenet"].layers[7]
    found = grids([block])
    assert [layer.name for layer in single_layers([block])] == [n for n in found if "/" in n]
    assert found["inception_3a"].receptive_field == found["inception_3a/5x5"].receptive_field == 5
    assert found["inception_3a"].start == PIXELS.start


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("stride", [2, 4, 32])
def test_odd_kernels_put_cells_on_pixels(n, stride):
    """``BilinearUpsampling`` of kernel 2 * stride - 1, its labels and its loss."""
    kernel = 2 * stride - 1
    x = torch.randn(2, 3, n, n + 1, dtype=torch.float64, requires_grad=True)
    full = F.conv_transpose2d(x, bilinear_by_loops(3, kernel), stride=stride)
    fixed = BilinearUpsampling(3, stride, kernel)
    learned = LearnedUpsampling(3, stride, kernel).double()
    for crop in (0, stride // 2, stride - 1):
        size = (full.shape[2] - crop, full.shape[3] - crop)
        expected = full[:, :, crop:, crop:]
        skip = torch.randn(2, 3, size[0] + 1, size[1] + 2, dtype=torch.float64)
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(fixed(x, size=size, crop=crop), expected, **close)
        torch.testing.assert_close(learned(x, size=size, crop=crop), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            fixed(x, skip, size=size, crop=crop, offset=1),
            expected + skip[:, :, 1 : 1 + size[0], 1 : 1 + size[1]],
            **close,
        )
        scores = fixed.scores(x, size=size, crop=crop)
        assert torch.equal(scores.labels(dtype=torch.int64), expected.argmax(1))
        target = torch.randint(0, 3, (2, *size))
        loss = scores.cross_entropy(target)
        torch.testing.assert_close(loss, F.cross_entropy(expected, target), **close)
        gradient = torch.autograd.grad(loss, x)[0]
        wanted = torch.autograd.grad(F.cross_entropy(expected, target), x, retain_graph=True)[0]
        torch.testing.assert_close(gradient, wanted, **close)


def test_odd_kernels_compile_as_one_graph():
    up = BilinearUpsampling(2, 32, 63)
    compiled = torch.compile(up, backend="eager", fullgraph=True, dynamic=True)
    for n in (2, 5, 3):
        x, size = torch.randn(1, 2, n, n + 1), (32 * n, 32 * n + 3)
        torch.testing.assert_close(compiled(x, size=size, crop=18), up(x, size=size, crop=18))


def test_scores_on_pixels_end_with_zeros():
    with pytest.raises(ValueError, match="border 'zero' with align_corners=True, but got 'clamp'"):
        models.Scores(torch.zeros(1, 1, 1, 1), (2, 2), 2, align_corners=True)


def alexnet_in_torch(state, images):
    """The prototxt of voc-fcn-alexnet."""

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def pool(x):
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
    x = norm(pool(F.relu(conv("conv1", images, stride=4, padding=100))))
    x = norm(pool(F.relu(conv("conv2", x, padding=2, groups=2))))
    x = F.relu(conv("conv3", x, padding=1))
    x = F.relu(conv("conv4", x, padding=1, groups=2))
    x = pool(F.relu(conv("conv5", x, padding=1, groups=2)))
    score = conv("score_fr", F.relu(conv("fc7", F.relu(conv("fc6", x)))))
    full = F.conv_transpose2d(score, bilinear_by_loops(score.shape[1], 63), stride=32)
    h, w = images.shape[2:]
    return full[:, :, 18 : 18 + h, 18 : 18 + w]


def test_alexnet_equals_the_published_net():
    model = models.fcn32s(3, "alexnet", fc_channels=6).double().eval()
    randomise(model)
    for h, w in [(1, 1), (31, 32), (70, 97)]:
        images = 50 * torch.randn(1, 3, h, w, dtype=torch.float64)
        expected = alexnet_in_torch(model.state_dict(), images)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def small(name: str) -> models.TableBackbone:
    """A backbone's geometry with four channels a layer."""

    def few(row):
        if isinstance(row, models.Inception):
            branches = tuple(tuple(map(few, branch)) for branch in row.branches)
            return dataclasses.replace(row, branches=branches)
        return row if row.channels is None else dataclasses.replace(row, channels=4)

    return models.TableBackbone(name, tuple(map(few, models.BACKBONES[name].layers)))


@pytest.mark.parametrize("name", ["alexnet", "googlenet"])
def test_every_parameter_learns(name):
    model = models.fcn32s(3, small(name), dropout=0.0)
    randomise(model)
    images = torch.randn(2, 3, 40, 33)
    model.scores(images).cross_entropy(torch.zeros(2, 40, 33, dtype=torch.uint8)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
    assert model.score_fr.weight.grad.any()


# Early and late fusion -------------------------------------------------------------------------


def test_early_fusion_has_a_fourth_channel():
    with torch.device("meta"):
        rgb, rgbd = models.fcn32s(40), models.fcn32s(40, in_channels=4)
    assert rgbd.conv1_1.weight.shape == (64, 4, 3, 3)
    assert parameters(rgbd) == parameters(rgb) + 64 * 9
    assert (rgbd.crop, rgbd.receptive_field) == (19, 404)
    mean, std = rgbd.normalization.mean, rgbd.normalization.std
    assert mean[:3] == rgb.normalization.mean
    # (value / 255 - mean) / std is the logarithm of the depth in millimetres, minus 7.844.
    assert (math.log(3000) / 255 - mean[3]) / std[3] == pytest.approx(math.log(3000) - 7.844)


def test_late_fusion_averages_two_nets():
    with torch.device("meta"):
        late = models.fcn32s_late()
        assert parameters(late) == 2 * parameters(models.fcn32s(40))
    assert (late.crop, late.receptive_field, late.in_channels) == (19, 404, 6)
    late = models.fcn32s_late(3, "demo").double().eval()
    color, hha = models.fcn32s(3, "demo").double().eval(), models.fcn32s(3, "demo").double().eval()
    randomise(late)
    for stream, net in ((late.color, color), (late.hha, hha)):
        net.load_state_dict(stream.state_dict())
    images = torch.randn(2, 6, 40, 53, dtype=torch.float64)
    expected = 0.5 * color(images[:, :3]) + 0.5 * hha(images[:, 3:])
    torch.testing.assert_close(late(images), expected)
    torch.testing.assert_close(late.segment(images), expected)
    assert torch.equal(late.scores(images).labels(dtype=torch.int64), expected.argmax(1))


def test_backbone_weights_fill_every_input():
    state = models.fcn32s(3, "demo").state_dict()
    rgbd = models.fcn32s(5, "demo", in_channels=4)
    report = models.load_backbone(rgbd, state, normalization=models.IMAGENET_FEATURES)
    weight = state["conv1_1.weight"]
    assert torch.equal(rgbd.conv1_1.weight[:, :3], weight)
    torch.testing.assert_close(rgbd.conv1_1.weight[:, 3], weight.mean(1))
    assert rgbd.normalization == models.IMAGENET_FEATURES + models.LOG_DEPTH == report.normalization
    models.load_backbone(rgbd, state, bgr=True)
    assert torch.equal(rgbd.conv1_1.weight[:, :3], weight.flip(1))

    late = models.fcn32s_late(5, "demo")
    report = models.load_backbone(late, state)
    for stream in (late.color, late.hha):
        assert torch.equal(stream.fc6.weight, state["fc6.weight"])
    assert late.normalization == models.IMAGENET + models.IMAGENET
    assert "hha.conv1_1" in report.loaded
    narrow = models.fcn32s_late(5, "demo", fc_channels=8)
    assert set(models.load_backbone(narrow, state).fresh) == {
        f"{modality}.{layer}" for modality in ("color", "hha") for layer in ("fc6", "fc7")
    }


def test_torchvision_weights_are_refused_for_other_backbones():
    with pytest.raises(ValueError, match=r"published weights of 'alexnet'.*another network"):
        models.load_backbone(
            models.fcn32s(3, small("alexnet")), {"features.0.weight": torch.zeros(1)}
        )
    state = models.fcn32s(3, small("googlenet")).state_dict()
    report = models.load_backbone(models.fcn32s(9, small("googlenet")), state)
    assert not report.fresh
    assert report.unused == {"score_fr": "classifies into other classes"}


# Several heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("build", [models.fcn32s, models.fcn16s, models.fcn8s])
def test_heads_are_nets_on_one_trunk(build, learned):
    heads = {"sem": 5, "geo": 3}
    both = build(8, "demo", heads=heads, learned_upsampling=learned).double().eval()
    randomise(both)
    images = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    target = torch.stack([torch.randint(0, n, (2, 40, 33)) for n in heads.values()], dim=1)
    target[:, 1, :9] = 255
    weight = torch.rand(8, dtype=torch.float64)
    logits, labels, loss = [], [], 0
    for index, (name, classes) in enumerate(heads.items()):
        single = build(classes, "demo", learned_upsampling=learned).double().eval()
        single.load_state_dict(
            {
                key.replace(f"_{name}.", "."): value
                for key, value in both.state_dict().items()
                if not any(f"_{other}." in key for other in heads if other != name)
            }
        )
        logits.append(single(images))
        scores = single.scores(images)
        labels.append(scores.labels())
        own = weight[:5] if name == "sem" else weight[5:]
        loss = loss + scores.cross_entropy(target[:, index], own, ignore_index=255, reduction="sum")
    torch.testing.assert_close(both(images), torch.cat(logits, dim=1))
    scores = both.scores(images)
    torch.testing.assert_close(scores.logits(), torch.cat(logits, dim=1))
    found, shares = scores.labels(confidence=True)
    assert torch.equal(found, torch.stack(labels, dim=1))
    assert torch.equal(found, scores.labels())
    assert shares.shape == (2, 2, 40, 33)
    torch.testing.assert_close(
        scores.cross_entropy(target, weight, ignore_index=255, reduction="sum"), loss
    )
    with pytest.raises(ValueError, match=r"expected target of shape \[n, 2, h, w\]"):
        scores.cross_entropy(target[:, 0])
