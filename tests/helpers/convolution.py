# SPDX-License-Identifier: Apache-2.0
"""Comparisons of the convolution and its gradients with torch and with the slow reference."""

import torch
from torch.nn import functional as F

from dilseg.functional import dilated_conv2d
from helpers import reference
from helpers.closeness import assert_three_way
from helpers.layouts import contiguous


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


def compare_all(case, x, w, b, grad_output, activation=None):
    """Compares output and gradients with torch in the dtype and with the slow reference."""
    inputs = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    args = inputs if b is not None else [*inputs, None]
    ours = dilated_conv2d(*args, *case.geometry, activation=activation)
    rival = F.conv2d(*args, *case.geometry)
    expected = reference.conv2d(x, w, b, *case.geometry)
    scale = 1 + largest(expected)
    if activation:
        rival, expected = rival.relu(), expected.relu()
    assert ours.dtype == x.dtype
    assert_three_way(ours, rival, expected, depth=case.depth, scale=scale)

    grads = torch.autograd.grad(ours, inputs, grad_output)
    rivals = torch.autograd.grad(rival, inputs, grad_output)
    if activation:
        # The mask of the output under test: an output within rounding of 0 may go either way.
        grad_output = torch.where(ours > 0, grad_output, 0)
    truth = [
        reference.conv2d_grad_input(grad_output, w, (case.h_in, case.w_in), *case.geometry),
        *reference.conv2d_grad_weight(grad_output, x, case.kernel, *case.geometry),
    ]
    pixels = max(1, grad_output.numel() // max(1, case.c_out))
    depths = [case.depth * case.c_out // case.c_in, pixels, pixels]
    for k, t, r, depth in zip(grads, rivals, truth, depths, strict=False):
        assert k.dtype == x.dtype
        if activation is None:
            assert_three_way(k, t, r, depth=depth, scale=1 + largest(r))


def eighths(shape, dtype, device, *, seed):
    """Small multiples of 1/8: their products and sums are exact in float32."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(-4, 5, tuple(shape), generator=g) / 8).to(dtype).to(device)


def assert_exact(case, pads, dtype, device, layout=contiguous):
    """Compares the three operators with the reference, rounded once."""
    x = layout(eighths((case.n, case.c_in, case.h_in, case.w_in), dtype, device, seed=1))
    w = eighths((case.c_out, case.c_in, *case.kernel), dtype, device, seed=2)
    b = eighths((case.c_out,), dtype, device, seed=3)
    padded = F.pad(x.double(), (pads[2], pads[3], pads[0], pads[1]))
    geometry = (1, 1), (0, 0), case.dilation, 1
    expected = reference.conv2d(padded, w, b, *geometry)
    g = layout(eighths(expected.shape, dtype, device, seed=4))
    grad_padded = reference.conv2d_grad_input(g, w, padded.shape[2:], *geometry)
    truth = [
        expected,
        expected.relu(),
        grad_padded[:, :, pads[0] :, pads[2] :][:, :, : case.h_in, : case.w_in],
        *reference.conv2d_grad_weight(g, padded, case.kernel, *geometry),
    ]
    ops, tail = torch.ops.dilseg, ([1, 1], pads, list(case.dilation), 1)
    ours = [
        ops.dilated_conv2d(x, w, b, *tail, None),
        ops.dilated_conv2d(x, w, b, *tail, "relu"),
        ops.dilated_conv2d_grad_input(g, w, [case.h_in, case.w_in], *tail),
        *ops.dilated_conv2d_grad_weight(g, x, list(case.kernel), *tail, True),
    ]
    for a, r in zip(ours, truth, strict=True):
        assert torch.equal(a.double(), r.to(dtype).double())
