# SPDX-License-Identifier: Apache-2.0
"""The kernels for few channels (csrc/cuda/dilated_conv2d/patch.h), whatever the plan says."""

import pytest
import torch
from helpers.convolution import assert_exact
from helpers.layouts import GRAD_LAYOUTS, channels_last, contiguous
from helpers.samples import DTYPES, ConvCase
from torch.nn import functional as F

from dilseg.functional import dilated_conv2d


@pytest.fixture
def device(prefer, device):
    prefer("patch")
    return device


FEW = [
    ConvCase("one_channel_each", n=3, c_in=1, c_out=1, h_in=5, w_in=6, padding=(1, 1)),
    ConvCase("one_pixel", n=1, c_in=3, c_out=11, h_in=1, w_in=1, kernel=(1, 1)),
    ConvCase("one_pixel_of_padding", n=1, c_in=2, c_out=3, h_in=1, w_in=1, padding=(2, 3)),
    ConvCase("chunk_minus_one", n=1, c_in=7, c_out=23, h_in=5, w_in=9, padding=(1, 1)),
    ConvCase("chunk_plus_one", n=1, c_in=9, c_out=25, h_in=5, w_in=9, padding=(1, 1)),
    ConvCase("voc_context", c_in=21, c_out=21, h_in=9, w_in=7, padding=(2, 2), dilation=(2, 2)),
    ConvCase("rgb_to_many", n=1, c_in=3, c_out=84, h_in=6, w_in=5, padding=(1, 1)),
    ConvCase("many_to_rgb", n=1, c_in=84, c_out=3, h_in=6, w_in=5, padding=(1, 1)),
    ConvCase("many", n=1, c_in=42, c_out=84, h_in=4, w_in=3, padding=(4, 4), dilation=(4, 4)),
    ConvCase("odd", n=1, c_in=19, c_out=42, h_in=7, w_in=5, kernel=(1, 3), padding=(0, 1)),
    ConvCase("most", n=1, c_in=96, c_out=96, h_in=3, w_in=2, kernel=(1, 1)),
    ConvCase("too_many", n=1, c_in=97, c_out=2, h_in=3, w_in=2, kernel=(1, 1)),
    ConvCase("batch_zero", n=0, c_in=3, c_out=5),
    ConvCase("tile_of_rows_minus_one", n=1, c_in=3, c_out=5, h_in=3, w_in=31, padding=(1, 1)),
    ConvCase("tile_of_rows", n=1, c_in=3, c_out=5, h_in=4, w_in=32, padding=(1, 1)),
    ConvCase("tile_of_rows_plus_one", n=1, c_in=3, c_out=5, h_in=5, w_in=33, padding=(1, 1)),
    ConvCase("one_row", n=1, c_in=3, c_out=5, h_in=1, w_in=131, padding=(1, 1)),
    ConvCase("one_column", n=1, c_in=3, c_out=5, h_in=131, w_in=1, padding=(1, 1)),
    ConvCase(
        "phases", n=1, c_in=8, c_out=11, h_in=19, w_in=37, padding=(16,) * 2, dilation=(16,) * 2
    ),
    ConvCase(
        "phases_by_axis", n=1, c_in=3, c_out=2, h_in=13, w_in=23, padding=(3, 4), dilation=(3, 5)
    ),
    ConvCase(
        "map_below_phases",
        n=1,
        c_in=5,
        c_out=4,
        h_in=5,
        w_in=7,
        padding=(19, 17),
        dilation=(19, 17),
    ),
    ConvCase("window_5x5", n=1, c_in=11, c_out=3, h_in=7, w_in=8, kernel=(5, 5), padding=(2, 2)),
    ConvCase(
        "window_7x7",
        n=1,
        c_in=9,
        c_out=4,
        h_in=9,
        w_in=8,
        kernel=(7, 7),
        padding=(6, 6),
        dilation=(2, 2),
    ),
    ConvCase("more_padding_than_taps", n=1, c_in=2, c_out=3, h_in=4, w_in=3, padding=(5, 9)),
]
# Too many weights for shared memory, which they pass through, for every tile again.
MANY_WEIGHTS = ConvCase(
    "many_weights", n=1, c_in=96, c_out=48, h_in=1, w_in=2, kernel=(5, 5), padding=(2, 2)
)
few_dtypes = pytest.mark.parametrize(
    "dtype", [d for d in DTYPES.values() if d != torch.float64], ids=lambda d: str(d)[6:]
)


@few_dtypes
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_few_channels_are_exact(case, layout, dtype, device):
    pads = [p for p in case.padding for _ in range(2)]
    assert_exact(case, pads, dtype, device, layout)


@pytest.mark.parametrize("pads", [[0, 3, 1, 0], [4, 0, 0, 5], [3, 2, 7, 1]], ids=str)
def test_few_channels_with_unequal_padding(pads, device):
    case = ConvCase("", n=1, c_in=3, c_out=5, h_in=7, w_in=6, dilation=(2, 3))
    assert_exact(case, pads, torch.float32, device)


@few_dtypes
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_few_channels_in_any_layout(layout, dtype, device):
    """Whole chunks of channels, which vectors load where they are aligned."""
    case = ConvCase("", c_in=16, c_out=8, h_in=6, w_in=5)
    assert_exact(case, [1] * 4, dtype, device, GRAD_LAYOUTS[layout])
    assert_exact(case, [1] * 4, dtype, device, lambda t: GRAD_LAYOUTS[layout](channels_last(t)))


def rms_error(ours, truth):
    return float((ours.double().cpu() - truth.cpu()).norm() / truth.norm().cpu())


@pytest.fixture(params=["ieee", "tf32"])
def precision(request):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


def test_many_weights_are_exact_in_16_bits(device):
    assert_exact(MANY_WEIGHTS, [2] * 4, torch.bfloat16, device)


def test_many_weights_are_exact_in_three_parts_and_in_two(precision, device):
    assert_exact(MANY_WEIGHTS, [2] * 4, torch.float32, device)


@pytest.mark.parametrize(("c_in", "c_out"), [(3, 5), (21, 21), (42, 11)])
def test_float32_of_few_channels_is_as_exact_as_asked(c_in, c_out, precision, device):
    case = ConvCase("", n=1, c_in=c_in, c_out=c_out, h_in=16, w_in=18, padding=(1, 1))
    tensors = case.tensors(torch.float32, device)[:2]
    g = case.grad_output(torch.float32, device)

    def all_three(f, dtype, device):
        x, w = (t.detach().to(device, dtype).requires_grad_() for t in tensors)
        out = f(x, w, padding=1)
        return [out.detach(), *torch.autograd.grad(out, (x, w), g.to(device, dtype))]

    truth = all_three(F.conv2d, torch.float64, "cpu")
    ours = all_three(dilated_conv2d, torch.float32, device)
    rivals = all_three(F.conv2d, torch.float32, "cpu")
    for k, t, r in zip(ours, rivals, truth, strict=True):
        limit = 1.5 * rms_error(t, r) if precision == "ieee" else 3e-4
        assert rms_error(k, r) <= limit
