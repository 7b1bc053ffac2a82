# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels as every instruction set of this machine computes them."""

import os
import subprocess
import sys

import pytest

import dilseg

SETS = ("baseline", "avx2", "avx512")
# Losses, gradients and labels against float64, over sizes that fill no vector.
PROGRAM = """
import torch
from torch.nn import functional as F
import dilseg
from dilseg.functional import (
    cross_entropy, dilated_conv2d, upsample_add, upsample_argmax, upsample_cross_entropy,
)

print(dilseg.build_info()["cpu_instruction_set"])
torch.manual_seed(0)
close = torch.testing.assert_close
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    problems = (1, 1, 1, 3), (3, 5, 7, 2), (21, 9, 11, 8), (40, 6, 5, 1.5), (19, 8, 9, 0.6)
    for c, h, w, scale in problems:
        for layout in (torch.contiguous_format, torch.channels_last):
            exact = torch.randn(2, c, h, w, dtype=torch.float64).to(dtype)
            x = exact.contiguous(memory_format=layout).requires_grad_()
            truth = exact.double().requires_grad_()
            size = (max(1, int(h * scale)), max(1, int(w * scale)))
            target = torch.randint(c, (2, *size))
            target[:, ::3] = 255
            target[0, -1, -1] = 0
            tol = {"rtol": 1e-6, "atol": 1e-6} if dtype != torch.float64 else {}
            grad_tol = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 4e-8}

            up = upsample_add(x, None, size=size)
            up_truth = F.interpolate(truth, size, mode="bilinear")
            eps = torch.finfo(dtype).eps
            close(up.double(), up_truth, rtol=4 * eps, atol=8 * eps)
            g = torch.randn_like(up)
            a, = torch.autograd.grad(up, x, g)
            b, = torch.autograd.grad(up_truth, truth, g.double(), retain_graph=True)
            close(a.double(), b, rtol=8 * eps, atol=128 * eps)

            options = {"ignore_index": 255, "label_smoothing": 0.1}
            loss = upsample_cross_entropy(x, target, **options)
            want = F.cross_entropy(up_truth, target, **options)
            close(loss.double(), want, **tol)
            a, = torch.autograd.grad(loss, x)
            b, = torch.autograd.grad(want, truth, retain_graph=True)
            close(a.double(), b, **grad_tol)

            z = up_truth.detach().to(dtype).contiguous(memory_format=layout).requires_grad_()
            loss = cross_entropy(z, target, ignore_index=255, reduction="sum")
            z64 = z.detach().double().requires_grad_()
            want = F.cross_entropy(z64, target, ignore_index=255, reduction="sum")
            close(loss.double(), want, **tol)
            a, = torch.autograd.grad(loss, z)
            b, = torch.autograd.grad(want, z64)
            close(a.double(), b, rtol=8 * eps, atol=1e-6)

            label, share = upsample_argmax(x, size=size, confidence=True)
            # Equal but for logits that a rounding apart changes places.
            assert (label == up_truth.argmax(1)).double().mean() > 0.98 or label.numel() < 60
            close(share.double(), up_truth.softmax(1).amax(1), rtol=1e-5, atol=1e-5)


def compare_conv(dtype, c, groups, fan, h, w, k, *geometry):
    eps = torch.finfo(dtype).eps
    geometry = *geometry, groups
    x = torch.randn(2, c, h, w, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(c * fan, c // groups, k, k, dtype=torch.float64)
    weight = weight.div((c // groups) ** 0.5).to(dtype).requires_grad_()
    bias = torch.randn(c * fan, dtype=torch.float64).to(dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    out = dilated_conv2d(x, weight, bias, *geometry)
    want = F.conv2d(*exact, *geometry)
    close(out.double(), want, rtol=4 * eps, atol=32 * eps * (c // groups) ** 0.5)
    g = torch.randn_like(out)
    grads = torch.autograd.grad(out, (x, weight, bias), g)
    wanted = torch.autograd.grad(want, exact, g.double())
    for a, b in zip(grads, wanted, strict=True):
        # Sums of up to 3380 products, which torch in float64 rounds as well.
        atol = 1024 * eps if dtype == torch.float64 else 1e-4
        close(a.double(), b, rtol=4 * eps, atol=atol * (c // groups) ** 0.5)

# Depthwise convolution, in columns that fill no vector, one and several.
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for w, k, d, p, s, fan in (
        (1, 1, 1, 0, 1, 1), (5, 3, 2, 2, 1, 1), (33, 3, 12, 12, 1, 1), (65, 3, 2, 2, 1, 2),
        (130, 3, 1, 1, 1, 1), (77, 3, 3, 3, 2, 1), (90, 5, 1, 2, 3, 1),
    ):
        compare_conv(dtype, 3, 3, fan, 13, w, k, s, p, d)

# Winograd, in tiles that fill no vector.
compare_conv(torch.float32, 256, 1, 1, 17, 19, 3, 1, 1, 1)
compare_conv(torch.float32, 256, 1, 1, 24, 20, 3, 1, 2, 2)
"""


def run(name):
    env = {**os.environ, "DILSEG_CPU_INSTRUCTION_SET": name}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_is_right(name):
    best = dilseg.build_info()["cpu_instruction_set"]
    if SETS.index(name) > SETS.index(best):
        pytest.skip(f"this processor has no {name}; its best is {best}")
    done = run(name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [name]


def test_a_set_that_is_not_there_is_not_used():
    best = dilseg.build_info()["cpu_instruction_set"]
    assert best in SETS
    assert run("sse9").stdout.split() == [best]
