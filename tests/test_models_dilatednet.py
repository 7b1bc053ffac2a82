# SPDX-License-Identifier: Apache-2.0
"""DilatedNet: layer tables, sizes, receptive fields, identity initialisation, alignment."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dilseg.nn
from dilseg import models

# VGG-16's geometry with few channels.
TINY = models.Backbone(
    name="tiny",
    stages=((3, 2), (3, 4), (4, 3, 5), (5, 6, 4), (3, 4, 5)),
    fc_kernel=7,
    fc_channels=6,
    fcn_image_padding=100,
    fcn_fc_padding=0,
)
KITTI = (1, 1, 2, 4, 8, 1)
CITYSCAPES = (1, 1, 2, 4, 8, 16, 32, 64, 1)


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=(2 / max(1, parameter[0].numel())) ** 0.5)


def published_front_end(state, x):
    """The deploy prototxts: VGG-16 without pool4 and pool5, valid, conv5 d=2, fc6 d=4."""

    def conv(name, x, dilation=1):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], dilation=dilation)

    for stage, count in enumerate((2, 2, 3, 3, 3), start=1):
        for index in range(1, count + 1):
            x = F.relu(conv(f"conv{stage}_{index}", x, dilation=2 if stage == 5 else 1))
        if stage < 4:
            x = F.max_pool2d(x, 2, 2, ceil_mode=True)
    x = F.relu(conv("fc6", x, dilation=4))
    return conv("final", F.relu(conv("fc7", x)))


@pytest.mark.parametrize("size", [(373, 380), (380, 388), (391, 404)])
def test_front_end_equals_the_published_net(size):
    model = models.DilatedFrontEnd(4, TINY).double().eval()
    randomise(model)
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    expected = published_front_end(model.state_dict(), images)
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "cells"),
    [
        ((628, 628), (32, 32)),
        ((852, 852), (60, 60)),
        ((884, 884), (64, 64)),
        ((900, 1100), (66, 91)),
        ((1396, 1396), (128, 128)),
        # 1640 - 372 is no multiple of 8: only poolings that round up give the published 159.
        ((852, 1640), (60, 159)),
    ],
)
def test_published_output_sizes(size, cells):
    with torch.device("meta"):
        model = models.DilatedFrontEnd(21)
        scores = model(torch.empty(1, 3, *size))
    assert scores.shape == (1, 21, *cells)


def test_published_front_end_numbers():
    with torch.device("meta"):
        model = models.DilatedFrontEnd(21)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert (model.margin, model.output_stride, model.receptive_field) == (186, 8, 380)
    assert shapes["fc6.weight"] == (4096, 512, 7, 7)
    assert shapes["final.weight"] == (21, 4096, 1, 1)
    assert sum(p.numel() for p in model.parameters()) == 134_346_581
    dilated = {n: m for n, m in model.named_modules() if isinstance(m, dilseg.nn.DilatedConv2d)}
    assert list(dilated) == ["conv5_1", "conv5_2", "conv5_3", "fc6"]
    assert [m.dilation for m in dilated.values()] == [(2, 2)] * 3 + [(4, 4)]
    assert all(m.padding == (0, 0) for m in model.modules() if isinstance(m, nn.Conv2d))


def test_front_end_starts_small_and_not_at_zero():
    final = models.DilatedFrontEnd(50, "demo").final
    assert final.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert not final.bias.any()


def test_front_end_receptive_field_and_centres(monkeypatch):
    # A maximum passes the gradient to one pixel; an average shows the whole window.
    monkeypatch.setattr(F, "max_pool2d", lambda x, k, s, p, ceil_mode: F.avg_pool2d(x, k, s, p))
    narrow = models.Backbone("narrow", ((1,) * 2,) * 2 + ((1,) * 3,) * 3, 7, 1, 100, 0)
    model = models.DilatedFrontEnd(1, narrow).double().eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    images = torch.ones(1, 3, 396, 380, dtype=torch.float64, requires_grad=True)
    scores = model(images)
    assert scores.shape[-2:] == (3, 1)
    for cell in range(3):
        (grad,) = torch.autograd.grad(scores[0, 0, cell, 0], images, retain_graph=True)
        rows = grad.abs().sum((0, 1, 3)).nonzero()
        assert rows.max() - rows.min() + 1 == 380
        assert (rows.max() + rows.min()) / 2 == 189.5 + 8 * cell


def test_front_end_names_the_way_out_for_small_images():
    model = models.DilatedFrontEnd(2, TINY)
    assert model.smallest_input == 373
    with pytest.raises(ValueError, match=r"at least 373 x 373 pixels, but got 372 x 500. Call"):
        model(torch.zeros(1, 3, 372, 500))


@pytest.mark.parametrize("backbone", ["demo", TINY], ids=["demo", "vgg16"])
def test_cell_i_speaks_for_block_i(backbone):
    """With kernels that only pass the centre on, a cell is the maximum of its 8x8 block."""
    net = models.DilatedFrontEnd(1, backbone).eval()
    with torch.no_grad():
        for conv in net.children():
            if isinstance(conv, nn.Conv2d):
                conv.weight.zero_()
                conv.bias.zero_()
                conv.weight[0, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
    blocks = torch.rand(1, 1, 4, 5)
    h, w = 29, 40
    images = torch.zeros(1, 3, h, w)
    images[:, :1] = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :h, :w]
    # The reflection that completes the last row of blocks repeats rows of the same blocks.
    assert torch.equal(net.cells(images), blocks)
    upsampled = F.interpolate(blocks, scale_factor=8, mode="bilinear", align_corners=False)
    torch.testing.assert_close(net.segment(images), upsampled[:, :, :h, :w])


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (8, 8), (17, 30)])
def test_segment_accepts_images_smaller_than_the_margin(size):
    model = models.dilatednet(3, "demo").eval()
    assert model.segment(torch.randn(2, 3, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("tile", [8, 16, 40, 64])
def test_tiles_do_not_change_the_result(tile):
    model = models.dilatednet(3, "demo").double().eval()
    randomise(model)
    images = torch.randn(1, 3, 37, 61, dtype=torch.float64)
    whole = model.segment(images)
    torch.testing.assert_close(model.segment(images, tile=tile), whole, rtol=1e-10, atol=1e-10)


def test_tiles_do_not_change_the_result_in_vggs_geometry():
    model = models.DilatedFrontEnd(3, TINY).double().eval()
    randomise(model)
    images = torch.randn(2, 3, 21, 33, dtype=torch.float64)
    with torch.no_grad():
        tiled, whole = model.cells(images, tile=16), model.cells(images)
    torch.testing.assert_close(tiled, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tile", [0, -8, 12])
def test_tile_is_a_multiple_of_the_stride(tile):
    with pytest.raises(ValueError, match=f"positive multiple of 8, but got {tile}. Use"):
        models.DilatedFrontEnd(2, "demo").segment(torch.zeros(1, 3, 20, 20), tile=tile)


def test_reflect_pad_equals_torch_where_torch_can():
    images = torch.randn(2, 3, 9, 7)
    expected = F.pad(images, (6, 2, 8, 0), mode="reflect")
    assert torch.equal(models.reflect_pad(images, 8, 0, 6, 2), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_reflect_pad_bounces_as_often_as_needed(size):
    line = torch.arange(size)[None]
    top, bottom = 3 * size + 2, 4 * size + 1
    padded = models.reflect_pad(line, 0, 0, top, bottom)[0].tolist()
    assert len(padded) == size + top + bottom
    # Both ways from the first column the pattern is the same: up to the last one and back.
    position, step, bounces = 0, 1, []
    for _ in padded[top:]:
        bounces.append(position)
        if size > 1:
            step = step if 0 <= position + step < size else -step
            position += step
    assert padded[top:] == bounces
    assert padded[top::-1] == bounces[: top + 1]


@pytest.mark.parametrize(
    ("width", "dilations", "channels"),
    [
        ("basic", (1, 1, 2, 4, 8, 16, 1), (21,) * 8),
        ("large", (1, 1, 2, 4, 8, 16, 1), (42, 42, 84, 168, 336, 672, 672, 21)),
        ("basic", KITTI, (21,) * 7),
        ("basic", CITYSCAPES, (21,) * 10),
    ],
)
def test_context_channel_tables(width, dilations, channels):
    with torch.device("meta"):
        context = models.ContextModule(21, width, dilations)
    convs = [m for m in context.children() if isinstance(m, nn.Conv2d)]
    assert tuple(conv.out_channels for conv in convs) == channels
    assert tuple(conv.dilation[0] for conv in convs) == (*dilations, 1)
    assert [conv.kernel_size for conv in convs] == [(3, 3)] * len(dilations) + [(1, 1)]
    for conv in convs:
        assert isinstance(conv, dilseg.nn.DilatedConv2d) == (conv.dilation != (1, 1))


def test_context_layer_names_are_the_published_ones():
    def names(dilations):
        with torch.device("meta"):
            return [n for n, _ in models.ContextModule(2, "basic", dilations).named_children()]

    head = ["ctx_conv1_1", "ctx_conv1_2", "ctx_conv2_1", "ctx_conv3_1", "ctx_conv4_1"]
    tail = ["ctx_fc1", "ctx_final"]
    assert names(KITTI) == head + tail
    assert names((1, 1, 2, 4, 8, 16, 1)) == [*head, "ctx_conv5_1", *tail]
    assert names(CITYSCAPES) == [*head, "ctx_conv5_1", "ctx_conv6_1", "ctx_conv7_1", *tail]


@pytest.mark.parametrize(("width", "count"), [("basic", 28_392), ("large", 6_803_139)])
def test_context_parameter_counts(width, count):
    with torch.device("meta"):
        context = models.ContextModule(21, width)
    assert sum(p.numel() for p in context.parameters()) == count


@pytest.mark.parametrize(
    ("dilations", "cells"), [((1, 1, 2, 4, 8, 16, 1), 67), (KITTI, 35), (CITYSCAPES, 259)]
)
def test_context_receptive_field_is_what_gradients_reach(dilations, cells):
    context = models.ContextModule(1, "basic", dilations).double()
    for parameter in context.parameters():
        nn.init.constant_(parameter, 0.5)
    scores = torch.ones(1, 1, 1, cells + 10, dtype=torch.float64, requires_grad=True)
    middle = (cells + 10) // 2
    context(scores)[0, 0, 0, middle].backward()
    columns = scores.grad[0, 0, 0].nonzero()
    assert columns.max() - columns.min() + 1 == cells == context.receptive_field
    assert (columns.max() + columns.min()) / 2 == middle


@pytest.mark.parametrize("padding", ["layer", "input"])
@pytest.mark.parametrize("width", ["basic", "large"])
def test_identity_initialisation_without_noise_passes_scores_on(width, padding):
    context = models.ContextModule(3, width, padding=padding, sigma=0.0)
    scores = torch.rand(2, 3, 6, 9)
    torch.testing.assert_close(context(scores), scores, rtol=1e-6, atol=0)
    # The ReLU clips negative scores at the start.
    torch.testing.assert_close(context(-scores), torch.zeros_like(scores), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("classes", "c_in", "c_out"), [(3, 3, 6), (3, 12, 6), (2, 4, 4), (5, 5, 5)]
)
def test_identity_initialisation_follows_the_formula(classes, c_in, c_out):
    weight = models.identity_init_(torch.empty(c_out, c_in, 3, 3), classes, sigma=1e-4)
    for b in range(c_out):
        for a in range(c_in):
            if a * classes // c_in == b * classes // c_out:
                assert weight[b, a, 1, 1].item() == pytest.approx(classes / c_out)
                weight[b, a, 1, 1] = 0
    assert 0 < weight.abs().max() < 1e-3


def test_identity_noise_has_the_asked_deviation():
    assert models.identity_init_(torch.empty(84, 42, 3, 3), 21).std().item() > 0.01
    context = models.ContextModule(21, "large", sigma=0.05)
    noise = context.ctx_conv4_1.weight.detach()[:, :, 0, 0]
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert not context.ctx_conv4_1.bias.any()


def test_the_two_paddings_agree_away_from_borders_only():
    per_layer = models.ContextModule(2, padding="layer").double()
    randomise(per_layer)
    once = models.ContextModule(2, padding="input").double()
    once.load_state_dict(per_layer.state_dict())
    assert once.ctx_conv1_1.padding == (33, 33)
    assert once.ctx_conv5_1.padding == (0, 0)
    scores = torch.randn(1, 2, 70, 67, dtype=torch.float64)
    a, b = per_layer(scores), once(scores)
    assert a.shape == b.shape == scores.shape
    torch.testing.assert_close(a[:, :, 33:-33, 33:-33], b[:, :, 33:-33, 33:-33])
    assert not torch.allclose(a[:, :, :3], b[:, :, :3])


def test_net_is_front_end_then_context():
    net = models.dilatednet(3, "demo", context="large").eval()
    randomise(net)
    images = torch.randn(1, 3, 174, 166)
    torch.testing.assert_close(net(images), net.context(net.front_end(images)))
    assert (net.margin, net.output_stride, net.num_classes) == (75, 8, 3)


def test_another_context_module_takes_the_place_of_ours(tmp_path):
    """Whatever maps class scores to class scores, such as a fused module with the same weights."""

    class Other(nn.Sequential):
        num_classes = 3

    ours = models.ContextModule(3, "basic")
    other = Other(*ours.children())
    net = models.dilatednet(3, "demo").eval()
    randomise(net)
    images = torch.randn(2, 3, 20, 33)
    target = torch.randint(3, (2, 20, 33))
    results = []
    for context in (ours, other):
        exchanged = models.DilatedNet(net.front_end, context)
        loss = exchanged.scores(images).cross_entropy(target, ignore_index=255)
        gradients = torch.autograd.grad(loss, list(exchanged.parameters()))
        cells = net.front_end.cells(images)
        results.append(
            (
                loss,
                *gradients,
                exchanged.segment(images),
                exchanged.refine(cells, (20, 33)).labels(),
            )
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(40, 24), (21, 30)])
def test_border_zero_is_the_published_deconvolution(size):
    """ctx_upsample of the Cityscapes net: kernel 16, stride 8, padding 4, one group per class."""
    net = models.dilatednet(3, "demo", border="zero").double().eval()
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    kernels = models.bilinear_kernel(16, dtype=torch.float64).expand(3, 1, 16, 16)
    full = F.conv_transpose2d(net.cells(images), kernels, stride=8, padding=4, groups=3)
    expected = full[:, :, : size[0], : size[1]]
    torch.testing.assert_close(net.segment(images), expected)
    torch.testing.assert_close(net.scores(images).logits(), expected)
    net.border = "clamp"
    inner = (..., slice(4, size[0] - 8), slice(4, size[1] - 8))
    torch.testing.assert_close(net.segment(images)[inner], expected[inner])
    assert not torch.allclose(net.segment(images), expected)
    with pytest.raises(ValueError, match="expected border 'clamp' or 'zero', but got 'reflect'"):
        models.dilatednet(3, "demo", border="reflect")


@pytest.mark.parametrize("padding", ["layer", "input"])
def test_autocast_and_channels_last_change_rounding_only(padding):
    net = models.dilatednet(3, "demo", context="large", padding=padding).eval()
    randomise(net)
    images = torch.randn(2, 3, 20, 33)
    expected = net.segment(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net.segment(images).float()
    assert (rounded - expected).norm() < 0.03 * expected.norm()
    net.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net.segment(images), expected, rtol=1e-4, atol=1e-4)


def test_context_learns_on_a_frozen_front_end():
    net = models.dilatednet(3, "demo", dropout=0.0)
    # Positive scores: the context module's ReLUs let all of them through.
    nn.init.ones_(net.front_end.final.bias)
    net.front_end.requires_grad_(False)
    net.segment(torch.randn(1, 3, 24, 17)).square().mean().backward()
    assert all(p.grad is None for p in net.front_end.parameters())
    assert all(p.grad is not None and p.grad.any() for p in net.context.parameters())


def test_every_parameter_learns_jointly():
    net = models.dilatednet(2, "demo", dropout=0.0)
    randomise(net)
    net.segment(torch.randn(1, 3, 24, 17)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": "huge"}, "width 'basic' or 'large', but got 'huge'"),
        ({"padding": "same"}, "padding 'layer' or 'input', but got 'same'"),
        ({"dilations": (1, 0)}, r"dilations one or more numbers >= 1, but got \(1, 0\)"),
        ({"dilations": ()}, r"dilations one or more numbers >= 1, but got \(\)"),
    ],
)
def test_wrong_context_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.ContextModule(2, **arguments)


def test_parts_must_agree_on_the_classes():
    with pytest.raises(ValueError, match="num_classes=3, as the front end, but got 4"):
        models.DilatedNet(models.DilatedFrontEnd(3, "demo"), models.ContextModule(4))


def test_identity_init_rejects_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"multiples of num_classes=3, but got \(4, 3, 3, 3\)"):
        models.identity_init_(torch.empty(4, 3, 3, 3), 3)
    with pytest.raises(ValueError, match="odd kernel sides, but got 2 x 3"):
        models.identity_init_(torch.empty(3, 3, 2, 3), 3)
