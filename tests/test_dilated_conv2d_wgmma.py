# SPDX-License-Identifier: Apache-2.0
"""The kernels for wgmma and TMA (csrc/cuda/dilated_conv2d/wgmma.h), whatever the plan says."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import emulation, reference
from helpers.closeness import assert_bitwise_equal
from helpers.convolution import eighths
from helpers.layouts import GRAD_LAYOUTS, channels_last, contiguous
from helpers.samples import randn
from torch.nn import functional as F

import dilseg
from dilseg.functional import dilated_conv2d_plan


@dataclass(frozen=True)
class WgmmaCase:
    """A problem with the tiles that shall run it."""

    name: str
    c_in: int
    c_out: int
    tile_n: int = 64
    cluster: int = 1
    splits: int = 1
    box: tuple[int, int] = (0, 0)  # 0 x 0: runs
    n: int = 1
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)

    @property
    def output_size(self):
        pads = (sum(self.padding[:2]), sum(self.padding[2:]))
        return tuple(
            length + p - d * (k - 1)
            for length, p, d, k in zip(self.size, pads, self.dilation, self.kernel, strict=True)
        )

    @property
    def plan(self):
        return self.tile_n, self.cluster, self.splits, self.box


DILATED = {"kernel": (3, 3), "padding": (2, 2, 2, 2), "dilation": (2, 2)}
CASES = [
    WgmmaCase("8_channels", 8, 8),
    WgmmaCase("16_and_24_channels", 16, 24, **DILATED),
    WgmmaCase("step_minus_8", 56, 64, splits=2),
    WgmmaCase("step_plus_8", 72, 72),
    WgmmaCase("tile_minus_8", 24, 120, 128, cluster=2, size=(13, 11)),
    WgmmaCase("tile_plus_8", 24, 136, 128, cluster=2, size=(11, 13), **DILATED),
    WgmmaCase("large_tile", 136, 256, 256),
    WgmmaCase("large_tile_plus_8", 72, 264, 256, cluster=2, size=(15, 18), splits=2),
    WgmmaCase("odd_channels", 5, 21, **DILATED),
    WgmmaCase("odd_channels_of_a_pair", 131, 3, 128, cluster=2),
    WgmmaCase("one_channel", 1, 1, **DILATED),
    WgmmaCase(
        "dilation_larger_than_map",
        8,
        8,
        size=(3, 5),
        kernel=(3, 3),
        padding=(6, 6, 7, 7),
        dilation=(6, 7),
    ),
    WgmmaCase(
        "nothing_but_padding",
        8,
        8,
        box=(8, 16),
        size=(1, 1),
        kernel=(2, 2),
        padding=(9, 9, 9, 9),
        dilation=(3, 3),
    ),
    WgmmaCase("unequal_padding", 8, 8, kernel=(2, 3), padding=(0, 3, 2, 1), dilation=(3, 1)),
    WgmmaCase("batch_3", 8, 8, n=3, splits=3, kernel=(3, 1), padding=(1, 1, 0, 0)),
    WgmmaCase("runs_across_images", 8, 8, 128, cluster=2, n=41, size=(1, 7), **DILATED),
    WgmmaCase("more_splits_than_steps", 8, 8, splits=8),
    WgmmaCase("many_taps", 8, 8, size=(3, 4), kernel=(9, 9), padding=(4, 4, 4, 4)),
    WgmmaCase("more_steps_than_stages", 200, 8, size=(5, 5), **DILATED),
    WgmmaCase("more_tiles_than_blocks", 8, 200, size=(31, 33), n=2),
    WgmmaCase("more_pairs_than_slots", 8, 200, 128, cluster=2, size=(31, 33), splits=2, **DILATED),
    WgmmaCase(
        "padding_beyond_the_window",
        8,
        8,
        size=(5, 6),
        kernel=(2, 3),
        padding=(4, 3, 5, 3),
        dilation=(2, 1),
    ),
    WgmmaCase(
        "farthest_offsets",
        8,
        8,
        size=(2, 3),
        kernel=(1, 2),
        padding=(0, 0, 127, 128),
        dilation=(1, 255),
    ),
    WgmmaCase("one_wide", 8, 16, size=(130, 1), kernel=(3, 1), padding=(1, 1, 0, 0)),
    WgmmaCase("run_minus_one", 8, 8, size=(1, 127)),
    WgmmaCase("run", 8, 8, size=(8, 16)),
    WgmmaCase("run_plus_one", 8, 8, 128, cluster=2, size=(3, 43)),
]
NAMED = {case.name: case for case in CASES}
# Every box of the plan, with maps that it does not divide.
BOX_CASES = [
    replace(NAMED["16_and_24_channels"], name=f"{h}x{w}", size=(17, 21), box=(h, w))
    for h, w in [
        (8, 16), (16, 8), (11, 11), (4, 32), (32, 4), (2, 64), (1, 128), (7, 17), (6, 17), (6, 21),
    ]
]  # fmt: skip
PAIRED_BOX_CASES = [
    replace(case, name=f"{case.name}_in_pairs", tile_n=128, cluster=2, c_out=72)
    for case in BOX_CASES[:3]
] + [replace(BOX_CASES[0], name="box_and_splits", splits=3)]


def exact(dtype):
    return lambda shape, seed: eighths(shape, dtype, "cpu", seed=seed)


@pytest.fixture
def wgmma():
    """The output and the input's gradient by these kernels, as the case wants them."""
    if (reason := emulation.why_no_emulator()) is not None:
        pytest.skip(reason)

    def run(
        case,
        dtype=torch.bfloat16,
        layout=contiguous,
        relu=False,
        weight_layout=contiguous,
        precision=0,
        draw=None,
    ):
        draw = draw or exact(dtype)
        g = layout(draw((case.n, case.c_out, *case.output_size), 1))
        x = layout(draw((case.n, case.c_in, *case.size), 2))
        w = weight_layout(draw((case.c_out, case.c_in, *case.kernel), 3))
        b = draw((case.c_out,), 4)
        # Results have these strides, which must not overlap.
        like_g, like_x = (t.contiguous() if 0 in t.stride() else t for t in (g, x))
        tail = (case.padding[::2], case.dilation)
        plan = (*case.plan, precision)
        return (
            (g, x, w, b),
            emulation.run_schedules("dilated_conv2d_wgmma", x, w, b, like_g, *tail, relu, *plan),
            emulation.run_schedules("dilated_conv2d_grad_input_wgmma", g, w, like_x, *tail, *plan),
        )

    with emulation.active():
        yield run


def truth(case, g, x, w, b):
    top, bottom, left, right = case.padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    geometry = (1, 1), (0, 0), case.dilation, 1
    grad = reference.conv2d_grad_input(g, w, padded.shape[2:], *geometry)
    height, width = case.size
    return (
        reference.conv2d(padded, w, b, *geometry),
        grad[:, :, top : top + height, left : left + width],
    )


def assert_exact(run, case, dtype=torch.bfloat16, relu=False, **layouts):
    tensors, *ours = run(case, dtype, relu=relu, **layouts)
    expected = list(truth(case, *tensors))
    expected[0] = expected[0].relu() if relu else expected[0]
    for k, r in zip(ours, expected, strict=True):
        assert_bitwise_equal(k + 0, r.to(k.dtype) + 0)  # -0 + 0 = 0


@pytest.mark.parametrize(
    "case", [*CASES, *BOX_CASES, *PAIRED_BOX_CASES], ids=lambda case: case.name
)
def test_emulated_wgmma_is_exact(case, wgmma):
    assert_exact(wgmma, case, layout=channels_last)


@pytest.mark.parametrize("layout", GRAD_LAYOUTS.values(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["16_and_24_channels", "tile_plus_8"])
def test_emulated_wgmma_of_layouts(name, layout, wgmma, one_schedule):
    assert_exact(wgmma, NAMED[name], layout=layout, weight_layout=channels_last)


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 1)], ids=str)
def test_emulated_wgmma_of_rows_with_gaps(size, wgmma, one_schedule):
    """Views of larger maps, some of whose axes have one element."""

    def cut(x):
        n, c, h, w = x.shape
        large = channels_last(x.new_zeros(n, c, h + 1, w + 2))
        large[:, :, :h, 1 : w + 1] = x
        return large[:, :, :h, 1 : w + 1]

    assert_exact(wgmma, WgmmaCase("", 24, 24, n=2, size=size, **DILATED), layout=cut)


@pytest.mark.parametrize("splits", [1, 2])
def test_emulated_wgmma_in_float16_with_relu(splits, wgmma, one_schedule):
    case = replace(NAMED["tile_plus_8"], splits=splits)
    assert_exact(wgmma, case, torch.float16, relu=True, layout=channels_last)


def test_emulated_wgmma_lets_nan_through_the_relu(wgmma, emulated_kernel):
    emulated_kernel("wgmma")
    x = channels_last(torch.full((1, 8, 3, 3), float("nan"), dtype=torch.bfloat16))
    w = torch.ones(8, 8, 1, 1, dtype=torch.bfloat16)
    out = torch.ops.dilseg.dilated_conv2d(x, w, None, [1, 1], [0] * 4, [1, 1], 1, "relu")
    assert out.isnan().all()


def test_emulated_wgmma_skips_taps_in_the_padding(wgmma, emulated_kernel):
    """An infinite weight at a tap that no pixel of a tile meets is not multiplied by zeros."""
    case = WgmmaCase("", 8, 8, box=(8, 16), size=(4, 4), kernel=(3, 3), padding=(9, 9, 9, 9),
                     dilation=(9, 9))  # fmt: skip
    x = channels_last(torch.ones(1, 8, 4, 4, dtype=torch.bfloat16))
    w = torch.ones(8, 8, 3, 3, dtype=torch.bfloat16)
    w[:, :, 0, 0] = float("inf")
    out = emulation.run_schedules(
        "dilated_conv2d_wgmma",
        x, w, None, torch.empty_like(x), (9, 9), (9, 9), False, *case.plan, 0,
    )  # fmt: skip
    assert (out == 8).all()


@pytest.mark.parametrize(
    ("case", "dtype", "words"),
    [
        (NAMED["8_channels"], torch.float64, "the plan refuses"),
        (replace(NAMED["8_channels"], n=0), torch.bfloat16, "the plan refuses"),
        (
            replace(NAMED["16_and_24_channels"], dilation=(128, 1), padding=(128, 128, 1, 1)),
            torch.bfloat16,
            "im2col mode does not reach",
        ),
    ],
    ids=["float64", "batch_0", "dilation_beyond_im2col"],
)
def test_emulated_wgmma_refuses(case, dtype, words, wgmma):
    with pytest.raises(RuntimeError, match=words):
        wgmma(case, dtype)


# Floats in parts ---------------------------------------------------------------------------------

IEEE, BF16X3, TF32 = range(3)  # Float32Precision
# No tile of 256: its sums would leave no registers for a second set.
FLOAT_CASES = [
    NAMED["odd_channels"],
    NAMED["tile_plus_8"],
    NAMED["step_minus_8"],
    NAMED["batch_3"],
    NAMED["dilation_larger_than_map"],
    NAMED["nothing_but_padding"],
    NAMED["more_steps_than_stages"],
    replace(NAMED["large_tile_plus_8"], name="pair_and_splits", tile_n=128),
    replace(NAMED["large_tile"], name="promoted_twice", c_in=600, c_out=72, tile_n=128),
    replace(BOX_CASES[2], size=(7, 9)),
    replace(PAIRED_BOX_CASES[0], size=(9, 11)),
]


def in_bits(count):
    """Floats of `count` significant bits, and weights that are powers of two: exact sums."""

    def draw(shape, seed):
        generator = torch.Generator().manual_seed(seed)
        most = 2 ** (count - 1)
        if len(shape) == 4 and seed != 3:
            whole = torch.randint(most, 2 * most, tuple(shape), generator=generator)
            return whole.float() * 2.0 ** (1 - count)
        return 2.0 ** -torch.randint(0, 2, tuple(shape), generator=generator).float()

    return draw


by_precision = pytest.mark.parametrize("precision", [IEEE, BF16X3], ids=["ieee", "bf16x3"])


@by_precision
@pytest.mark.parametrize("case", FLOAT_CASES, ids=lambda case: case.name)
def test_emulated_wgmma_of_floats_is_exact(case, precision, wgmma, one_schedule):
    assert_exact(wgmma, case, torch.float32, relu=True, precision=precision, layout=channels_last)


@by_precision
def test_emulated_wgmma_of_floats_under_every_schedule(precision, wgmma):
    """The ring of two or three stages, in pairs of blocks."""
    case = WgmmaCase("", 200, 72, 128, cluster=2, size=(3, 43), kernel=(1, 2), padding=(0, 0, 1, 1))
    assert_exact(wgmma, case, torch.float32, precision=precision, layout=channels_last)


@pytest.mark.parametrize("layout", GRAD_LAYOUTS.values(), ids=lambda f: f.__name__)
def test_emulated_wgmma_of_floats_in_layouts(layout, wgmma, one_schedule):
    assert_exact(wgmma, NAMED["16_and_24_channels"], torch.float32, layout=layout)


@pytest.mark.parametrize(("precision", "bits"), [(IEEE, 22), (BF16X3, 15)], ids=["ieee", "bf16x3"])
def test_emulated_wgmma_multiplies_every_part(precision, bits, wgmma, one_schedule):
    """One product per sum, of numbers that need all their parts."""
    case = WgmmaCase("", 1, 8, size=(5, 6))
    (g, x, w, b), out, _ = wgmma(
        case, torch.float32, precision=precision, draw=in_bits(bits)
    )  # the bias costs one bit
    assert_bitwise_equal(out, truth(case, g, x, w, b)[0].float())
    case = WgmmaCase("", 8, 1, size=(5, 6))
    (g, x, w, b), _, grad = wgmma(case, torch.float32, precision=precision, draw=in_bits(bits))
    assert_bitwise_equal(grad, truth(case, g, x, w, b)[1].float())


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    ("precision", "least", "most"), [(IEEE, 0, None), (BF16X3, 1e-6, 6e-6)], ids=["ieee", "bf16x3"]
)
def test_emulated_wgmma_of_long_sums(precision, least, most, truncated, wgmma, one_schedule):
    """Relative rms errors of sums of 4608 products; None: 1.5 times torch's in float32."""
    case = WgmmaCase("", 512, 24, kernel=(3, 3), size=(3, 4), padding=(1, 1, 1, 1))

    def draw(shape, seed):
        return randn(shape, torch.float32, "cpu", seed=seed)

    with emulation.truncated_sums(truncated):
        (g, x, w, b), out, grad = wgmma(case, torch.float32, precision=precision, draw=draw)
    rivals = (
        F.conv2d(x, w, b, padding=1),
        torch.nn.grad.conv2d_input(x.shape, w, g, padding=1),
    )
    for ours, rival, exactly in zip((out, grad), rivals, truth(case, g, x, w, b), strict=True):

        def error(t, exactly=exactly):
            return float((t.double() - exactly).norm() / exactly.norm())

        assert (least if ours is out else 0) <= error(ours) <= (most or 1.5 * error(rival))


def test_emulated_wgmma_leaves_tf32_to_others(wgmma):
    with pytest.raises(RuntimeError, match="the plan refuses"):
        wgmma(NAMED["8_channels"], torch.float32, precision=TF32)


# The weight gradient -----------------------------------------------------------------------------

# tile_n counts channels of the input here, 128 those of the output; a step is 64 pixels.
GRAD_WEIGHT_CASES = [
    *(case for case in CASES if case.name not in ("many_taps", "more_pairs_than_slots")),
    WgmmaCase("input_tile_minus_8", 120, 136, 128, cluster=2),
    WgmmaCase("input_tile_plus_8", 136, 120, 128, splits=2, **DILATED),
    WgmmaCase("large_input_tile_plus_8", 264, 136, 256, cluster=2, splits=2, size=(11, 13)),
    WgmmaCase("large_input_tile_of_one_block", 256, 72, 256, **DILATED),
    WgmmaCase("output_tile_plus_8", 72, 264, 128, cluster=2),
    WgmmaCase("more_pixels_than_stages", 8, 8, size=(25, 27)),
    WgmmaCase("more_pixels_than_stages_of_a_pair", 136, 136, 256, cluster=2, size=(18, 19)),
    WgmmaCase("no_padding", 8, 16, n=2, size=(13, 11), kernel=(3, 3), dilation=(2, 3)),
    WgmmaCase(
        "farthest_corners",
        8,
        8,
        size=(1, 129),
        kernel=(1, 3),
        padding=(0, 0, 127, 127),
        dilation=(1, 127),
    ),
]
GRAD_WEIGHT = {case.name: case for case in GRAD_WEIGHT_CASES}
# Blocks and pairs that go on to a second tile; there are 132 and 66 of them.
SECOND_TILE_CASES = [
    WgmmaCase("more_weights_than_blocks", 136, 8, kernel=(7, 7), size=(8, 7)),
    # Four of nine taps meet the map, so that most of the 72 pairs' tiles are empty.
    WgmmaCase(
        "more_weights_than_pairs",
        8,
        136,
        128,
        cluster=2,
        splits=8,
        size=(1, 500),
        kernel=(9, 1),
        padding=(5, 6, 0, 0),
    ),
]


@pytest.fixture
def wgmma_grad_weight():
    """The gradients of weight and bias by these kernels, as the case wants them."""
    if (reason := emulation.why_no_emulator()) is not None:
        pytest.skip(reason)

    def run(case, grad_output, x, channels_last_weight=True):
        return emulation.run_schedules(
            "dilated_conv2d_grad_weight_wgmma",
            grad_output,
            x,
            case.kernel,
            case.padding[::2],
            case.dilation,
            case.tile_n,
            case.cluster,
            case.splits,
            channels_last_weight,
        )

    with emulation.active():
        yield run


def operands(case, dtype=torch.bfloat16, layout=channels_last):
    draw = exact(dtype)
    return (
        layout(draw((case.n, case.c_out, *case.output_size), 1)),
        layout(draw((case.n, case.c_in, *case.size), 2)),
    )


def assert_grad_weight_is_exact(run, case, dtype=torch.bfloat16, layout=channels_last, **options):
    grad_output, x = operands(case, dtype, layout)
    top, bottom, left, right = case.padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    expected = reference.conv2d_grad_weight(
        grad_output, padded, case.kernel, (1, 1), (0, 0), case.dilation, 1
    )
    for k, r in zip(run(case, grad_output, x, **options), expected, strict=True):
        assert_bitwise_equal(k + 0, r.to(k.dtype) + 0)  # -0 + 0 = 0


@pytest.mark.parametrize("case", GRAD_WEIGHT_CASES, ids=lambda case: case.name)
def test_emulated_wgmma_grad_weight_is_exact(case, wgmma_grad_weight):
    assert_grad_weight_is_exact(wgmma_grad_weight, case)


@pytest.mark.parametrize("case", SECOND_TILE_CASES, ids=lambda case: case.name)
def test_emulated_wgmma_grad_weight_of_many_tiles(case, wgmma_grad_weight, one_schedule):
    assert_grad_weight_is_exact(wgmma_grad_weight, case)


@pytest.mark.parametrize("channels_last_weight", [False, True])
@pytest.mark.parametrize("layout", GRAD_LAYOUTS.values(), ids=lambda f: f.__name__)
def test_emulated_wgmma_grad_weight_of_layouts(
    layout, channels_last_weight, wgmma_grad_weight, one_schedule
):
    case = NAMED["16_and_24_channels"]
    assert_grad_weight_is_exact(
        wgmma_grad_weight, case, layout=layout, channels_last_weight=channels_last_weight
    )


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("c_in", [5, 72])
def test_emulated_wgmma_grad_weight_in_float16(c_in, splits, wgmma_grad_weight, one_schedule):
    case = replace(NAMED["16_and_24_channels"], c_in=c_in, splits=splits)
    assert_grad_weight_is_exact(wgmma_grad_weight, case, torch.float16)


def test_emulated_wgmma_grad_weight_multiplies_no_padding(wgmma_grad_weight):
    """What is infinite reaches no tap but those that read it, not even times zero."""
    case = replace(NAMED["16_and_24_channels"], n=2)
    grad_output, x = operands(case)
    grad_output[:, :, 0, 0] = 0
    x[:, :, -1, -1] = 0
    finite, _ = wgmma_grad_weight(case, grad_output, x)
    grad_output[:, :, 0, 0] = x[:, :, -1, -1] = float("inf")
    weight, _ = wgmma_grad_weight(case, grad_output, x)
    # Both pixels are of taps 1 and 2 of either axis only.
    for i, j in itertools.product(range(3), repeat=2):
        if 0 in (i, j):
            assert_bitwise_equal(weight[:, :, i, j] + 0, finite[:, :, i, j] + 0)
        else:
            assert not weight[:, :, i, j].isfinite().any()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (NAMED["8_channels"], torch.float32),
        (replace(NAMED["8_channels"], n=0), torch.bfloat16),
        (NAMED["many_taps"], torch.bfloat16),
        (
            replace(GRAD_WEIGHT["farthest_corners"], dilation=(1, 128), padding=(0, 0, 128, 128)),
            torch.bfloat16,
        ),
    ],
    ids=["float32", "batch_0", "81_taps", "dilation_beyond_im2col"],
)
def test_emulated_wgmma_grad_weight_refuses(case, dtype, wgmma_grad_weight):
    with pytest.raises(RuntimeError, match="the plan refuses the problem"):
        wgmma_grad_weight(case, *operands(case, dtype))


# The plan ----------------------------------------------------------------------------------------


def planned(n, c_in, c_out, size, kernel=3, dilation=1, arch=(9, 0), **options):
    dtype = options.pop("dtype", torch.bfloat16)
    padding = options.pop("padding", dilation * (kernel // 2))
    x = torch.empty(
        n, c_in, size, size, dtype=dtype, device="meta", memory_format=torch.channels_last
    )
    w = torch.empty(
        c_out, c_in, kernel, kernel, dtype=dtype, device="meta", memory_format=torch.channels_last
    )
    return dilated_conv2d_plan(x, w, None, 1, padding, dilation, compute_capability=arch, **options)


@pytest.mark.parametrize("operation", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize(
    ("n", "c_in", "c_out", "size", "kernel", "dilation"),
    [
        (8, 512, 512, 64, 3, 2),
        (1, 512, 512, 64, 3, 2),
        (1, 512, 4096, 64, 7, 4),
        (8, 2048, 256, 33, 3, 12),
        (8, 512, 512, 65, 3, 4),
        (1, 672, 672, 64, 3, 1),
    ],
)
def test_large_layers_run_on_wgmma(n, c_in, c_out, size, kernel, dilation, operation):
    plan = planned(n, c_in, c_out, size, kernel, dilation, operation=operation)
    assert plan.kernel == "wgmma", plan
    assert "wgmma and TMA" in plan.description
    for arch in [(8, 0), (8, 9), (10, 0), (12, 0)]:
        other = planned(n, c_in, c_out, size, kernel, dilation, arch, operation=operation)
        assert other.kernel == "gemm"
        assert plan.microseconds < other.microseconds or arch == (10, 0)


@pytest.fixture
def precision():
    yield dilseg.set_float32_conv_precision
    dilseg.set_float32_conv_precision(None)


@pytest.mark.parametrize(("name", "parts"), [("ieee", 3), ("bf16x3", 2)])
@pytest.mark.parametrize("operation", ["forward", "grad_input"])
def test_large_layers_of_floats_run_on_wgmma_in_parts(name, parts, operation, precision):
    precision(name)
    plan = planned(8, 512, 512, 64, dtype=torch.float32, operation=operation)
    assert plan.kernel == "wgmma"
    assert f"each float in {parts} bfloat16 parts" in plan.description
    assert "copied" not in plan.description  # splitting is the copy


@pytest.mark.parametrize(
    ("name", "operation"), [("tf32", "forward"), ("ieee", "grad_weight")], ids=str
)
def test_other_floats_are_left_to_the_portable_kernels(name, operation, precision):
    precision(name)
    plan = planned(8, 512, 512, 64, dtype=torch.float32, operation=operation)
    assert plan.kernel == "gemm"


def test_wgmma_takes_boxes_beyond_the_reach_of_im2col():
    """Offsets of 8 bits: dilation 127 of a 3x3 still runs over lines, 128 over boxes."""
    for dilation, boxes in [(1, False), (127, None), (128, True)]:
        plan = planned(1, 512, 512, 300, dilation=dilation)
        assert plan.kernel == "wgmma"
        if boxes is not None:
            assert ("over boxes" in plan.description) == boxes


def test_wgmma_leaves_grad_weight_beyond_its_windows_to_gemm():
    """Corners of 8 bits, and maps for 49 taps."""
    for change, kernel in [
        ({"dilation": 127}, "wgmma"),
        ({"dilation": 128}, "gemm"),
        ({"kernel": 7}, "wgmma"),
        ({"kernel": 9}, "gemm"),
    ]:
        assert planned(1, 512, 512, 300, operation="grad_weight", **change).kernel == kernel


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float64},
        {"arch": (9, 1)},
    ],
    ids=str,
)
def test_wgmma_is_not_planned_for(change):
    assert planned(8, 512, 512, 64, **change).kernel != "wgmma"
