# SPDX-License-Identifier: Apache-2.0
"""The GEMM kernels on tensor cores (csrc/cuda/dilated_conv2d/gemm.h), whatever the plan says."""

from dataclasses import dataclass, replace

import pytest
import torch
from helpers import emulation, reference
from helpers.closeness import assert_bitwise_equal
from helpers.convolution import eighths
from helpers.layouts import GRAD_LAYOUTS, channels_last, contiguous
from helpers.samples import randn
from torch.nn import functional as F


@dataclass(frozen=True)
class GemmCase:
    """A problem with the tile and the splits that shall run it."""

    name: str
    c_in: int
    c_out: int
    tile: int = 64
    splits: int = 1
    n: int = 1
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    box: tuple[int, int] = (0, 0)  # of the pixels of a tile of the map; 0 x 0: runs

    @property
    def output_size(self):
        pads = (sum(self.padding[:2]), sum(self.padding[2:]))
        return tuple(
            (length + p - d * (k - 1) - 1) // s + 1
            for length, p, d, k, s in zip(
                self.size, pads, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    def tensors(self, draw):
        """grad_output and input, by ``draw(shape, seed)``."""
        return (
            draw((self.n, self.c_out, *self.output_size), 1),
            draw((self.n, self.c_in, *self.size), 2),
        )


# A dtype, and how products of float32 are formed.
IEEE, BF16X3, TF32 = range(3)
GEMM_MATH = {
    "float16": (torch.float16, IEEE),
    "bfloat16": (torch.bfloat16, IEEE),
    "ieee": (torch.float32, IEEE),
    "bf16x3": (torch.float32, BF16X3),
    "tf32": (torch.float32, TF32),
}
DILATED = {"kernel": (3, 3), "padding": (2, 2, 2, 2), "dilation": (2, 2)}
GEMM_CASES = [
    GemmCase("8_channels", 8, 8),
    GemmCase("16_and_24_channels", 16, 24, **DILATED),
    GemmCase("small_tile_minus_8", 56, 64, splits=2),
    GemmCase("small_tile_plus_8", 72, 136),
    GemmCase("large_tile_minus_8", 120, 128, 128),
    GemmCase("large_tile_plus_8", 136, 72, 128, splits=2),
    GemmCase("odd_channels", 5, 21, **DILATED),
    GemmCase("odd_channels_large_tile", 131, 3, 128),
    GemmCase("groups_of_8_and_16", 16, 32, groups=2, **DILATED),
    GemmCase("groups_in_large_tiles", 16, 16, 128, groups=2),
    GemmCase(
        "dilation_larger_than_map",
        8,
        8,
        size=(3, 5),
        kernel=(3, 3),
        padding=(6, 6, 7, 7),
        dilation=(6, 7),
    ),
    GemmCase("stride_2_and_3", 8, 16, stride=(2, 3), **DILATED),
    GemmCase("unequal_padding", 8, 8, kernel=(2, 3), padding=(0, 3, 2, 1), dilation=(3, 1)),
    GemmCase("batch_3", 8, 8, n=3, splits=3, kernel=(3, 1), padding=(1, 1, 0, 0)),
    GemmCase("images_smaller_than_a_stage", 8, 8, n=41, size=(1, 2)),
    GemmCase("more_splits_than_stages", 8, 8, splits=8),
    GemmCase("many_taps", 8, 8, size=(3, 4), kernel=(9, 9), padding=(4, 4, 4, 4)),
    GemmCase("more_stages_than_in_flight", 8, 8, size=(17, 19), splits=2),
]
GEMM = {case.name: case for case in GEMM_CASES}


@pytest.fixture
def tensor_cores():
    """The weight gradient by the GEMM kernels, whatever the plan would choose."""
    if (reason := emulation.why_no_emulator()) is not None:
        pytest.skip(reason)

    def run(case, grad_output, x, precision=IEEE, channels_last_weight=False):
        return emulation.run_schedules(
            "dilated_conv2d_grad_weight_gemm",
            grad_output,
            x,
            case.kernel,
            case.stride,
            case.padding[::2],
            case.dilation,
            case.groups,
            case.tile,
            case.splits,
            precision,
            channels_last_weight,
        )

    with emulation.active():
        yield run


@pytest.fixture
def tensor_core_maps():
    """The output and the input's gradient by the GEMM kernels, as the case wants them."""
    if (reason := emulation.why_no_emulator()) is not None:
        pytest.skip(reason)

    def run(case, math, layout=contiguous, draw=None, relu=False, grad_input=True):
        dtype, precision = GEMM_MATH[math]
        draw = draw or exact(dtype)
        g, x = (layout(t) for t in case.tensors(draw))
        w = layout(draw((case.c_out, case.c_in // case.groups, *case.kernel), 3))
        b = draw((case.c_out,), 4)
        # Results have these strides, which must not overlap.
        like_g, like_x = (t.contiguous() if 0 in t.stride() else t for t in (g, x))
        tail = (case.stride, case.padding[::2], case.dilation, case.groups)
        plan = (case.tile, case.splits, case.box, precision)
        ours = [emulation.run_schedules("dilated_conv2d_gemm", x, w, b, like_g, *tail, relu, *plan)]
        if grad_input:
            ours.append(
                emulation.run_schedules(
                    "dilated_conv2d_grad_input_gemm", g, w, like_x, *tail, *plan
                )
            )
        return (g, x, w, b), *ours

    with emulation.active():
        yield run


def map_truth(case, g, x, w, b):
    top, bottom, left, right = case.padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    geometry = case.stride, (0, 0), case.dilation, case.groups
    grad = reference.conv2d_grad_input(g, w, padded.shape[2:], *geometry)
    height, width = case.size
    return (
        reference.conv2d(padded, w, b, *geometry),
        grad[:, :, top : top + height, left : left + width],
    )


def assert_maps_are_exact(run, case, math, layout=contiguous, relu=False):
    tensors, *ours = run(case, math, layout, relu=relu)
    truth = list(map_truth(case, *tensors))
    truth[0] = truth[0].relu() if relu else truth[0]
    for k, r in zip(ours, truth, strict=True):
        assert_bitwise_equal(k + 0, r.to(k.dtype) + 0)


def gemm_truth(case, grad_output, x):
    top, bottom, left, right = case.padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    return reference.conv2d_grad_weight(
        grad_output, padded, case.kernel, case.stride, (0, 0), case.dilation, case.groups
    )


def exact(dtype):
    return lambda shape, seed: eighths(shape, dtype, "cpu", seed=seed)


def assert_gemm_is_exact(run, case, math, layout=contiguous, **options):
    dtype, precision = GEMM_MATH[math]
    grad_output, x = (layout(t) for t in case.tensors(exact(dtype)))
    ours = run(case, grad_output, x, precision, **options)
    for k, r in zip(ours, gemm_truth(case, grad_output, x), strict=True):
        assert_bitwise_equal(k + 0, r.to(dtype) + 0)  # -0 + 0 = 0


# Every box of the plan, with maps that it does not divide.
BOX_CASES = [
    replace(GEMM["16_and_24_channels"], name=f"{h}x{w}", tile=tile, size=size, box=(h, w))
    for tile, size, boxes in [
        (128, (17, 21), [(8, 16), (16, 8), (4, 32), (32, 4), (2, 64)]),
        (128, (17, 21), [(11, 11), (7, 17), (6, 17), (8, 14), (10, 12)]),
        (64, (9, 19), [(8, 8), (4, 16), (16, 4), (2, 32), (2, 30)]),
        (64, (9, 19), [(7, 9), (9, 7), (5, 12), (4, 14), (3, 20)]),
    ]
    for h, w in boxes
]
MAP_CASES = [
    *GEMM_CASES,
    GemmCase("run_minus_one", 8, 8, size=(7, 9)),
    GemmCase("run", 8, 8, size=(8, 8)),
    GemmCase("run_plus_one", 8, 8, size=(5, 13)),
    GemmCase("box_with_stride", 8, 8, size=(11, 10), stride=(2, 3), box=(4, 16), **DILATED),
    GemmCase("box_and_splits", 72, 8, 128, splits=3, size=(9, 9), box=(8, 16), **DILATED),
    GemmCase("stride_beyond_the_kernel", 8, 8, size=(10, 11), stride=(3, 2)),
]


@pytest.mark.parametrize("math", ["bfloat16", "ieee"])
@pytest.mark.parametrize("case", MAP_CASES, ids=lambda c: c.name)
def test_emulated_gemm_maps_are_exact(case, math, tensor_core_maps):
    assert_maps_are_exact(tensor_core_maps, case, math)


@pytest.mark.parametrize("case", BOX_CASES, ids=lambda c: c.name)
def test_emulated_gemm_boxes_are_exact(case, tensor_core_maps):
    assert_maps_are_exact(tensor_core_maps, case, "bfloat16")


@pytest.mark.parametrize("math", ["float16", "bf16x3", "tf32"])
@pytest.mark.parametrize("name", ["small_tile_plus_8", "large_tile_plus_8"])
def test_emulated_gemm_maps_in_every_arithmetic(name, math, tensor_core_maps):
    assert_maps_are_exact(tensor_core_maps, GEMM[name], math, relu=True)


@pytest.mark.parametrize("math", ["bfloat16", "ieee"])
@pytest.mark.parametrize("layout", GRAD_LAYOUTS.values(), ids=lambda f: f.__name__)
def test_emulated_gemm_maps_of_layouts(layout, math, tensor_core_maps, one_schedule):
    assert_maps_are_exact(tensor_core_maps, GEMM["16_and_24_channels"], math, layout)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    ("math", "least", "most"), [("ieee", 0, None), ("bf16x3", 1e-6, 6e-6), ("tf32", 1e-4, 5e-4)]
)
def test_emulated_gemm_maps_of_long_sums(
    math, least, most, truncated, tensor_core_maps, one_schedule
):
    """Relative rms errors of sums of 4608 products; None: 1.5 times torch's in float32."""
    case = GemmCase("long_sum", 512, 24, kernel=(3, 3), size=(3, 4), padding=(1, 1, 1, 1))

    def draw(shape, seed):
        return randn(shape, torch.float32, "cpu", seed=seed)

    with emulation.truncated_sums(truncated):
        (g, x, w, b), out = tensor_core_maps(case, math, draw=draw, grad_input=False)
    truth = map_truth(case, g, x, w, b)[0]
    rival = F.conv2d(x, w, b, padding=1)

    def error(t):
        return float((t.double() - truth).norm() / truth.norm())

    assert least <= error(out) <= (most or 1.5 * error(rival))


@pytest.mark.parametrize(
    ("math", "least", "most"), [("ieee", 0, None), ("bf16x3", 1e-6, 6e-6), ("tf32", 1e-4, 5e-4)]
)
def test_emulated_gemm_grad_input_of_long_truncated_sums(
    math, least, most, tensor_core_maps, one_schedule
):
    case = GemmCase("long_sum", 24, 512, kernel=(3, 3), size=(3, 4), padding=(1, 1, 1, 1))

    def draw(shape, seed):
        return randn(shape, torch.float32, "cpu", seed=seed)

    with emulation.truncated_sums(True):
        (g, x, w, b), _, grad_input = tensor_core_maps(case, math, draw=draw)
    truth = map_truth(case, g, x, w, b)[1]
    rival = torch.nn.grad.conv2d_input(x.shape, w, g, padding=1)

    def error(t):
        return float((t.double() - truth).norm() / truth.norm())

    assert least <= error(grad_input) <= (most or 1.5 * error(rival))


@pytest.mark.parametrize("math", ["bfloat16", "ieee"])
@pytest.mark.parametrize("case", GEMM_CASES, ids=lambda c: c.name)
def test_emulated_gemm_grad_weight_is_exact(case, math, tensor_cores):
    assert_gemm_is_exact(tensor_cores, case, math)


@pytest.mark.parametrize("math", ["float16", "bf16x3", "tf32"])
@pytest.mark.parametrize("name", ["small_tile_plus_8", "large_tile_plus_8"])
def test_emulated_gemm_grad_weight_in_every_arithmetic(name, math, tensor_cores):
    assert_gemm_is_exact(tensor_cores, GEMM[name], math)


def packed_slice(x):
    """Some channels of a wider channels_last tensor, at 16-byte boundaries."""
    n, c, h, w = x.shape
    wide = channels_last(x.new_full((n, c + 16, h, w), float("nan")))
    wide[:, 8 : 8 + c] = x
    return wide[:, 8 : 8 + c]


@pytest.mark.parametrize("math", ["bfloat16", "ieee"])
@pytest.mark.parametrize("channels_last_weight", [False, True])
@pytest.mark.parametrize("layout", [*GRAD_LAYOUTS.values(), packed_slice], ids=lambda f: f.__name__)
def test_emulated_gemm_grad_weight_of_layouts(
    layout, channels_last_weight, math, tensor_cores, one_schedule
):
    assert_gemm_is_exact(
        tensor_cores,
        GEMM["16_and_24_channels"],
        math,
        layout,
        channels_last_weight=channels_last_weight,
    )


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("c_in", [5, 8])
def test_emulated_gemm_grad_weight_writes_channels_last(c_in, splits, tensor_cores):
    case = replace(GEMM["odd_channels"], c_in=c_in, splits=splits)
    assert_gemm_is_exact(tensor_cores, case, "bfloat16", channels_last, channels_last_weight=True)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    ("math", "least", "most"), [("ieee", 0, None), ("bf16x3", 1e-6, 6e-6), ("tf32", 1e-4, 5e-4)]
)
def test_emulated_gemm_grad_weight_of_long_sums(
    math, least, most, truncated, tensor_cores, one_schedule
):
    """Relative rms errors over 4608 pixels in one chain; None: 1.5 times torch's in float32."""
    dtype, precision = GEMM_MATH[math]
    case = GemmCase("long_sum", 24, 24, size=(64, 72))
    grad_output, x = case.tensors(lambda shape, seed: randn(shape, dtype, "cpu", seed=seed))
    truth = gemm_truth(case, grad_output, x)[0]
    rival = torch.ops.aten.convolution_backward(
        grad_output,
        x,
        x.new_zeros(truth.shape),
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, False],
    )[1]
    with emulation.truncated_sums(truncated):
        ours = tensor_cores(case, grad_output, x, precision)[0]

    def error(t):
        return float((t.double() - truth).norm() / truth.norm())

    assert least <= error(ours) <= (most or 1.5 * error(rival))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (GEMM["8_channels"], torch.float64),
        (replace(GEMM["8_channels"], n=0), torch.float32),
        (replace(GEMM["8_channels"], groups=2), torch.bfloat16),
        (replace(GEMM["8_channels"], c_in=16, c_out=24, groups=2), torch.bfloat16),
    ],
    ids=["float64", "batch_0", "groups_cut_chunks", "groups_cut_chunks_of_the_output"],
)
def test_emulated_gemm_grad_weight_refuses(case, dtype, tensor_cores):
    with pytest.raises(RuntimeError, match="the plan refuses the problem"):
        tensor_cores(case, *case.tensors(exact(dtype)))


def test_emulated_gemm_grad_weight_follows_torchs_switch_to_tf32(tensor_cores, emulated_kernel):
    emulated_kernel("gemm")
    case = GEMM["16_and_24_channels"]
    grad_output, x = case.tensors(lambda shape, seed: randn(shape, torch.float32, "cpu", seed=seed))
    truth = gemm_truth(case, grad_output, x)[0]

    def error():
        ours, _ = torch.ops.dilseg.dilated_conv2d_grad_weight(
            grad_output, x, case.kernel, case.stride, case.padding, case.dilation, 1, False
        )
        return float((ours.double() - truth).norm() / truth.norm())

    assert error() < 1e-6
    torch.backends.cudnn.allow_tf32 = True
    try:
        assert 1e-4 < error() < 5e-4
    finally:
        torch.backends.cudnn.allow_tf32 = False
