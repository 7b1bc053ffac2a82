# SPDX-License-Identifier: Apache-2.0
"""Shift-and-stitch equals the net without its strides: the bridge between the two papers."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dilseg
from dilseg import models
from dilseg.models import remove_stride, shift_and_stitch
from dilseg.models.backbones import Conv2dReLU
from dilseg.models.dilatednet import _front_end_layers


def conv_pool_conv():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
    )


def strided_convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 5), stride=3), nn.BatchNorm2d(4), nn.GELU(),
        nn.Sequential(nn.Conv2d(4, 4, 2, stride=2, groups=2, bias=False), nn.Tanh()),
        nn.Conv2d(4, 3, 3, dilation=(1, 2)),
    )  # fmt: skip


def overlapping_poolings():
    """AlexNet's shape: convolution of stride 4, poolings of 3 with stride 2."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 5, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.LocalResponseNorm(5),
        nn.Conv2d(3, 3, 3, padding="valid"), nn.MaxPool2d(3, 2), nn.Dropout(0.5),
        nn.Conv2d(3, 2, 2),
    )  # fmt: skip


NARROW = models.Backbone("narrow", ((3,), (4,), (4, 4), (5, 5), (6,)), 3, 8, 1, 1)


def vgg(backbone, pool=2):
    """Convolutions and poolings as VGG-16's, without padding; stride 32."""
    layers, c_in = nn.Sequential(), 3
    for stage, widths in enumerate(backbone.stages, start=1):
        for index, channels in enumerate(widths, start=1):
            layers.add_module(f"conv{stage}_{index}", Conv2dReLU(c_in, channels, 3))
            c_in = channels
        kernel = 2 if stage < 4 else pool
        layers.add_module(f"pool{stage}", nn.MaxPool2d(kernel, 2, ceil_mode=True))
    layers.add_module("fc6", Conv2dReLU(c_in, backbone.fc_channels, backbone.fc_kernel))
    layers.add_module("fc7", Conv2dReLU(backbone.fc_channels, backbone.fc_channels, 1))
    layers.add_module("final", nn.Conv2d(backbone.fc_channels, 4, 1))
    return layers


def made(net):
    """A net in eval mode and float64 whose results are of order one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=(2 / max(1, parameter[0].numel())) ** 0.5)
    return net.double().eval()


@torch.no_grad()
def assert_the_same(net, stride, size, *, keep=1, channels=2):
    images = torch.randn(2, channels, *size, dtype=torch.float64)
    dense = remove_stride(net, keep=keep)(images)
    stitched = shift_and_stitch(net, images, stride, step=keep)
    h, w = dense.shape[-2:]
    assert min(h, w) > stride // keep  # every shift has a part in it
    torch.testing.assert_close(stitched[:, :, :h, :w], dense, rtol=1e-10, atol=1e-10)
    # Where no pooling rounds up, nothing is left over.
    assert stitched.shape == dense.shape or any(
        getattr(module, "ceil_mode", False) for module in net.modules()
    )
    # The net's own cells are among them.
    cells = net(images)[:, :, : -(-h * keep // stride), : -(-w * keep // stride)]
    step = stride // keep
    torch.testing.assert_close(dense[:, :, ::step, ::step], cells, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("build", "stride", "keep", "size"),
    [
        *((conv_pool_conv, 2, keep, (12 + y, 16 - y)) for keep in (1, 2) for y in range(4)),
        *((strided_convolutions, 6, keep, (42 + y, 52 - y)) for keep in (1, 3) for y in range(7)),
        (overlapping_poolings, 16, 1, (92, 93)),
        (overlapping_poolings, 16, 4, (94, 99)),
        (overlapping_poolings, 16, 8, (95, 97)),
    ],
)
def test_the_two_ways_agree(build, stride, keep, size):
    assert_the_same(made(build()), stride, size, keep=keep)


def test_the_two_ways_agree_for_a_net_of_vggs_shape():
    assert_the_same(made(vgg(NARROW)), 32, (263, 271), keep=8, channels=3)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_poolings_that_round_up_only_add_cells(ceil_mode):
    net = nn.Sequential(
        nn.MaxPool2d(3, 2, ceil_mode=ceil_mode), nn.Conv2d(2, 2, 2), nn.MaxPool2d(2, 2)
    )
    for side in range(16, 24):
        assert_the_same(made(net), 4, (side, 39 - side))


def test_it_is_the_front_end():
    """Where pool4 and pool5 only subsample, stitching leaves them out: DilatedNet's front end."""
    front_end = made(models.DilatedFrontEnd(4, NARROW))
    net = vgg(NARROW, pool=1).double().eval()
    net.load_state_dict(front_end.state_dict())
    dense = remove_stride(net, keep=8)
    published = {row.name: row.dilation for row in _front_end_layers(NARROW, 8)}
    for name, layer in dense.named_children():
        if isinstance(layer, nn.Conv2d):
            assert layer.dilation == (published.get(name, 1),) * 2
            assert isinstance(layer, dilseg.DilatedConv2d) == (published.get(name, 1) > 1)
    images = torch.randn(1, 3, 2 * 75 + 40, 2 * 75 + 48, dtype=torch.float64)
    with torch.no_grad():
        expected = front_end(images)
        torch.testing.assert_close(dense(images), expected, rtol=1e-12, atol=1e-12)
        stitched = shift_and_stitch(net, images, 32, step=8)
    assert stitched.shape == expected.shape == (1, 4, 5, 6)
    torch.testing.assert_close(stitched, expected, rtol=1e-10, atol=1e-10)


def test_padding_counts_near_the_border_only_or_not_at_all():
    late = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv2d(3, 2, 3, padding=2),
    )  # fmt: skip
    assert_the_same(made(late), 2, (20, 25))
    early = made(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), *list(conv_pool_conv())[2:]))
    images = torch.randn(1, 2, 24, 31, dtype=torch.float64)
    with torch.no_grad():
        dense, stitched = remove_stride(early)(images), shift_and_stitch(early, images, 2)
    assert dense.shape == stitched.shape
    inner = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(dense[inner], stitched[inner], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(dense, stitched)


def test_parameters_names_and_modes_are_those_of_the_net():
    net = strided_convolutions().train()
    net[1].eval()
    dense = remove_stride(net)
    assert [name for name, _ in dense.named_modules()] == [name for name, _ in net.named_modules()]
    ours = dict(dense.named_parameters())
    for name, parameter in net.named_parameters():
        assert ours[name] is parameter
    assert [m.training for m in dense.modules()] == [m.training for m in net.modules()]
    assert net[0].stride == (3, 3)  # left as it was
    assert remove_stride(net, keep=6)[3][0] is net[3][0]


def test_gradients_pass_both_ways():
    net = made(conv_pool_conv())
    images = torch.randn(1, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(way.square().sum(), [images, net[0].weight])
        for way in (remove_stride(net)(images), shift_and_stitch(net, images, 2))
    ]
    torch.testing.assert_close(*grads)


def test_relu_is_fused_into_what_is_dilated():
    net = nn.Sequential(
        Conv2dReLU(1, 2, 3, stride=2), Conv2dReLU(2, 2, 3),
        dilseg.DilatedConv2d(2, 2, 3, dilation=2, activation="relu"), nn.Conv2d(2, 1, 3),
    )  # fmt: skip
    dense = remove_stride(net)
    assert [type(layer).__name__ for layer in dense] == ["Conv2dReLU", *["DilatedConv2d"] * 3]
    assert [getattr(layer, "activation", None) for layer in dense[1:]] == ["relu", "relu", None]
    assert [layer.dilation[0] for layer in dense] == [1, 2, 4, 2]


def test_any_function_can_be_stitched():
    images = torch.randn(2, 3, 17, 22)
    pooled = shift_and_stitch(lambda x: F.avg_pool2d(x, 5, 3), images, 3)
    torch.testing.assert_close(pooled, F.avg_pool2d(images, 5, 1))


def test_the_page_does_what_it_says():
    page = Path(__file__).resolve().parents[1] / "docs" / "shift-and-stitch.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.DOTALL)
    exec(code, {})


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.AvgPool2d(2), NotImplementedError, r"but got 1\.0 \(AvgPool2d\)"),
        (nn.Linear(3, 3), NotImplementedError, r"but got 1\.0 \(Linear\).*convolutionalize"),
        (nn.MaxPool2d(2, return_indices=True), NotImplementedError, r"got 1\.0 = MaxPool2d\("),
        (nn.MaxPool2d(3, 1, padding=1), NotImplementedError, r"got 1\.0 = MaxPool2d\(.*padding=1"),
        (nn.Conv2d(2, 2, 3, stride=(1, 2)), ValueError, r"but got \(1, 2\) in 1\.0"),
        (nn.Conv2d(2, 2, 2, padding="same"), ValueError, r"but 1\.0 has padding='same'"),
        (
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            ValueError,
            r"padding=\(1, 1\), padding_mode='reflect'",
        ),
    ],
)
def test_what_cannot_be_dilated_is_named(layer, error, message):
    net = nn.Sequential(nn.MaxPool2d(2), nn.Sequential(layer))  # named 1.0
    with pytest.raises(error, match=message):
        remove_stride(net)


def test_other_errors():
    net = nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(3))
    with pytest.raises(ValueError, match=r"but got 3; the largest up to it is 2\. Use keep=2"):
        remove_stride(net, keep=3)
    for stride, step in ((4, 3), (4, 0), (0, 1)):
        with pytest.raises(ValueError, match=f"got step {step} and stride {stride}"):
            shift_and_stitch(net, torch.zeros(1, 1, 9, 9), stride, step=step)
