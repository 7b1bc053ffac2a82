# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: streams, devices, graphs, the absence of waits, sizes beyond 2^31."""

import subprocess
import sys

import pytest
import torch
from helpers.backends import why_no_cuda
from helpers.closeness import assert_bitwise_equal
from helpers.samples import CONV, LOSS, UPSAMPLE, UPSAMPLE_LOSS, randn

from dilseg.functional import (
    cross_entropy,
    dilated_conv2d,
    upsample_add,
    upsample_argmax,
    upsample_cross_entropy,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(why_no_cuda() is not None, reason=str(why_no_cuda())),
]


def problems(dtype=torch.float32, device="cuda"):
    """Returns (function, inputs) of every operator; each result is one tensor."""
    conv, up, loss = CONV["prime_sizes_dilated"], UPSAMPLE["cropped_skip"], LOSS["weighted_mean"]
    up_loss = UPSAMPLE_LOSS["smoothed_weighted_mean"]
    return {
        "dilated_conv2d": (
            lambda x, w, b: dilated_conv2d(x, w, b, *conv.geometry, activation="relu"),
            conv.tensors(dtype, device),
        ),
        "upsample_add": (
            lambda x, skip: upsample_add(x, skip, **up.options),
            up.tensors(dtype, device),
        ),
        "cross_entropy": (
            lambda x, t, w: cross_entropy(x, t, w, **loss.keywords),
            loss.tensors(dtype, device),
        ),
        "upsample_cross_entropy": (
            lambda x, t, w: upsample_cross_entropy(x, t, w, **up_loss.keywords),
            up_loss.tensors(dtype, device),
        ),
    }


by_op = pytest.mark.parametrize(
    "op", ["dilated_conv2d", "upsample_add", "cross_entropy", "upsample_cross_entropy"]
)


def forward_backward(f, inputs):
    leaves = [t.detach().requires_grad_() if i == 0 else t for i, t in enumerate(inputs)]
    out = f(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves[0], torch.ones_like(out))[0]


@by_op
def test_runs_on_the_current_stream(op):
    """Inputs are made on a side stream, late; only work queued behind them sees them."""
    f, inputs = problems()[op]
    expected = forward_backward(f, inputs)
    stream = torch.cuda.Stream()
    late = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for a, b in zip(late, inputs, strict=True):
            a.copy_(b)
        results = forward_backward(f, late)
    stream.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert_bitwise_equal(a, b)


@by_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_inputs(op):
    f, inputs = problems(device="cuda:1")[op]
    assert torch.cuda.current_device() == 0
    results = forward_backward(f, inputs)
    assert torch.cuda.current_device() == 0
    expected = forward_backward(f, [t.to("cuda:0") for t in inputs])
    for a, b in zip(results, expected, strict=True):
        assert a.device.index == 1
        assert_bitwise_equal(a.cpu(), b.cpu())


@by_op
def test_never_waits_for_the_device(op):
    f, inputs = problems()[op]
    forward_backward(f, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(f, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_op
def test_can_be_captured_in_a_graph(op):
    f, inputs = problems()[op]
    static = [t.clone() for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward(f, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_backward(f, static)
    static[0].copy_(inputs[0] * 2)
    graph.replay()
    expected = forward_backward(f, [inputs[0] * 2, *inputs[1:]])
    for a, b in zip(results, expected, strict=True):
        assert_bitwise_equal(a, b)


@by_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_agrees_with_the_cpu(op, dtype):
    f, inputs = problems(dtype)[op]
    for a, b in zip(
        forward_backward(f, inputs), forward_backward(f, [t.cpu() for t in inputs]), strict=True
    ):
        torch.testing.assert_close(a.cpu(), b)


def test_argmax_agrees_with_the_cpu():
    x = randn((2, 21, 9, 7), torch.float32, "cuda")
    label, confidence = upsample_argmax(x, scale_factor=8, confidence=True)
    expected, share = upsample_argmax(x.cpu(), scale_factor=8, confidence=True)
    assert (label.cpu() == expected).float().mean() > 0.999
    torch.testing.assert_close(confidence.cpu(), share)


def test_label_out_of_range_traps_and_prints_the_pixel():
    """In a process of its own: a trap ends the context."""
    code = (
        "import torch, dilseg\n"
        "target = torch.zeros(1, 4, 3, dtype=torch.uint8, device='cuda')\n"
        "target[0, 2, 1] = 255\n"
        "dilseg.functional.cross_entropy(torch.zeros(1, 5, 4, 3, device='cuda'), target)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    for part in ("label 255", "n=0", "h=2", "w=1", "ignore_index=255"):
        assert part in printed


def needs_memory(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0
    return pytest.mark.skipif(free < gigabytes, reason=f"needs {gigabytes} GiB of GPU memory")


@pytest.mark.slow
@needs_memory(24)
def test_more_than_2_to_the_31_elements():
    """The last image lies wholly beyond 2^31 elements; alone it must give the same."""
    n, c, h, w = 17, 2, 8192, 8192
    x = torch.zeros(n, c, h, w, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-1] = torch.randn(c, h, w, device="cuda")
    weight = randn((1, c, 3, 3), torch.bfloat16, "cuda")
    whole = dilated_conv2d(x, weight, padding=2, dilation=2)
    assert_bitwise_equal(whole[-1:], dilated_conv2d(x[-1:], weight, padding=2, dilation=2))
    del whole
    target = torch.zeros(n, h, w, dtype=torch.uint8, device="cuda")
    losses = cross_entropy(x, target, reduction="none")
    assert_bitwise_equal(losses[-1:], cross_entropy(x[-1:], target[-1:], reduction="none"))
    del losses, target
    up = upsample_add(x[:, :, ::2, ::2], None, scale_factor=2)
    assert_bitwise_equal(up[-1:], upsample_add(x[-1:, :, ::2, ::2], None, scale_factor=2))
    del up
    target = torch.zeros(n, 2 * h, w, dtype=torch.uint8, device="cuda")
    losses = upsample_cross_entropy(x, target, reduction="none")
    assert_bitwise_equal(losses[-1:], upsample_cross_entropy(x[-1:], target[-1:], reduction="none"))
    label = upsample_argmax(x, scale_factor=(2, 1), dtype=torch.uint8)
    assert_bitwise_equal(
        label[-1:].int(), upsample_argmax(x[-1:], scale_factor=(2, 1), dtype=torch.int32)
    )
