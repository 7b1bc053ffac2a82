# SPDX-License-Identifier: Apache-2.0
"""Every family of CUDA kernels runs every problem that it can, whatever the plan would choose."""

from dataclasses import replace

import pytest
import torch
from helpers import emulation
from helpers.closeness import assert_bitwise_equal
from helpers.convolution import assert_exact, compare_all
from helpers.layouts import channels_last, contiguous
from helpers.samples import CONV, CONV_CASES, DTYPES

from dilseg.functional import dilated_conv2d_plan

# Depthwise kernels: test_dilated_conv2d_depthwise.
KERNELS = ("direct", "gemm", "patch", "wgmma")
COMBINATIONS = {
    "contiguous-float32": (torch.float32, contiguous),
    "bfloat16-channels_last": (torch.bfloat16, channels_last),
}


def can_run(kernel, case, combination):
    """Whether a preferred family would run any of the three operations."""
    dtype, layout = COMBINATIONS[combination]
    prefer = torch.ops.dilseg._prefer_dilated_conv2d_kernel
    x = layout(torch.empty(case.n, case.c_in, case.h_in, case.w_in, dtype=dtype, device="meta"))
    w = torch.empty(case.c_out, case.c_in // case.groups, *case.kernel, dtype=dtype, device="meta")
    prefer(kernel)
    try:
        return any(
            dilated_conv2d_plan(x, w, None, *case.geometry, operation=operation).kernel == kernel
            for operation in ("forward", "grad_input", "grad_weight")
        )
    finally:
        prefer("")


@pytest.mark.parametrize(
    ("kernel", "case", "combination"),
    [
        pytest.param(kernel, case, combination, id=f"{kernel}-{case.name}-{combination}")
        for kernel in KERNELS
        for case in CONV_CASES
        for combination in COMBINATIONS
        # The plan leaves float64 to the direct kernels, in every case and both memory formats.
        if can_run(kernel, case, combination)
        and (kernel, combination) != ("direct", "contiguous-float32")
    ],
)
def test_kernels_agree_with_torch_and_reference(
    kernel, case, combination, device, prefer, one_schedule
):
    prefer(kernel)
    dtype, layout = COMBINATIONS[combination]
    x, w, b = case.tensors(dtype, device)
    compare_all(case, layout(x), w, b, layout(case.grad_output(dtype, device)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_direct_kernels_are_exact_where_sums_are(dtype, device, prefer, one_schedule):
    """As those of the other families, in the modules named after them."""
    prefer("direct")
    case = replace(CONV["prime_sizes_dilated"], n=1, h_in=7, w_in=6)
    assert_exact(case, [3, 1, 0, 2], dtype, device)


TWENTY = [
    ("direct", CONV["prime_sizes_dilated"]),
    ("gemm", replace(CONV["prime_sizes_dilated"], n=1, c_in=72, c_out=40, h_in=7, w_in=5)),
    ("patch", replace(CONV["prime_sizes_dilated"], n=1, c_in=11, c_out=3)),
    ("wgmma", replace(CONV["prime_sizes_dilated"], n=1, c_in=72, c_out=40, h_in=7, w_in=5)),
    ("depthwise", replace(CONV["depthwise"], n=1)),
]


@pytest.mark.parametrize(("kernel", "case"), TWENTY, ids=[row[0] for row in TWENTY])
def test_twenty_runs_of_every_family_give_the_same_bits(kernel, case, device, prefer, monkeypatch):
    """In the emulator under twenty schedules of threads and blocks."""
    monkeypatch.setattr(emulation, "SEEDS", range(20))
    prefer(kernel)
    x, w, b = case.tensors(torch.bfloat16, device)
    g = case.grad_output(torch.bfloat16, device)
    top, left = case.padding
    tail = (case.stride, (top, top, left, left), case.dilation, case.groups)
    runs = 1 if device == "cpu" else 20

    def once():
        return (
            torch.ops.dilseg.dilated_conv2d(x, w, b, *tail, "relu"),
            torch.ops.dilseg.dilated_conv2d_grad_input(g, w, x.shape[2:], *tail),
            *torch.ops.dilseg.dilated_conv2d_grad_weight(g, x, case.kernel, *tail, True),
        )

    first = once()
    for _ in range(runs - 1):
        for expected, result in zip(first, once(), strict=True):
            assert_bitwise_equal(expected, result)


def test_every_family_runs_something():
    for kernel in KERNELS:
        assert any(can_run(kernel, case, "bfloat16-channels_last") for case in CONV_CASES)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="expected kernel among"):
        torch.ops.dilseg._prefer_dilated_conv2d_kernel("fast")
