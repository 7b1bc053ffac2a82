# SPDX-License-Identifier: Apache-2.0
"""The FCN family against an independent statement of the published nets in plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dilseg import models
from dilseg.models.backbones import output_size
from dilseg.models.fcn import ScaledConv2d

# VGG-16's geometry with few channels, all different where they may be.
TINY = models.Backbone(
    name="tiny",
    stages=((3, 2), (3, 4), (4, 3, 5), (5, 6, 4), (3, 4, 5)),
    fc_kernel=7,
    fc_channels=6,
    fcn_image_padding=100,
    fcn_fc_padding=0,
)
BUILD = {32: models.fcn32s, 16: models.fcn16s, 8: models.fcn8s}
SIZES = [(1, 1), (2, 41), (31, 32), (33, 65), (64, 3), (70, 97)]


def randomise(model: nn.Module) -> None:
    """Give every parameter values that keep activations of order one; no layer stays zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel())
            parameter.normal_(std=math.sqrt(2 / fan_in))


def conv(state, name, x, padding=0):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)


def bilinear_by_loops(channels: int, k: int) -> torch.Tensor:
    """`surgery.interp`: the bilinear kernel on the diagonal of an ungrouped deconvolution."""
    f = (k + 1) // 2
    centre = f - 1 if k % 2 == 1 else f - 0.5
    weight = torch.zeros(channels, channels, k, k, dtype=torch.float64)
    for c in range(channels):
        for i in range(k):
            for j in range(k):
                weight[c, c, i, j] = (1 - abs(i - centre) / f) * (1 - abs(j - centre) / f)
    return weight


def deconv(state, name, x, k, s, padding=0):
    weight = state.get(f"{name}.weight")
    if weight is None:
        weight = bilinear_by_loops(x.shape[1], k)
    layer = nn.ConvTranspose2d(x.shape[1], x.shape[1], k, s, padding, bias=False).double()
    layer.weight = nn.Parameter(weight)
    return layer(x)


def crop(x, offset, like):
    return x[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]


def trunk(state, images, image_padding, convolutions, fc_padding=0):
    pools, x = {}, images
    for stage, count in enumerate(convolutions, start=1):
        for index in range(1, count + 1):
            padding = image_padding if (stage, index) == (1, 1) else 1
            x = F.relu(conv(state, f"conv{stage}_{index}", x, padding))
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
        pools[stage] = x
    x = F.relu(conv(state, "fc6", x, fc_padding))
    x = F.relu(conv(state, "fc7", x))
    return conv(state, "score_fr", x), pools


def published(state, images, stride, scale_pool4=1.0, scale_pool3=1.0):
    """The prototxts of voc-fcn32s, voc-fcn16s, voc-fcn8s and voc-fcn8s-atonce."""
    score, pools = trunk(state, images, 100, (2, 2, 3, 3, 3))
    if stride == 32:
        return crop(deconv(state, "upscore", score, 64, 32), 19, images)
    upscore2 = deconv(state, "upscore2", score, 4, 2)
    score_pool4 = conv(state, "score_pool4", scale_pool4 * pools[4])
    fuse_pool4 = upscore2 + crop(score_pool4, 5, upscore2)
    if stride == 16:
        return crop(deconv(state, "upscore16", fuse_pool4, 32, 16), 27, images)
    upscore_pool4 = deconv(state, "upscore_pool4", fuse_pool4, 4, 2)
    score_pool3 = conv(state, "score_pool3", scale_pool3 * pools[3])
    fuse_pool3 = upscore_pool4 + crop(score_pool3, 9, upscore_pool4)
    return crop(deconv(state, "upscore8", fuse_pool3, 16, 8), 31, images)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("stride", [32, 16, 8])
def test_equals_the_published_net(stride, learned):
    model = BUILD[stride](5, TINY, learned_upsampling=learned).double().eval()
    randomise(model)
    state = model.state_dict()
    for h, w in SIZES:
        images = torch.randn(1, 3, h, w, dtype=torch.float64)
        expected = published(state, images, stride)
        assert expected.shape == (1, 5, h, w)
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [16, 8])
def test_at_once_scales_the_pools(stride):
    model = BUILD[stride](3, TINY, at_once=True).double().eval()
    randomise(model)
    # Scores large enough for the factors to matter in the sum.
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, ScaledConv2d):
                layer.weight.mul_(1 / layer.input_scale)
                assert layer.input_scale == {"score_pool4": 0.01, "score_pool3": 0.0001}[name]
    images = torch.randn(2, 3, 45, 38, dtype=torch.float64)
    expected = published(model.state_dict(), images, stride, 0.01, 0.0001)
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(published(model.state_dict(), images, stride), expected)


def same_padded(state, images):
    """FCN-8s on the demo backbone: "same" padding, maps cropped to the finer one, no offsets."""
    score, pools = trunk(state, images, 1, (1, 1, 2, 2, 1), fc_padding=1)
    score_pool4 = conv(state, "score_pool4", pools[4])
    fuse_pool4 = crop(deconv(state, "upscore2", score, 4, 2, 1), 0, score_pool4) + score_pool4
    score_pool3 = conv(state, "score_pool3", pools[3])
    upscore_pool4 = deconv(state, "upscore_pool4", fuse_pool4, 4, 2, 1)
    fuse_pool3 = crop(upscore_pool4, 0, score_pool3) + score_pool3
    return crop(deconv(state, "upscore8", fuse_pool3, 16, 8, 4), 0, images)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_demo_backbone_is_aligned_by_the_same_rule(learned):
    model = models.fcn8s(4, "demo", learned_upsampling=learned).double().eval()
    randomise(model)
    for h, w in [(1, 1), (31, 32), (33, 47), (96, 97), (5, 130)]:
        images = torch.randn(1, 3, h, w, dtype=torch.float64)
        expected = same_padded(model.state_dict(), images)
        assert expected.shape == (1, 4, h, w)
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("stride", "expected_crop", "expected_offsets", "parameters"),
    [
        (32, 19, {}, 134_346_581),
        (16, 27, {"score_pool4": 5}, 134_346_581 + 512 * 21 + 21),
        (8, 31, {"score_pool4": 5, "score_pool3": 9}, 134_346_581 + (512 + 256) * 21 + 2 * 21),
    ],
)
def test_published_numbers(stride, expected_crop, expected_offsets, parameters):
    with torch.device("meta"):
        model = BUILD[stride](21)
    assert model.crop == expected_crop
    assert model.skip_offsets == expected_offsets
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.receptive_field == 404
    assert (model.output_stride, model.margin, model.num_classes) == (stride, 0, 21)


def test_published_layer_shapes():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in models.fcn8s(21).state_dict().items()}
    assert shapes["conv1_1.weight"] == (64, 3, 3, 3)
    assert shapes["conv5_3.weight"] == (512, 512, 3, 3)
    assert shapes["fc6.weight"] == (4096, 512, 7, 7)
    assert shapes["fc7.weight"] == (4096, 4096, 1, 1)
    assert shapes["score_fr.weight"] == (21, 4096, 1, 1)
    assert shapes["score_pool4.weight"] == (21, 512, 1, 1)
    assert shapes["score_pool3.weight"] == (21, 256, 1, 1)
    assert len(shapes) == 2 * (13 + 2 + 3)


def test_size_algebra_for_every_height():
    layers = models.fcn32s(1, TINY).layers
    for h in range(1, 1500):
        n = output_size(layers, h)
        assert n == math.ceil((h + 198) / 32) - 6 >= 1
        # Every crop stays inside its map.
        assert 19 + h <= 32 * n + 32
        assert 27 + h <= 16 * (2 * n + 2) + 16
        assert 31 + h <= 8 * (4 * n + 6) + 8


@pytest.mark.parametrize("h", [1, 57, 58, 59, 500, 1499])
def test_sizes_of_the_modules_follow_the_algebra(h):
    with torch.device("meta"):
        model = models.fcn32s(2, TINY)
        features, pools = model.extract(torch.empty(1, 3, h, 7), ("pool3", "pool4"))
    assert features.shape[-2] == math.ceil((h + 198) / 32) - 6
    assert pools["pool3"].shape[-2] == output_size(model.layers[:10], h)
    if h == 500:
        assert (pools["pool3"].shape[-2], pools["pool4"].shape[-2], features.shape[-2]) == (
            88,
            44,
            16,
        )


def test_receptive_field_is_what_gradients_reach(monkeypatch):
    # A maximum passes the gradient to one pixel; an average shows the whole window.
    monkeypatch.setattr(F, "max_pool2d", lambda x, k, s, p, ceil_mode: F.avg_pool2d(x, k, s, p))
    narrow = models.Backbone("narrow", ((1,) * 2,) * 2 + ((1,) * 3,) * 3, 7, 1, 100, 0)
    model = models.fcn32s(1, narrow).double().eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    images = torch.ones(1, 3, 634, 60, dtype=torch.float64, requires_grad=True)
    features, _ = model.extract(images)
    features[0, 0, 7, 0].backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero()
    # Cell i is centred on pixel 12.5 + 32 i.
    assert rows.min().item() + rows.max().item() == 2 * (12.5 + 32 * 7)
    assert rows.max() - rows.min() + 1 == 404


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 32, 63, 64])
def test_bilinear_kernel_equals_the_papers(size):
    expected = bilinear_by_loops(1, size)[0, 0]
    kernel = models.bilinear_kernel(size, dtype=torch.float64)
    torch.testing.assert_close(kernel, expected, rtol=0, atol=0)


def test_bilinear_kernel_rejects_an_empty_one():
    with pytest.raises(ValueError, match="size >= 1, but got 0"):
        models.bilinear_kernel(0)


def test_fresh_scores_are_zero_and_deconvolutions_bilinear():
    model = models.fcn8s(3, TINY, learned_upsampling=True)
    for name in ("score_fr", "score_pool4", "score_pool3"):
        assert not getattr(model, name).weight.any()
        assert not getattr(model, name).bias.any()
    for name, k in (("upscore2", 4), ("upscore_pool4", 4), ("upscore8", 16)):
        torch.testing.assert_close(getattr(model, name).weight.double(), bilinear_by_loops(3, k))
    assert isinstance(model.upscore8, nn.ConvTranspose2d)
    assert not model(torch.randn(1, 3, 40, 40)).any()


def test_fixed_and_learned_state_dicts_are_interchangeable():
    fixed = models.fcn8s(3, TINY).eval()
    randomise(fixed)
    images = torch.randn(1, 3, 50, 40)
    learned = models.fcn8s(3, TINY, learned_upsampling=True).eval()
    nn.init.ones_(learned.upscore2.weight)
    learned.load_state_dict(fixed.state_dict())
    torch.testing.assert_close(learned(images), fixed(images), rtol=1e-4, atol=1e-4)

    again = models.fcn8s(3, TINY).eval()
    again.load_state_dict(learned.state_dict())
    torch.testing.assert_close(again(images), fixed(images), rtol=0, atol=0)
    again.load_state_dict(learned.half().state_dict())


def test_fixed_upsampling_refuses_learned_weights():
    learned = models.fcn16s(3, TINY, learned_upsampling=True)
    with torch.no_grad():
        learned.upscore16.weight[0, 1, 3, 3] += 0.01
    with pytest.raises(RuntimeError, match=r"upscore16.weight: expected the fixed .* 0\.01 away"):
        models.fcn16s(3, TINY).load_state_dict(learned.state_dict())
    state = models.fcn16s(3, TINY).state_dict() | {"upscore2.weight": torch.zeros(3, 3, 3, 3)}
    with pytest.raises(RuntimeError, match=r"upscore2.weight: expected shape \(3, 3, 4, 4\)"):
        models.fcn16s(3, TINY).load_state_dict(state)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("backbone", ["demo", TINY], ids=["demo", "tiny"])
def test_every_parameter_learns(backbone, learned):
    model = models.fcn8s(3, backbone, dropout=0.0, learned_upsampling=learned)
    randomise(model)
    model.segment(torch.randn(2, 3, 40, 33)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_dropout_acts_in_training_only():
    model = models.fcn32s(3, "demo", dropout=0.5)
    randomise(model)
    images = torch.randn(1, 3, 40, 40)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    "options", [{"at_once": True}, {"learned_upsampling": True}], ids=["at_once", "learned"]
)
def test_autocast_and_channels_last_change_rounding_only(options):
    model = models.fcn8s(3, "demo", **options).eval()
    randomise(model)
    images = torch.randn(2, 3, 40, 53)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images).float()
    assert (rounded - expected).norm() < 0.02 * expected.norm()
    model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_compiles_as_one_graph_for_any_size():
    model = models.fcn8s(3, "demo").eval()
    randomise(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for h, w in [(40, 56), (33, 47), (64, 49)]:
        images = torch.randn(1, 3, h, w)
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes >= 1, but got 0"),
        ({"backbone": "vgg11"}, r"backbone one of \['alexnet', 'demo', .*\], but got 'vgg11'"),
        ({"stride": 8, "backbone": "alexnet"}, "stride 32 for 'alexnet', but got 8"),
        ({"stride": 32, "backbone": "googlenet", "fc_channels": 8}, "no fully connected layers"),
        ({"in_channels": 5, "backbone": "demo"}, r"in_channels 3 \(RGB\), 4 .*, but got 5"),
        (
            {"num_classes": 35, "backbone": "demo", "heads": {"sem": 33, "geo": 3}},
            "num_classes 36, that of the heads",
        ),
        ({"stride": 4, "backbone": "demo"}, r"stride one of \[8, 16, 32\], but got 4"),
        ({"stride": 32, "backbone": "demo", "at_once": True}, "at_once=False for stride 32"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.FCN(**arguments)


def test_build_by_name():
    assert models.build("fcn16s", 4, backbone="demo").output_stride == 16
    assert isinstance(models.build("frontend", 4, backbone="demo"), models.DilatedFrontEnd)
    assert models.build("dilatednet", 4, backbone="demo", context=None).context is None
    with pytest.raises(ValueError, match=r"one of \['dilatednet', .*'frontend'\], but got 'unet'"):
        models.build("unet", 4)
