# SPDX-License-Identifier: Apache-2.0
"""Convolutions on the CPU, on both sides of every threshold in csrc/cpu/dilated_conv2d_select.h."""

from dataclasses import replace

import pytest
import torch
from helpers.closeness import assert_bitwise_equal
from helpers.convolution import compare_all
from helpers.layouts import GRAD_LAYOUTS, channels_last
from helpers.samples import DTYPES, ConvCase
from torch.nn import functional as F

from dilseg.functional import dilated_conv2d

by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
by_activation = pytest.mark.parametrize("activation", [None, "relu"])


def _depthwise(name, c=3, fan=1, **options):
    options = {"padding": (1, 1), **options}
    return ConvCase(name, c_in=c, c_out=fan * c, groups=c, **options)


# What a name says is a branch of csrc/cpu/padded_planes.h or of the kernels over it.
DEPTHWISE = [
    _depthwise("as_wide_as_a_vector", h_in=19, w_in=8),
    _depthwise("wider_than_a_vector", h_in=19, w_in=9),
    _depthwise("many_vectors", n=1, h_in=5, w_in=211, dilation=(2, 2), padding=(2, 2)),
    _depthwise("strips", h_in=61, w_in=67),
    _depthwise("bands", c=1, h_in=301, w_in=130),
    _depthwise("bands_stride_2", c=1, h_in=301, w_in=230, stride=(2, 2)),
    _depthwise("bands_and_dilation", c=1, h_in=301, w_in=130, padding=(5, 5), dilation=(5, 5)),
    _depthwise("map_inside_the_dilation", h_in=7, w_in=11, padding=(13, 13), dilation=(13, 13)),
    _depthwise("zeros_shared_by_rows", h_in=33, w_in=33, padding=(12, 12), dilation=(12, 12)),
    _depthwise("no_zeros_to_share", h_in=23, w_in=33, padding=(0, 0), dilation=(3, 3)),
    _depthwise("padding_beyond_the_window", h_in=2, w_in=13, kernel=(2, 2), padding=(9, 20)),
    _depthwise("window_beyond_the_limit", h_in=2, w_in=3, padding=(1, 40), dilation=(1, 40)),
    _depthwise("phases", h_in=30, w_in=47, stride=(2, 2), dilation=(3, 3)),
    _depthwise("phases_of_one_axis", h_in=19, w_in=40, stride=(1, 3)),
    _depthwise("stride_beyond_the_window", h_in=23, w_in=40, stride=(5, 4), kernel=(2, 3)),
    _depthwise("stride_beyond_the_map", h_in=6, w_in=4, stride=(3, 9)),
    _depthwise("taps_of_two_chains", h_in=21, w_in=23, kernel=(9, 11), padding=(4, 5)),
    _depthwise("nine_three_and_one_tap", h_in=11, w_in=23, kernel=(2, 7), padding=(1, 3)),
    _depthwise("fan_2", fan=2, h_in=12, w_in=37, dilation=(2, 2), stride=(1, 2)),
    _depthwise("fan_4", fan=4, h_in=9, w_in=12),
    _depthwise("fan_beyond_the_limit", fan=5, h_in=9, w_in=12),
]


@by_dtype
@by_activation
@pytest.mark.parametrize("case", DEPTHWISE, ids=lambda c: c.name)
def test_depthwise(case, activation, dtype):
    x, w, b = case.tensors(dtype, "cpu")
    compare_all(case, x, w, b, case.grad_output(dtype, "cpu"), activation=activation)


@by_dtype
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "grad_output"])
def test_depthwise_layouts(which, layout, dtype):
    case = _depthwise("layouts", fan=2, h_in=11, w_in=13)
    x, w, _ = case.tensors(dtype, "cpu")
    tensors = {"input": x, "weight": w, "grad_output": case.grad_output(dtype, "cpu")}
    tensors[which] = GRAD_LAYOUTS[layout](tensors[which])
    compare_all(case, tensors["input"], tensors["weight"], None, tensors["grad_output"])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_depthwise_weights_that_are_not_finite(value):
    """They may meet padding only, and then must leave no trace where torch has none."""
    x = torch.ones(1, 2, 9, 40, requires_grad=True)
    w = torch.ones(2, 1, 3, 3)
    w[0, 0, 0] = w[0, 0, :, 2] = value
    geometry = (1, 2, 2, 2)
    out, want = dilated_conv2d(x, w, None, *geometry), F.conv2d(x, w, None, *geometry)
    torch.testing.assert_close(out, want, equal_nan=True)
    assert out[0, 1].isfinite().all()
    g = torch.ones_like(out)
    ours, theirs = (torch.autograd.grad(o, x, g)[0] for o in (out, want))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_depthwise_gradients_of_what_is_not_finite():
    """The weight's gradient is nan for the taps that meet the pixel, and for no other."""
    x = torch.ones(1, 2, 11, 13)
    x[0, 0, 0, 0] = float("inf")
    g = torch.zeros(1, 2, 11, 13)
    g[0, :, 5, 5] = 1.0
    ops = torch.ops.dilseg
    grad, _ = ops.dilated_conv2d_grad_weight(g, x, [3, 3], [1, 1], [2] * 4, [2, 2], 2, False)
    want = torch.ops.aten.convolution_backward(
        g, x, torch.ones(2, 1, 3, 3), None, [1, 1], [2, 2], [2, 2], False, [0, 0], 2,
        [False, True, False],
    )[1]  # fmt: skip
    torch.testing.assert_close(grad, want, equal_nan=True)


@pytest.mark.parametrize("name", ["bands", "fan_2", "zeros_shared_by_rows"])
def test_threads_do_not_change_the_bits_of_a_depthwise_convolution(name):
    case = next(c for c in DEPTHWISE if c.name == name)
    case = replace(case, n=4)
    inputs = [t.requires_grad_() for t in case.tensors(torch.float32, "cpu")]
    g = case.grad_output(torch.float32, "cpu")

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = dilated_conv2d(*inputs, *case.geometry)
            return (out.detach(), *torch.autograd.grad(out, inputs, g))
        finally:
            torch.set_num_threads(before)

    first = run(1)
    for threads in (2, 3, 7):
        for a, b in zip(first, run(threads), strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("case", DEPTHWISE, ids=lambda c: c.name)
@pytest.mark.parametrize("place", [lambda t: t, channels_last], ids=["nchw", "channels_last"])
def test_strides_are_those_of_the_meta_kernel(case, place):
    ops = torch.ops.dilseg
    top, left = case.padding
    tail = [list(case.stride), [top, top, left, left], list(case.dilation), case.groups]
    x, w, b = case.tensors(torch.float32, "cpu")
    x, g = place(x), place(case.grad_output(torch.float32, "cpu"))
    calls = [
        lambda x, w, b, g: ops.dilated_conv2d(x, w, b, *tail, "relu"),
        lambda x, w, b, g: ops.dilated_conv2d_grad_input(g, w, [case.h_in, case.w_in], *tail),
        lambda x, w, b, g: ops.dilated_conv2d_grad_weight(g, x, list(case.kernel), *tail, True)[0],
    ]
    tensors = (x, w, b, g)
    meta = [t if t is None else t.to("meta") for t in tensors]
    for call in calls:
        ours, promised = call(*tensors), call(*meta)
        assert ours.shape == promised.shape
        assert ours.stride() == promised.stride()
