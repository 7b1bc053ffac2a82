# SPDX-License-Identifier: Apache-2.0
"""Convolutions on the CPU, on both sides of every threshold in csrc/cpu/dilated_conv2d_select.h."""

from dataclasses import replace

import pytest
import torch
from helpers.closeness import assert_bitwise_equal, assert_three_way
from helpers.convolution import compare_all
from helpers.layouts import GRAD_LAYOUTS, channels_last, contiguous
from helpers.samples import DTYPES, ConvCase, randn
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
    _depthwise("eight_rows_at_once", h_in=35, w_in=33, padding=(2, 1), dilation=(2, 1)),
    _depthwise("two_rows_and_one", h_in=13, w_in=23, padding=(5, 2), dilation=(5, 2)),
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


# The ReLU is one comparison after the sums, whatever their dtype.
by_dtype_and_activation = pytest.mark.parametrize(
    ("dtype", "activation"),
    [*((dtype, None) for dtype in DTYPES.values()), (torch.float32, "relu")],
    ids=[*DTYPES, "relu"],
)


@by_dtype_and_activation
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


# Odd maps share lines, and threads end inside of them: of small maps, several may wait for a line.
STREAMED = _depthwise("streamed", c=150, h_in=121, w_in=119, padding=(2, 2), dilation=(2, 2), n=1)
STREAMED_SMALL_MAPS = _depthwise("streamed_small_maps", c=77702, h_in=1, w_in=27, n=1)


@pytest.mark.parametrize(
    ("case", "threads"),
    [(STREAMED, 1), (STREAMED, 3), (STREAMED_SMALL_MAPS, 2)],
    ids=lambda v: v if isinstance(v, int) else v.name,
)
def test_a_depthwise_result_that_is_written_around_the_caches(case, threads):
    x, w, b = case.tensors(torch.float32, "cpu")
    assert x.nbytes > 8 << 20
    g = case.grad_output(torch.float32, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare_dense(case, x, w, b, g)
    finally:
        torch.set_num_threads(before)


def _dense(name, c_in=256, c_out=256, **options):
    options = {"n": 1, "h_in": 16, "w_in": 16, "padding": (1, 1), **options}
    return ConvCase(name, c_in=c_in, c_out=c_out, **options)


# Large enough for Winograd, but for those that say why not.
DENSE = [
    _dense("even_map"),
    _dense("odd_map", h_in=19, w_in=17),
    _dense("channels_that_fill_no_vector", c_in=261, c_out=259, n=2, h_in=15, w_in=13),
    _dense("several_bands", c_in=130, c_out=131, h_in=66, w_in=64),
    _dense("dilation_2", h_in=20, w_in=20, padding=(2, 2), dilation=(2, 2)),
    _dense("unequal_dilation", h_in=24, w_in=16, padding=(3, 1), dilation=(3, 1)),
    _dense("phases_of_unequal_size", h_in=31, w_in=31, padding=(4, 4), dilation=(4, 4)),
    _dense("several_chunks", n=9, padding=(2, 2), dilation=(2, 2)),
    _dense("no_padding", h_in=18, w_in=18, padding=(0, 0)),
    _dense("padding_beyond_the_window", h_in=12, w_in=12, padding=(3, 5)),
    _dense("tiles_beyond_the_phases", h_in=17, w_in=17, padding=(6, 6), dilation=(6, 6)),
    _dense("too_few_channels", c_in=64, c_out=64),
    _dense("stride_2", h_in=33, w_in=33, stride=(2, 2)),
    _dense("groups", groups=2),
]


def compare_dense(case, x, w, b, g, activation=None):
    """As compare_all, with torch in float64 for the truth: the slow reference takes minutes."""
    inputs = [t.detach().requires_grad_() for t in (x, w, b)]
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    ours = dilated_conv2d(*inputs, *case.geometry, activation=activation)
    rival = F.conv2d(*inputs, *case.geometry)
    truth = F.conv2d(*exact, *case.geometry)
    assert ours.dtype == x.dtype
    if activation is not None:
        assert_three_way(ours, rival.relu(), truth.relu(), depth=case.depth)
        return
    assert_three_way(ours, rival, truth, depth=case.depth)
    pixels = g.numel() // case.c_out
    for k, t, r, depth in zip(
        torch.autograd.grad(ours, inputs, g),
        torch.autograd.grad(rival, inputs, g),
        torch.autograd.grad(truth, exact, g.double()),
        (case.depth * case.c_out // case.c_in, pixels, pixels),
        strict=True,
    ):
        assert_three_way(k, t, r, depth=depth)


@pytest.mark.parametrize(
    ("case", "activation"),
    [*((case, None) for case in DENSE), *((case, "relu") for case in DENSE[1:4])],
    ids=lambda v: v if isinstance(v, str) else v and v.name,
)
def test_dense(case, activation):
    x, w, b = case.tensors(torch.float32, "cpu")
    compare_dense(case, x, w, b, case.grad_output(torch.float32, "cpu"), activation)


@pytest.mark.parametrize(
    ("dtype", "place"),
    [*((dtype, contiguous) for dtype in DTYPES.values()), (torch.float32, channels_last)],
    ids=[*DTYPES, "channels_last"],
)
def test_dense_in_every_dtype(place, dtype):
    case = _dense("dtypes", h_in=20, w_in=20, padding=(2, 2), dilation=(2, 2))
    x, w, b = case.tensors(dtype, "cpu")
    compare_dense(case, place(x), w, b, place(case.grad_output(dtype, "cpu")))


@pytest.mark.parametrize("layout", ["transposed", "channel_slice", "expanded"])
def test_dense_layouts(layout):
    case = _dense("layouts")
    place = GRAD_LAYOUTS[layout]
    x, w, b = case.tensors(torch.float32, "cpu")
    g = case.grad_output(torch.float32, "cpu")
    compare_dense(case, place(x), w, b, place(g))
    compare_dense(case, x, place(w), b, g)


@by_activation
def test_dense_pads_each_side_by_itself(activation):
    x = randn((1, 256, 15, 18), torch.float32, "cpu")
    w = randn((256, 256, 3, 3), torch.float64, "cpu", seed=2).div(48).float()
    top, bottom, left, right = uneven = [2, 1, 0, 3]
    padded = F.pad(x, (left, right, top, bottom))
    out = torch.ops.dilseg.dilated_conv2d(x, w, None, [1, 1], uneven, [1, 1], 1, activation)
    rival, truth = F.conv2d(padded, w), F.conv2d(padded.double(), w.double())
    if activation:
        rival, truth = rival.relu(), truth.relu()
    assert_three_way(out, rival, truth, depth=2304)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("which", [0, 1])
def test_dense_of_what_is_not_finite(which, value):
    """One pixel, or one weight, spoils the results that read it and no others of its tile."""
    case = _dense("not_finite")
    x, w, b = case.tensors(torch.float32, "cpu")
    (x, w)[which][0, 3, 1, 1] = value
    out = dilated_conv2d(x, w, b, *case.geometry)
    truth = F.conv2d(x, w, b, *case.geometry)
    assert torch.equal(out.isfinite(), truth.isfinite())
    assert torch.equal(out.isnan(), truth.isnan())
    finite = truth.isfinite()
    torch.testing.assert_close(out[finite], truth[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("library", "precision"), [("mkldnn", "bf16"), ("mkldnn", "ieee"), ("cuda", "tf32")]
)
def test_dense_under_precisions_of_single_backends(library, precision):
    """Where backends differ, torch raises for whoever asks for one precision of them all."""
    case = _dense("precision")
    x, w, b = case.tensors(torch.float32, "cpu")
    expected = F.conv2d(x.double(), w.double(), b.double(), *case.geometry)
    matmul = getattr(torch.backends, library).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        error = (dilated_conv2d(x, w, b, *case.geometry) - expected).norm() / expected.norm()
    finally:
        matmul.fp32_precision = before
    assert error < 2e-6


def test_dense_error_is_not_above_torchs():
    """Fewer products and shorter sums: what Winograd rounds more, it rounds less often."""
    case = _dense("error", c_in=512, c_out=128, h_in=32, w_in=32, padding=(2, 2), dilation=(2, 2))
    x, w, b = case.tensors(torch.float32, "cpu")
    truth = F.conv2d(x.double(), w.double(), b.double(), *case.geometry)
    error = (dilated_conv2d(x, w, b, *case.geometry) - truth).norm() / truth.norm()
    assert error < 6e-7  # 4608 products in one chain of float32 make 2e-6


# A window this wide is computed in channels_last inside, and one column less is not.
WIDE = [
    ConvCase("wide", n=2, c_in=21, c_out=21, h_in=20, w_in=20, padding=(4, 4), dilation=(4, 4)),
    ConvCase("nearly", n=2, c_in=21, c_out=21, h_in=20, w_in=20, padding=(4, 3), dilation=(4, 3)),
    ConvCase("five", c_in=12, c_out=5, h_in=21, w_in=23, kernel=(5, 5), dilation=(2, 2)),
    ConvCase("blocks", c_in=24, c_out=17, h_in=21, w_in=23, padding=(4, 4), dilation=(4, 4)),
    ConvCase("many", c_in=128, c_out=129, h_in=20, w_in=20, padding=(1, 4), dilation=(1, 4)),
    ConvCase("few", c_in=11, c_out=13, h_in=21, w_in=23, kernel=(5, 5), dilation=(2, 2)),
]


@by_dtype_and_activation
@pytest.mark.parametrize("case", WIDE, ids=lambda c: c.name)
def test_wide_windows(case, activation, dtype):
    x, w, b = case.tensors(dtype, "cpu")
    compare_dense(case, x, w, b, case.grad_output(dtype, "cpu"), activation)


@pytest.mark.parametrize("case", [*DEPTHWISE, *DENSE, *WIDE], ids=lambda c: c.name)
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


@pytest.mark.parametrize("name", ["dilation_2", "several_bands"])
def test_ten_runs_give_the_same_bits(name):
    case = next(c for c in DENSE if c.name == name)
    x, w, b = case.tensors(torch.float32, "cpu")
    x.requires_grad_()
    g = case.grad_output(torch.float32, "cpu")

    def run():
        out = dilated_conv2d(x, w, b, *case.geometry)
        return out.detach(), *torch.autograd.grad(out, x, g)

    first = run()
    for _ in range(9):
        for a, b_ in zip(first, run(), strict=True):
            assert_bitwise_equal(a, b_)
