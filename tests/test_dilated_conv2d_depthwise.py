# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution, by its own kernels on a GPU (csrc/cuda/dilated_conv2d/depthwise.h)."""

from dataclasses import replace

import pytest
import torch
from helpers.closeness import assert_bitwise_equal
from helpers.convolution import compare_all
from helpers.layouts import GRAD_LAYOUTS, LAYOUTS, channels_last, contiguous
from helpers.samples import DEPTHWISE, DEPTHWISE_CASES, DTYPES, ConvCase
from torch.nn import functional as F

by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture
def device(prefer, device):
    prefer("depthwise")
    return device


by_layout = pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
by_two_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@by_dtype
@by_layout
@pytest.mark.parametrize("case", DEPTHWISE_CASES, ids=lambda c: c.name)
def test_depthwise_agrees_with_torch_and_reference(case, layout, dtype, device):
    x, w, b = case.tensors(dtype, device)
    compare_all(case, layout(x), w, b, layout(case.grad_output(dtype, device)))


@by_two_dtypes
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("name", ["vectors", "several_tiles", "multiplier_2"])
def test_depthwise_layouts(name, layout, dtype, device):
    case = replace(DEPTHWISE[name], h_in=13, w_in=9)
    x, w, b = case.tensors(dtype, device)
    w = LAYOUTS.get(layout, contiguous)(w)
    place = GRAD_LAYOUTS[layout]
    compare_all(case, place(x), w, b, place(case.grad_output(dtype, device)))


@by_dtype
def test_depthwise_of_two_memory_formats(dtype, device):
    """The weight's gradient reads two tensors."""
    case = DEPTHWISE["vectors"]
    x, w, b = case.tensors(dtype, device)
    g = case.grad_output(dtype, device)
    for one, other in ((contiguous, channels_last), (channels_last, contiguous)):
        compare_all(case, one(x), w, b, other(g))


@by_two_dtypes
@by_layout
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_is_exact_where_sums_are(stride, layout, dtype, device):
    """One rounding, with padding that differs on all four sides."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape):
        values = torch.randint(-4, 5, shape, generator=generator) / 8
        return layout(values.to(dtype)).to(device)

    x, w, b = draw(2, 8, 19, 14), draw(8, 1, 3, 3), draw(8, 1, 1, 1).flatten()
    top, bottom, left, right = pads = [3, 1, 0, 2]
    geometry = ([stride] * 2, pads, [2, 2], 8)
    leaf = x.double().requires_grad_()
    weight = w.double().requires_grad_()
    padded = F.pad(leaf, (left, right, top, bottom))
    expected = F.conv2d(padded, weight, b.double(), stride, 0, 2, 8)
    g = draw(*expected.shape)
    grad_x, grad_w = torch.autograd.grad(expected, (leaf, weight), g.double())

    ops = torch.ops.dilseg
    out = ops.dilated_conv2d(x, w, b, *geometry, "relu")
    assert_bitwise_equal(out, expected.detach().relu().to(dtype))
    ours = ops.dilated_conv2d_grad_input(g, w, x.shape[2:], *geometry)
    assert_bitwise_equal(ours + 0, grad_x.to(dtype) + 0)
    ours, grad_b = ops.dilated_conv2d_grad_weight(g, x, [3, 3], *geometry, True)
    assert_bitwise_equal(ours + 0, grad_w.to(dtype) + 0)
    assert_bitwise_equal(grad_b + 0, g.double().sum((0, 2, 3)).to(dtype) + 0)


@by_layout
@pytest.mark.parametrize("kernel", [3, 4], ids=["slides", "any_kernel"])
def test_depthwise_skips_the_padding(kernel, layout, device):
    """An infinity times a zero of the padding would be nan."""
    c = 4
    finite = torch.ones(1, c, 9, 8, device=device)
    w = torch.ones(c, 1, kernel, kernel, device=device)
    w[:, :, 0, 0] = float("inf")
    geometry = ([1, 1], [1, kernel - 2, 1, kernel - 2], [1, 1], c)
    ops = torch.ops.dilseg
    out = ops.dilated_conv2d(layout(finite), w, None, *geometry, None)
    assert out[:, :, 1:, 1:].isinf().all()
    assert out[:, :, 0].isfinite().all()
    assert out[:, :, :, 0].isfinite().all()
    grad = ops.dilated_conv2d_grad_input(layout(finite), w, [9, 8], *geometry)
    assert grad[:, :, :-1, :-1].isinf().all()
    assert grad[:, :, -1].isfinite().all()
    assert grad[:, :, :, -1].isfinite().all()
    x = finite.clone()
    x[:, :, 0, 0] = float("inf")
    size = [kernel, kernel]
    grad, _ = ops.dilated_conv2d_grad_weight(layout(finite), layout(x), size, *geometry, False)
    assert grad[:, :, :2, :2].isinf().all()
    assert grad[:, :, 2:].isfinite().all()
    assert grad[:, :, :, 2:].isfinite().all()


@by_two_dtypes
@by_layout
def test_emulated_depthwise_reads_little_twice(layout, dtype, counted, emulated_kernel):
    """The map of a depthwise ASPP, of few channels: filling the GPU costs more seams and slices."""
    emulated_kernel("depthwise")
    case = ConvCase("", 1, 64, 65, 65, 64, padding=(2, 2), dilation=(2, 2), groups=64, bias=False)
    x, w, _ = case.tensors(dtype, "cpu")
    x, g = layout(x), layout(case.grad_output(dtype, "cpu"))
    geometry = ([1, 1], [2] * 4, [2, 2], 64)
    ops = torch.ops.dilseg
    floor = 2 * x.numel() * x.element_size()
    for run, excess in (
        (lambda: ops.dilated_conv2d(x, w, None, *geometry, None), 1.15),
        (lambda: ops.dilated_conv2d_grad_input(g, w, [65, 65], *geometry), 1.15),
        (lambda: ops.dilated_conv2d_grad_weight(g, x, [3, 3], *geometry, True), 1.2),
    ):
        with counted() as traffic:
            run()
        assert floor <= traffic.total <= excess * floor
