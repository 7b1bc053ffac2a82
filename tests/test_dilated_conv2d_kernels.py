# SPDX-License-Identifier: Apache-2.0
"""Every family of CUDA kernels runs every problem that it can, whatever the plan would choose."""

import pytest
import torch
from helpers.convolution import compare_all
from helpers.layouts import channels_last, contiguous
from helpers.samples import CONV_CASES

from dilseg.functional import dilated_conv2d_plan

# Depthwise kernels: test_dilated_conv2d_depthwise.
KERNELS = ("direct", "gemm", "patch")
COMBINATIONS = {
    "float32": (torch.float32, contiguous),
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
        if can_run(kernel, case, combination)
    ],
)
def test_kernels_agree_with_torch_and_reference(
    kernel, case, combination, device, prefer, one_schedule
):
    prefer(kernel)
    dtype, layout = COMBINATIONS[combination]
    x, w, b = case.tensors(dtype, device)
    compare_all(case, layout(x), w, b, layout(case.grad_output(dtype, device)))


def test_every_family_runs_something():
    for kernel in KERNELS:
        assert any(can_run(kernel, case, "float32") for case in CONV_CASES)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="expected kernel among"):
        torch.ops.dilseg._prefer_dilated_conv2d_kernel("fast")
