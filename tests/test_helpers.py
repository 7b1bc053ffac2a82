# SPDX-License-Identifier: Apache-2.0
"""The helpers that judge other tests must themselves reject what is wrong."""

import pytest
import torch
from helpers import reference
from helpers.closeness import assert_bitwise_equal, assert_three_way
from helpers.layouts import GRAD_LAYOUTS, LAYOUTS
from helpers.samples import randn
from torch.nn import functional as F


def rounded(r, dtype=torch.bfloat16):
    return r.to(dtype)


@pytest.fixture
def truth():
    return randn((4, 8, 16, 16), torch.float64, "cpu")


def judge(ours, r):
    assert_three_way(ours, rounded(r), r, depth=9)


def test_three_way_accepts_correct_rounding(truth):
    judge(rounded(truth), truth)


def test_three_way_accepts_another_order_of_sums():
    a, b = randn((64, 300), torch.float32, "cpu"), randn((300, 64), torch.float32, "cpu", seed=1)
    r = a.double() @ b.double()
    flipped = a.flip(1) @ b.flip(0)
    assert_three_way(flipped, a @ b, r, depth=300)


def test_three_way_rejects_one_wrong_element(truth):
    ours = rounded(truth)
    ours[1, 2, 3, 4] += 0.5
    with pytest.raises(AssertionError, match=r"max\|K-R\|.*\n.*worst at \[1, 2, 3, 4\]: R = "):
        judge(ours, truth)


def test_three_way_names_the_test_to_run_again(truth):
    with pytest.raises(AssertionError, match=r"run again: python -m pytest '.*test_helpers.py"):
        judge(-rounded(truth), truth)


def test_three_way_rejects_truncation(truth):
    """Rounding towards zero keeps every element within tolerance."""
    low = truth.float().view(torch.int32) & ~0xFFFF
    ours = low.view(torch.float32).bfloat16()
    with pytest.raises(AssertionError, match=r"mean\(\(K-R\) sign R\)"):
        judge(ours, truth)


def test_three_way_rejects_a_small_constant_bias(truth):
    r = truth.float().double()
    ours = r.float() + 1e-6
    with pytest.raises(AssertionError, match=r"mean\(K-R\)"):
        assert_three_way(ours, r.float(), r, depth=100)


def test_three_way_rejects_noise_within_the_largest_error(truth):
    """One bad element of the rival's must not excuse bad elements everywhere."""
    rival = rounded(truth).clone()
    rival[0, 0, 0, 0] += 1
    ours = rounded(truth + 0.1 * randn(truth.shape, torch.float64, "cpu", seed=1))
    with pytest.raises(AssertionError, match=r"\|\|K-R\|\|"):
        assert_three_way(ours, rival, truth, depth=9)


def test_three_way_rejects_misplaced_nan(truth):
    ours = rounded(truth)
    ours[0, 0, 0, 0] = float("nan")
    with pytest.raises(AssertionError, match="nan in different places"):
        judge(ours, truth)


def test_three_way_rejects_a_wrong_shape(truth):
    with pytest.raises(AssertionError, match="shapes differ"):
        judge(rounded(truth)[:1], truth)


def test_bitwise_equal_tells_zeros_apart():
    with pytest.raises(AssertionError, match=r"1 of 3 elements differ, first at \[1\]"):
        assert_bitwise_equal(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, -0.0, 2.0]))


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_layouts_are_what_they_say(layout):
    x = randn((2, 3, 4, 5), torch.float32, "cpu")
    y = GRAD_LAYOUTS[layout](x)
    assert y.shape == x.shape
    if layout not in ("expanded", "broadcast_scalar"):
        assert torch.equal(x, y)
    if layout not in ("contiguous", "misaligned"):
        assert not y.is_contiguous()
    assert (y.data_ptr() % 16 != 0) == (layout == "misaligned")
    assert set(LAYOUTS) < set(GRAD_LAYOUTS)


def test_reference_convolution_agrees_with_torch():
    x = randn((2, 6, 9, 11), torch.float64, "cpu").requires_grad_()
    w = randn((9, 2, 3, 2), torch.float64, "cpu", seed=1).requires_grad_()
    b = randn((9,), torch.float64, "cpu", seed=2).requires_grad_()
    geometry = (2, 1), (2, 3), (2, 3), 3
    out = F.conv2d(x, w, b, *geometry)
    g = randn(out.shape, torch.float64, "cpu", seed=3)
    expected = torch.autograd.grad(out, (x, w, b), g)
    torch.testing.assert_close(reference.conv2d(x, w, b, *geometry), out)
    grad_input = reference.conv2d_grad_input(g, w, (9, 11), *geometry)
    torch.testing.assert_close(grad_input, expected[0])
    grad_weight, grad_bias = reference.conv2d_grad_weight(g, x, (3, 2), *geometry)
    torch.testing.assert_close(grad_weight, expected[1])
    torch.testing.assert_close(grad_bias, expected[2])


@pytest.mark.parametrize("align_corners", [False, True])
def test_reference_upsampling_agrees_with_torch(align_corners):
    x = randn((2, 3, 5, 7), torch.float64, "cpu").requires_grad_()
    out = F.interpolate(x, size=(11, 9), mode="bilinear", align_corners=align_corners)
    ours = reference.upsample(x, (11, 9), None, align_corners, "clamp")
    torch.testing.assert_close(ours, out)
    g = randn(out.shape, torch.float64, "cpu", seed=1)
    expected = torch.autograd.grad(out, x, g)[0]
    ours = reference.upsample_grad(g, (5, 7), None, align_corners, "clamp")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reference_loss_agrees_with_torch(reduction):
    x = randn((2, 5, 3, 4), torch.float64, "cpu").requires_grad_()
    target = torch.randint(5, (2, 3, 4))
    target[0, 1] = 255
    weight = torch.rand(5, dtype=torch.float64)
    options = {"ignore_index": 255, "reduction": reduction, "label_smoothing": 0.2}
    out = F.cross_entropy(x, target, weight, **options)
    loss, grad = reference.cross_entropy(x, target, weight, 255, reduction, 0.2)
    torch.testing.assert_close(loss, out)
    torch.testing.assert_close(grad, torch.autograd.grad(out.sum(), x)[0])
