# SPDX-License-Identifier: Apache-2.0
"""Which kernels run a convolution: the same everywhere, no GPU needed."""

import re
from itertools import product
from time import perf_counter

import pytest
import torch
from helpers.best_plan import best_microseconds
from helpers.emulation import why_no_emulator
from helpers.layouts import channels_last, contiguous
from helpers.samples import CONV_CASES, DEPTHWISE_CASES
from test_dilated_conv2d_gemm import BOX_CASES, MAP_CASES
from test_dilated_conv2d_patch import FEW, MANY_WEIGHTS
from test_dilated_conv2d_wgmma import BOX_CASES as WGMMA_BOX_CASES
from test_dilated_conv2d_wgmma import CASES as WGMMA_CASES

import dilseg
from dilseg.functional import dilated_conv2d_plan

KERNELS = ("direct", "gemm", "patch", "depthwise")
PRECISIONS = ("ieee", "bf16x3", "tf32")
OPERATIONS = ("forward", "grad_input", "grad_weight")
H100, A100, RTX_4090 = ((9, 0), 132), ((8, 0), 108), ((8, 9), 128)


def meta(*shape, dtype=torch.bfloat16, layout=contiguous):
    return layout(torch.empty(shape, dtype=dtype, device="meta"))


def plan(
    c_in,
    c_out,
    size,
    kernel=3,
    dilation=1,
    *,
    n=1,
    groups=1,
    stride=1,
    dtype=torch.bfloat16,
    layout=channels_last,
    operation="forward",
    gpu=H100,
):
    return dilated_conv2d_plan(
        meta(n, c_in, size, size, dtype=dtype, layout=layout),
        meta(c_out, c_in // groups, kernel, kernel, dtype=dtype, layout=layout),
        None,
        stride,
        dilation * (kernel - 1) // 2,
        dilation,
        groups,
        operation=operation,
        compute_capability=gpu[0],
        multiprocessors=gpu[1],
    )


@pytest.fixture
def prefer():
    yield torch.ops.dilseg._prefer_dilated_conv2d_kernel
    torch.ops.dilseg._prefer_dilated_conv2d_kernel("")


@pytest.fixture
def precision():
    yield dilseg.set_float32_conv_precision
    dilseg.set_float32_conv_precision(None)


# The layers of both papers and of the networks that came after them.
LAYERS = [
    # name, kernel, c_in, c_out, size, window, dilation, groups
    ("conv3_1", "gemm", 128, 256, 128, 3, 1, 1),
    ("conv4_2", "gemm", 512, 512, 64, 3, 1, 1),
    ("conv5", "gemm", 512, 512, 64, 3, 2, 1),
    ("fc6", "gemm", 512, 4096, 64, 7, 4, 1),
    ("fc7", "gemm", 4096, 4096, 64, 1, 1, 1),
    ("score", "gemm", 4096, 21, 64, 1, 1, 1),
    ("aspp_d6", "gemm", 2048, 256, 33, 3, 6, 1),
    ("aspp_d12", "gemm", 2048, 256, 33, 3, 12, 1),
    ("aspp_d18", "gemm", 2048, 256, 33, 3, 18, 1),
    ("aspp_d24", "gemm", 2048, 256, 33, 3, 24, 1),
    ("aspp_65_d18", "gemm", 2048, 256, 65, 3, 18, 1),
    ("aspp_65_d24", "gemm", 2048, 256, 65, 3, 24, 1),
    ("aspp_65_d36", "gemm", 2048, 256, 65, 3, 36, 1),
    ("layer4", "gemm", 512, 512, 65, 3, 4, 1),
    ("bottleneck", "gemm", 2048, 512, 65, 1, 1, 1),
    ("large_l5", "gemm", 168, 336, 64, 3, 8, 1),
    ("large_l6", "gemm", 336, 672, 64, 3, 16, 1),
    ("large_l2", "patch", 42, 42, 64, 3, 1, 1),
    ("large_l3", "patch", 42, 84, 64, 3, 2, 1),
    ("basic_d1", "patch", 21, 21, 64, 3, 1, 1),
    ("basic_d16", "patch", 21, 21, 64, 3, 16, 1),
    ("camvid_basic", "patch", 11, 11, 90, 3, 8, 1),
    ("depthwise_d2", "depthwise", 960, 960, 65, 3, 2, 960),
    ("depthwise_aspp_d12", "depthwise", 2048, 2048, 33, 3, 12, 2048),
    ("depthwise_multiplier", "depthwise", 64, 128, 65, 3, 2, 64),
    ("resnext", "gemm", 1024, 1024, 33, 3, 2, 32),
]
by_layer = pytest.mark.parametrize(
    ("kernel", "layer"), [(row[1], row[2:]) for row in LAYERS], ids=[row[0] for row in LAYERS]
)


@by_layer
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", [H100, A100], ids=["h100", "a100"])
def test_layers_run_on_the_kernels_made_for_them(kernel, layer, n, layout, dtype, gpu):
    c_in, c_out, size, window, dilation, groups = layer
    for operation in OPERATIONS:
        chosen = plan(
            c_in,
            c_out,
            size,
            window,
            dilation,
            n=n,
            groups=groups,
            dtype=dtype,
            layout=layout,
            operation=operation,
            gpu=gpu,
        )
        # Hopper runs what other GPUs give to the GEMM kernels on its own instructions, but for what
        # waits for memory alone; floats, of six products each, wait less, and layouts decide.
        narrow = (c_out if operation == "forward" else c_in) < 64
        close = [(4096, 21), (42, 84), (2048, 256)]
        if gpu is H100 and dtype is torch.float32 and (c_in, c_out) in close:
            assert chosen.kernel in (kernel, "wgmma"), operation
            continue
        on_wgmma = (
            kernel == "gemm"
            and gpu is H100
            and groups == 1
            and not narrow
            and (dtype is torch.bfloat16 or operation != "grad_weight")
        )
        # With few output channels both gradients of the weight wait for memory.
        if not (on_wgmma and operation == "grad_weight" and c_out < 64):
            assert chosen.kernel == ("wgmma" if on_wgmma else kernel), operation


@pytest.mark.skipif(why_no_emulator() is not None, reason=str(why_no_emulator()))
def test_plans_are_near_the_best_that_their_model_knows(tmp_path):
    """Plans try a few boxes and splits: of all that there are, none is 5 % faster."""
    choices = [
        (row, n, layout, dtype, gpu)
        for row in LAYERS
        for n in (1, 8)
        for layout in (contiguous, channels_last)
        for dtype in (torch.bfloat16, torch.float32)
        for gpu in (H100, A100, RTX_4090)
    ]
    problems = [
        (n, *row[2:], int(layout is channels_last), int(dtype is torch.float32),
         10 * gpu[0][0] + gpu[0][1], gpu[1])
        for row, n, layout, dtype, gpu in choices
    ]  # fmt: skip
    best = best_microseconds(problems, tmp_path)
    for (row, n, layout, dtype, gpu), times in zip(choices, best, strict=True):
        name, _, c_in, c_out, size, window, dilation, groups = row
        options = {"n": n, "groups": groups, "dtype": dtype, "layout": layout, "gpu": gpu}
        for operation, time in zip(OPERATIONS, times, strict=True):
            chosen = plan(c_in, c_out, size, window, dilation, operation=operation, **options)
            assert time >= 0.95 * chosen.microseconds, (name, chosen, options)
            assert time <= chosen.microseconds * (1 + 1e-12), (name, chosen, options)


def kinds(chosen):
    """What a plan says, with numbers only where kernels differ by them."""
    if chosen.kernel in ("patch", "depthwise"):
        return {(chosen.kernel, re.sub(r"\d+(?! bfloat16)", "#", chosen.description))}
    words = r"tiles of \d+x\d+|boxes of \d+x\d+|pairs of blocks"
    return {(chosen.kernel, clause) for clause in re.findall(words, chosen.description)}


def test_every_kind_of_plan_is_run_in_the_emulator(prefer, precision):
    """Kernels that a layer may reach are those that some case of the other modules runs."""
    reached, run = set(), set()
    every = [(dtype, name) for dtype in (torch.bfloat16, torch.float32) for name in PRECISIONS]
    for dtype, name in every:
        precision(name)
        for _, _, c_in, c_out, size, window, dilation, groups in LAYERS:
            for n, gpu, layout, operation in product(
                (1, 8), (H100, A100, RTX_4090), (contiguous, channels_last), OPERATIONS
            ):
                options = {"n": n, "gpu": gpu, "layout": layout, "dtype": dtype}
                reached |= kinds(
                    plan(c_in, c_out, size, window, dilation, groups=groups,
                         operation=operation, **options)
                )  # fmt: skip
        for family, cases in (("patch", [*FEW, MANY_WEIGHTS]), ("depthwise", DEPTHWISE_CASES)):
            prefer(family)
            for case, layout, operation in product(cases, (contiguous, channels_last), OPERATIONS):
                x = meta(case.n, case.c_in, case.h_in, case.w_in, dtype=dtype, layout=layout)
                w = meta(case.c_out, case.c_in // case.groups, *case.kernel, dtype=dtype)
                run |= kinds(
                    dilated_conv2d_plan(
                        x, w, None, *case.geometry, operation=operation,
                        compute_capability=H100[0], multiprocessors=H100[1],
                    )
                )  # fmt: skip
            prefer("")
    for case in (*MAP_CASES, *BOX_CASES):
        run |= {
            ("gemm", f"tiles of {case.tile}x{case.tile}"),
            ("gemm", "boxes of {}x{}".format(*case.box)),
        }
    for case in (*WGMMA_CASES, *WGMMA_BOX_CASES):
        run |= {
            ("wgmma", f"tiles of 128x{case.tile_n}"),
            ("wgmma", "boxes of {}x{}".format(*case.box)),
            ("wgmma", "pairs of blocks" if case.cluster > 1 else ""),
        }
    assert {kernel for kernel, _ in reached} == {"gemm", "wgmma", "patch", "depthwise"}
    assert reached - run == set()


def test_the_first_layer_runs_on_the_kernels_for_few_channels():
    for dtype in (torch.bfloat16, torch.float32):
        assert plan(3, 64, 224, n=8, dtype=dtype).kernel == "patch"


def problems():
    for case in (*CONV_CASES, *DEPTHWISE_CASES):
        for dtype in (torch.float64, torch.float32, torch.float16):
            yield case, dtype


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_nothing_faster_is_left_aside(operation, layout, prefer):
    """The choice is the best that any family models, and a preferred family runs what it can."""
    seen = set()
    for case, dtype in problems():
        x = meta(case.n, case.c_in, case.h_in, case.w_in, dtype=dtype, layout=layout)
        w = meta(case.c_out, case.c_in // case.groups, *case.kernel, dtype=dtype, layout=layout)
        plans = []
        for kernel in ("", *KERNELS):
            prefer(kernel)
            plans.append(dilated_conv2d_plan(x, w, None, *case.geometry, operation=operation))
        chosen, *others = plans
        assert chosen.microseconds == min(p.microseconds for p in others), case.name
        assert others[0].kernel == "direct"
        for kernel, preferred in zip(KERNELS, others, strict=True):
            assert preferred.kernel == kernel or preferred == chosen
        seen |= {p.kernel for p in others}
    assert seen == set(KERNELS)


def test_the_same_problem_has_the_same_plan():
    assert plan(512, 512, 64) == plan(512, 512, 64)
    assert plan(512, 512, 64) != plan(512, 512, 64, gpu=A100)


def test_values_and_other_tensors_do_not_count():
    x = torch.randn(1, 21, 9, 8)
    w = torch.randn(21, 21, 3, 3)
    expected = dilated_conv2d_plan(x.to("meta"), w.to("meta"), padding=1)
    assert dilated_conv2d_plan(x, w, padding=1) == expected
    assert dilated_conv2d_plan(x[0], w, padding="same") == expected


def test_only_direct_kernels_before_ampere_and_for_float64():
    assert plan(64, 64, 65, groups=64, gpu=((7, 0), 80)).kernel == "direct"
    assert plan(512, 512, 64, gpu=((7, 5), 68)).kernel == "direct"
    assert plan(512, 512, 64, dtype=torch.float64).kernel == "direct"


def test_the_largest_shared_memory_is_not_taken_for_granted():
    """The weights of 42 channels of split floats fit 227 KB, but not 99 KB."""
    few = {"c_in": 42, "c_out": 42, "size": 64, "dtype": torch.float32, "layout": contiguous}
    assert "weights of all taps stay in shared memory" in plan(**few, gpu=H100).description
    assert "weights pass through shared memory" in plan(**few, gpu=RTX_4090).description


def test_layouts_that_tensor_cores_cannot_read_are_copied_first():
    assert "copied" not in plan(512, 512, 64).description
    chosen = plan(512, 512, 64, layout=contiguous)
    assert "first the source and the weight is copied to channels_last" in chosen.description
    assert chosen.workspace_bytes >= 2 * (512 * 64 * 64 + 512 * 512 * 9)


def test_a_misaligned_tensor_is_copied_first():
    aligned = channels_last(torch.zeros(1, 512, 8, 8, dtype=torch.bfloat16))
    memory = torch.zeros(512 * 64 + 1, dtype=torch.bfloat16)[1:]
    moved = memory.as_strided(aligned.shape, aligned.stride())
    w = channels_last(torch.zeros(128, 512, 3, 3, dtype=torch.bfloat16))
    assert "copied" not in dilated_conv2d_plan(aligned, w).description
    assert "copied" in dilated_conv2d_plan(moved, w).description


def test_sums_are_split_where_tiles_do_not_fill_the_gpu():
    assert "parts that a second kernel adds" in plan(2048, 256, 33, 3, 12).description
    assert "parts that a second kernel adds" not in plan(512, 512, 128, n=8).description


def test_taps_in_the_padding_cost_less():
    """An ASPP branch at 33 x 33: most taps of dilation 24 lie beside the map."""
    time = {d: plan(2048, 256, 33, 3, d, n=8).microseconds for d in (6, 12, 18, 24)}
    assert time[24] < time[18] < time[12] < time[6]
    assert time[24] < 0.6 * time[6]


def test_precisions_cost_what_their_products_do(precision):
    time = {}
    for name in ("tf32", "bf16x3", "ieee"):
        precision(name)
        assert dilseg.get_float32_conv_precision() == name
        time[name] = plan(512, 512, 64, n=8, dtype=torch.float32).microseconds
    assert time["tf32"] < time["bf16x3"] < time["ieee"]
    precision("bf16x3")
    assert "in 2 bfloat16 parts" in plan(21, 21, 64, dtype=torch.float32).description
    precision("ieee")
    assert "in 3 bfloat16 parts" in plan(21, 21, 64, dtype=torch.float32).description


def test_precision_follows_torchs_switch_unless_set(precision):
    assert dilseg.get_float32_conv_precision() is None
    ieee = plan(512, 512, 64, n=8, dtype=torch.float32)
    torch.backends.cudnn.allow_tf32 = True
    try:
        assert plan(512, 512, 64, n=8, dtype=torch.float32).microseconds < ieee.microseconds
        precision("ieee")
        assert plan(512, 512, 64, n=8, dtype=torch.float32) == ieee
    finally:
        torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("bad", ["high", "", 3])
def test_an_unknown_precision_is_refused(bad):
    with pytest.raises(ValueError, match="expected precision to be 'ieee', 'bf16x3', 'tf32'"):
        dilseg.set_float32_conv_precision(bad)


def test_a_plan_reads_as_a_sentence():
    text = str(plan(2048, 256, 33, 3, 12, gpu=A100))
    assert text.startswith("gemm: implicit GEMM on tensor cores, tiles of ")
    assert " bytes of workspace; modelled " in text
    assert text.endswith(" us")


# Sizes at which counting tiles, taps or phases one by one would take seconds to hours.
@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((2, 512, 64, 64), (3, 3), {"padding": 2, "dilation": 2}),
        ((1, 8, 1, 2**25), (1, 31), {"padding": (0, 15)}),
        ((1, 64, 2**22, 1), (31, 1), {"padding": (15, 0)}),
        ((1, 8, 4, 4), (3, 3), {"padding": 1, "stride": 2**20}),
        ((1, 256, 2048, 2048), (1, 1), {"stride": 256}),
        ((8, 3, 1024, 1024), (32, 32), {"stride": 32}),
        ((100000, 8, 200, 200), (31, 31), {"stride": 64, "dilation": 6}),
        ((1, 8, 1, 2**27), (1, 2**27), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_planning_is_quick(size, kernel, options, operation):
    """A new problem is planned once; every later call finds the plan."""
    x = meta(*size)
    w = meta(16, size[1], *kernel)
    times = []
    for _ in range(5):
        start = perf_counter()
        dilated_conv2d_plan(x, w, **options, operation=operation)
        times.append(perf_counter() - start)
    assert min(times) < 10e-3


def test_many_rows_far_apart_stay_within_exact_division(prefer):
    """Depthwise tiles are walked with reciprocals, which divide exactly up to 2^32 / divisor."""
    prefer("depthwise")
    d = 30000
    sliced = torch.zeros(1, 2, 108001, 9, dtype=torch.float16)[:, :, :108000, :1]
    dense = meta(1, 256, 112004, 1, dtype=torch.float16)
    for x, apart in ((sliced, d), (dense, 56002)):
        c = x.shape[1]
        w = torch.zeros(c, 1, 3, 1, dtype=x.dtype, device=x.device)
        chosen = dilated_conv2d_plan(x, w, None, 1, (apart, 0), (apart, 1), c)
        found = re.search(r"channels and (\d+)x\d+ pixels( whose rows)?", chosen.description)
        if found and not found.group(2):
            rows = int(found.group(1))
            assert rows * apart < 2**32
            assert x is dense or (rows + 2 * apart) ** 2 < 2**32


def test_the_bias_and_results_count_as_they_will_be():
    """On meta tensors too; results are dense in the memory format of their source."""
    real = [torch.zeros(2, 64, 16, 16), torch.zeros(64, 64, 3, 3), torch.zeros(64)]
    for operation in OPERATIONS:
        plans = {
            dilated_conv2d_plan(*(t.to(device) for t in real), operation=operation)
            for device in ("cpu", "meta")
        }
        assert len(plans) == 1
    without = dilated_conv2d_plan(*real[:2], operation="grad_weight")
    assert dilated_conv2d_plan(*real, operation="grad_weight") != without
    x, w = meta(2, 512, 32, 32, layout=channels_last), meta(64, 512, 3, 3)
    assert dilated_conv2d_plan(x, w, operation="grad_weight") == dilated_conv2d_plan(
        x, channels_last(w), operation="grad_weight"
    )


def test_the_precision_is_set_in_compiled_code_too(precision):
    def f(x):
        dilseg.set_float32_conv_precision("bf16x3")
        return x + 1

    compiled = torch.compile(f, backend="aot_eager")
    for _ in range(3):
        precision(None)
        compiled(torch.zeros(2))
        assert dilseg.get_float32_conv_precision() == "bf16x3"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"operation": "backward"}, ValueError, 'expected operation "forward", "grad_input" or'),
        ({"operation": 1}, TypeError, "expected operation to be a str"),
        ({"compute_capability": (100, 0)}, ValueError, "expected arch from 10 to 999"),
        ({"compute_capability": (9, 10)}, ValueError, r"expected compute_capability \(major, mi"),
        ({"compute_capability": (-1, 9)}, ValueError, r"expected compute_capability \(major, mi"),
        ({"multiprocessors": 1.5}, TypeError, "expected multiprocessors to be an int"),
        ({"multiprocessors": 0}, ValueError, "expected multiprocessors from 1 to 65535"),
        ({"groups": 2}, ValueError, "expected c_in divisible by groups"),
        ({"padding": -1}, ValueError, "expected padding"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        dilated_conv2d_plan(meta(1, 5, 9, 9), meta(3, 5, 3, 3), **options)
