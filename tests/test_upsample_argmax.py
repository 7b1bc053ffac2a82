# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers.closeness import assert_bitwise_equal
from helpers.layouts import LAYOUTS, channels_last, contiguous
from helpers.opcheck import opcheck
from helpers.samples import DTYPES, UPSAMPLE_LOSS, UPSAMPLE_LOSS_CASES, randn
from torch.nn import functional as F

from dilseg.functional import upsample_add, upsample_argmax

by_case = pytest.mark.parametrize("case", UPSAMPLE_LOSS_CASES, ids=lambda c: c.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def options(case):
    u = case.upsample
    return {
        "scale_factor": u.scale,
        "size": u.output_size,
        "align_corners": u.align_corners,
        "border": u.border,
        "origin": u.origin,
    }


def compare(case, x, **more):
    label, confidence = upsample_argmax(x, **options(case), confidence=True, **more)
    assert_bitwise_equal(upsample_argmax(x, **options(case), **more), label)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    up = upsample_add(x.to(accumulator), None, **options(case))
    share = up.softmax(1)
    assert confidence.dtype == accumulator
    assert label.dtype == more.get("dtype", torch.int64)
    # Nearly equal logits may change places by a rounding; the label must still be a largest one.
    chosen = up.gather(1, label.long().unsqueeze(1)).squeeze(1)
    largest = up.amax(1)
    slack = 4 * torch.finfo(accumulator).eps * (largest.abs() + up.abs().amax(1))
    assert (chosen >= largest - slack).all()
    assert (label.long() == up.argmax(1)).float().mean() > 0.99 or label.numel() < 100
    torch.testing.assert_close(confidence, share.amax(1), rtol=1e-5, atol=1e-6)


@by_dtype
@by_case
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_agrees_with_argmax_of_upsampled_logits(case, dtype, layout, device):
    if case.upsample.input[0] == 0:
        pytest.skip("no pixel has a largest logit")
    x, _, _ = case.tensors(dtype, device)
    compare(case, layout(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_layouts_and_label_types(layout, dtype, device):
    case = UPSAMPLE_LOSS["fractional_scale"]
    compare(case, LAYOUTS[layout](case.tensors(torch.float32, device)[0]), dtype=dtype)


def test_integers_agree_exactly_with_torch(device):
    """Values whose interpolation is exact: every tie and every label must agree."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-8, 9, (2, 21, 6, 7), generator=generator).float().to(device)
    up = F.interpolate(x, scale_factor=8, mode="bilinear")
    assert_bitwise_equal(upsample_argmax(x, scale_factor=8), up.argmax(1))


@pytest.mark.parametrize("c", [1, 2, 3, 21, 33, 150])
def test_first_class_wins_a_tie(c, device):
    x = torch.zeros(1, c, 2, 2, device=device)
    label, confidence = upsample_argmax(x, scale_factor=4, confidence=True)
    assert label.eq(0).all()
    torch.testing.assert_close(confidence, torch.full_like(confidence, 1 / c))


@pytest.mark.parametrize("c", [5, 40])
def test_first_nan_wins(c, device):
    x = randn((1, c, 2, 2), torch.float32, device)
    x[0, 4, 0, 0] = float("nan")
    x[0, 2] = float("inf")
    x[0, 3, 0, 0] = float("nan")
    label = upsample_argmax(x, scale_factor=4)
    assert_bitwise_equal(label, F.interpolate(x, scale_factor=4, mode="bilinear").argmax(1))
    assert label[0, 0, 0] < 4


def test_empty_batch(device):
    label, confidence = upsample_argmax(
        torch.zeros(0, 3, 2, 2, device=device), scale_factor=2, confidence=True
    )
    assert label.shape == confidence.shape == (0, 4, 4)


def test_infinite_logits_of_impossible_classes(device):
    x = randn((1, 3, 3, 3), torch.float64, device)
    x[:, 1] = float("-inf")
    label, confidence = upsample_argmax(x, scale_factor=2, confidence=True)
    up = F.interpolate(x, scale_factor=2, mode="bilinear")
    inside = label[:, 1:-1, 1:-1]  # at the edges a weight of 0 makes nan of inf, in torch too
    assert inside.ne(1).all()
    assert_bitwise_equal(label, up.argmax(1))
    torch.testing.assert_close(confidence, up.softmax(1).amax(1), equal_nan=True)


def test_carries_no_gradient(device):
    x = randn((1, 3, 2, 2), torch.float32, device).requires_grad_()
    label, confidence = upsample_argmax(x, scale_factor=2, confidence=True)
    assert not label.requires_grad
    assert not confidence.requires_grad


@by_case
def test_opcheck(case, device):
    x, _, _ = case.tensors(torch.float32, device)
    u = case.upsample
    args = (x, list(u.output_size), *case.rule)
    opcheck(torch.ops.dilseg.upsample_argmax, (*args, torch.int32, True))
    opcheck(torch.ops.dilseg.upsample_argmax, (*args, torch.int64, False), traced=False)


@pytest.mark.parametrize("in_dim", [0, 2])
@pytest.mark.parametrize("confidence", [False, True])
def test_vmap(in_dim, confidence, device):
    x = randn((2, 3, 4, 5), torch.float32, device)
    stacked = torch.stack([x, 2 * x, -x], in_dim)

    def f(x):
        return upsample_argmax(x, scale_factor=2, confidence=confidence)

    out = torch.vmap(f, in_dim)(stacked)
    for i in range(3):
        expected = f(stacked.select(in_dim, i))
        for a, b in zip(
            out if confidence else (out,), expected if confidence else (expected,), strict=True
        ):
            assert_bitwise_equal(a[i], b)


def test_threads_do_not_change_the_bits():
    x = randn((2, 21, 17, 19), torch.float32, "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(upsample_argmax(x, scale_factor=8, confidence=True))
    finally:
        torch.set_num_threads(before)
    for label, confidence in results[1:]:
        assert_bitwise_equal(label, results[0][0])
        assert_bitwise_equal(confidence, results[0][1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_labels_are_written_once(dtype, counted):
    x = randn((1, 21, 32, 32), torch.float32, "cpu")
    with counted() as traffic:
        label = upsample_argmax(x, scale_factor=8, dtype=dtype)
    assert traffic.written == label.nbytes
    # Neighbouring tiles share their rims: 45 of 32 rows and columns.
    assert x.nbytes <= traffic.read <= 2 * x.nbytes
