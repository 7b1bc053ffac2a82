# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers import reference
from helpers.closeness import assert_bitwise_equal, assert_three_way
from helpers.layouts import LAYOUTS, channels_last, contiguous
from helpers.opcheck import opcheck
from helpers.samples import DTYPES, LOSS, LOSS_CASES, randn
from torch.nn import functional as F

from dilseg.functional import cross_entropy

by_case = pytest.mark.parametrize("case", LOSS_CASES, ids=lambda c: c.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Cases whose gradient is defined and not zero everywhere.
SMOOTH = [c for c in LOSS_CASES if c.ignored < 1 and c.shape[0] in (1, 2) and c.shape[1] < 10]
SMOOTH = [c for c in SMOOTH if c.name not in ("long_row", "one_class")]
SMOOTH = [c for c in SMOOTH if not c.name.startswith(("huge_logits", "second_tile"))]
by_smooth = pytest.mark.parametrize("case", SMOOTH, ids=lambda c: c.name)


def largest(x):
    return float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0


def compare_all(case, x, target, weight, grad_output):
    leaf = x.detach().requires_grad_()
    ours = cross_entropy(leaf, target, weight, **case.keywords)
    assert ours.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    # torch takes the dtype of the logits for its weights and result, and int64 labels.
    rival_leaf = x.detach().requires_grad_()
    rival = F.cross_entropy(
        rival_leaf, target.long(), None if weight is None else weight.to(x.dtype), **case.keywords
    )
    loss, grad = reference.cross_entropy(
        x,
        target,
        weight,
        case.ignore_index,
        case.reduction,
        case.label_smoothing,
        grad_output,
    )
    depth = max(1, target.numel())
    scale = 1 + largest(loss) + largest(x)
    assert_three_way(ours, rival.to(ours.dtype), loss, depth=depth, scale=scale)

    ours.backward(grad_output)
    rival.backward(grad_output.to(rival.dtype))
    assert leaf.grad.dtype == x.dtype
    scale = largest(grad) * (1 + largest(x))
    assert_three_way(leaf.grad, rival_leaf.grad, grad, depth=4, scale=scale)
    ignored = (target.long() == case.ignore_index).unsqueeze(1).expand(x.shape)
    assert leaf.grad[ignored].eq(0).all()


@by_dtype
@by_case
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_agrees_with_torch_and_reference(case, dtype, layout, device):
    x, target, weight = case.tensors(dtype, device)
    compare_all(case, layout(x), target, weight, case.grad_output(dtype, device))


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["weighted_mean", "smoothed_weighted_none", "smoothed_weighted_vectors"]
)
def test_layouts(name, layout, dtype, device):
    case = LOSS[name]
    x, target, weight = case.tensors(dtype, device)
    compare_all(case, LAYOUTS[layout](x), target, weight, case.grad_output(dtype, device))


def test_strided_and_expanded_labels_and_gradients(device):
    case = LOSS["none"]
    x, target, weight = case.tensors(torch.float32, device)
    g = case.grad_output(torch.float32, device)
    compare_all(case, x, target.transpose(1, 2).contiguous().transpose(1, 2), weight, g)
    compare_all(case, x, target[:1].expand_as(target), weight, g)
    compare_all(case, x, target, weight, g[:, :1].expand_as(g))
    compare_all(case, x, target, weight, g.flatten()[0].expand_as(g))


@pytest.mark.parametrize("dims", [(), (3,), (3, 2), (3, 2, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_rank(dims, reduction, device):
    x = randn((2, 5, *dims), torch.float64, device).requires_grad_()
    target = torch.randint(5, (2, *dims), device=device)
    out = cross_entropy(x, target, reduction=reduction)
    rival = F.cross_entropy(x, target, reduction=reduction)
    torch.testing.assert_close(out, rival)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(rival.sum(), x)[0]
    )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_single_pixel_without_batch(reduction, device):
    x, target = randn((5,), torch.float64, device), torch.tensor(3, device=device)
    torch.testing.assert_close(
        cross_entropy(x, target, reduction=reduction),
        F.cross_entropy(x, target, reduction=reduction),
    )


def test_defaults_are_torchs(device):
    x = randn((2, 5, 3, 3), torch.float32, device)
    target = torch.randint(5, (2, 3, 3), device=device)
    target[0, 0, 0] = -100
    torch.testing.assert_close(cross_entropy(x, target), F.cross_entropy(x, target))


def test_ignored_logits_are_not_read(device):
    x = randn((1, 4, 2, 2), torch.float32, device)
    target = torch.tensor([[[0, 255], [3, 255]]], device=device)
    clean = cross_entropy(x, target, ignore_index=255)
    x[:, :, :, 1] = float("nan")
    x.requires_grad_()
    loss = cross_entropy(x, target, ignore_index=255)
    assert_bitwise_equal(loss.detach(), clean)
    loss.backward()
    assert x.grad[:, :, :, 1].eq(0).all()
    assert x.grad[:, :, :, 0].isfinite().all()


def test_nothing_valid_is_nan_for_mean_and_zero_for_sum(device):
    x = randn((1, 4, 2, 2), torch.float32, device).requires_grad_()
    target = torch.full((1, 2, 2), 255, device=device)
    assert cross_entropy(x, target, ignore_index=255).isnan()
    assert cross_entropy(x, target, ignore_index=255, reduction="sum") == 0
    assert cross_entropy(x, target, ignore_index=255, reduction="none").eq(0).all()
    cross_entropy(x, target, ignore_index=255).backward()
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (1, 3, 1, 3), (1, 70, 2, 3)], ids=str)
def test_infinite_logits_of_impossible_classes(shape, dtype, device):
    """Also where they are all classes that one warp holds, and all of a block of classes."""
    x = randn(shape, dtype, device)
    x[:, 2:] = float("-inf")
    x.requires_grad_()
    target = torch.randint(2, (1, *shape[2:]), device=device)
    ours, rival = cross_entropy(x, target), F.cross_entropy(x, target)
    torch.testing.assert_close(ours, rival)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(rival, x))


@pytest.mark.parametrize("classes", [3, 40, 400])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_logits_that_are_not_finite(value, classes, device):
    """In some pixels one class, in others all of them; the pixels in between are not touched."""
    x = randn((1, classes, 2, 4), torch.float32, device)
    x[:, 1, :, 0] = value
    x[:, :, :, 2] = value
    x.requires_grad_()
    target = torch.randint(classes, (1, 2, 4), device=device)
    target[:, :, 0] = torch.tensor([0, 1])
    ours = cross_entropy(x, target, reduction="none")
    rival = F.cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(ours, rival, equal_nan=True)
    ours, rival = (torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, rival))
    torch.testing.assert_close(ours, rival, equal_nan=True)


def cropped(x):
    """The middle of a larger map, whose rows do not follow one another."""
    return F.pad(x, (2, 4, 1, 1), value=float("nan"))[:, :, 1:-1, 2:-4]


@by_dtype
@pytest.mark.parametrize("classes", [11, 21, 32, 40])
def test_alignment_does_not_change_the_bits(classes, dtype, device):
    """How many pixels a thread owns, and through what memory logits reach it, is not visible."""
    values = randn((1, classes, 6, 6), dtype, device)
    target = torch.randint(classes, (1, 6, 6), device=device)
    results = []
    for layout in (contiguous, LAYOUTS["misaligned"], channels_last, cropped):
        x = layout(values).detach().requires_grad_()
        loss = cross_entropy(x, target)
        grad = torch.autograd.grad(loss, x)[0]
        results.append((loss.detach(), grad.contiguous()))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 21, 32, 40),
        (2, 21, 15, 33),
        (1, 11, 32, 32),
        (1, 19, 18, 30),
        (1, 32, 16, 16),
        (1, 33, 16, 16),
        (1, 150, 16, 16),
        (1, 384, 8, 8),
    ],
    ids=str,
)
def test_logits_are_read_once_and_gradients_written_once(shape, layout, dtype, counted):
    x = layout(randn(shape, dtype, "cpu")).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    logits = x.numel() * x.element_size()
    per_pixel = target.numel() * (target.element_size() + 4)  # label, logsumexp
    with counted() as forward:
        loss = cross_entropy(x, target)
    with counted() as backward:
        loss.backward()
    assert logits + per_pixel <= forward.total <= 1.05 * (logits + per_pixel)
    assert 2 * logits + per_pixel <= backward.total <= 1.05 * (2 * logits + per_pixel)


def test_more_classes_than_registers_are_read_twice_in_backward(counted):
    x = randn((1, 400, 8, 8), torch.float32, "cpu").requires_grad_()
    target = torch.randint(400, (1, 8, 8))
    logits = x.numel() * 4
    with counted() as forward:
        loss = cross_entropy(x, target)
    with counted() as backward:
        loss.backward()
    assert logits <= forward.read <= 1.1 * logits
    assert 2 * logits <= backward.read <= 2.2 * logits
    assert backward.written == logits


def test_saved_outputs(device):
    x, target, weight = LOSS["weighted_mean"].tensors(torch.float64, device)
    _, logsumexp, total_weight = torch.ops.dilseg.cross_entropy(
        x.requires_grad_(), target, weight, "mean", 255, 0.0
    )
    valid = target != 255
    torch.testing.assert_close(logsumexp[valid], x.detach().logsumexp(1)[valid])
    torch.testing.assert_close(total_weight, weight[target[valid]].sum())
    assert not logsumexp.requires_grad
    assert not total_weight.requires_grad


@by_smooth
def test_gradients_of_first_and_second_order(case, device):
    x, target, weight = case.tensors(torch.float64, device)
    x = x[:, :, :3].detach().requires_grad_()
    target = target[:, :3]

    def f(x):
        return cross_entropy(x, target, weight, **case.keywords)

    assert torch.autograd.gradcheck(f, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x,), fast_mode=True)


def test_third_order_gradient(device):
    case = LOSS["smoothed_weighted_mean"]
    x, target, weight = case.tensors(torch.float64, device)
    x.requires_grad_()
    ours = cross_entropy(x, target, weight, **case.keywords)
    rival = F.cross_entropy(x, target, weight, **case.keywords)
    for _ in range(3):
        ours, rival = (
            torch.autograd.grad(out, x, create_graph=True)[0].pow(2).sum() for out in (ours, rival)
        )
        torch.testing.assert_close(ours, rival)


def test_gradients_of_the_backward_operator_stay_clear_of_ignored_nan(device):
    case = LOSS["mean"]
    x, target, _ = case.tensors(torch.float64, device)
    x = torch.where((target == 255).unsqueeze(1), float("nan"), x).requires_grad_()
    loss = cross_entropy(x, target, ignore_index=255)
    grad = torch.autograd.grad(loss, x, create_graph=True)[0]
    second = torch.autograd.grad(grad.pow(2).sum(), x)[0]
    assert second.isfinite().all()
    assert second[(target == 255).unsqueeze(1).expand(x.shape)].eq(0).all()


def test_memory_format_follows_the_input(device):
    x, target, _ = LOSS["mean"].tensors(torch.float32, device)
    for layout, memory_format in (
        (contiguous, torch.contiguous_format),
        (channels_last, torch.channels_last),
    ):
        leaf = layout(x).detach().requires_grad_()
        cross_entropy(leaf, target, ignore_index=255).backward()
        assert leaf.grad.is_contiguous(memory_format=memory_format)


@by_case
def test_opcheck(case, device):
    x, target, weight = case.tensors(torch.float32, device)
    op = torch.ops.dilseg.cross_entropy
    _, logsumexp, total_weight = op(x, target, weight, *case.options)
    # opcheck compares by ==, and the loss over no pixel, nan, is not equal to itself.
    if case.name != "all_ignored_mean":
        opcheck(op, (x.requires_grad_(), target, weight, *case.options))
    g = case.grad_output(torch.float32, device).requires_grad_()
    x = x.detach().requires_grad_()
    opcheck(
        torch.ops.dilseg.cross_entropy_backward,
        (g, x, target, weight, logsumexp, total_weight, *case.options),
        traced=case in SMOOTH,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_layouts(layout, device):
    case = LOSS["none"]
    x, target, _ = case.tensors(torch.float32, device)
    x = LAYOUTS[layout](x).detach().requires_grad_()
    op = torch.ops.dilseg.cross_entropy
    _, logsumexp, total_weight = op(x, target, None, *case.options)
    opcheck(op, (x, target, None, *case.options), traced=layout == "channels_last")
    g = case.grad_output(torch.float32, device)
    args = (g, x, target, None, logsumexp, total_weight, *case.options)
    opcheck(torch.ops.dilseg.cross_entropy_backward, args, traced=False)


@pytest.mark.parametrize("in_dims", [(0, 0, None), (1, None, None), (None, 1, None), (2, 0, 0)])
@pytest.mark.parametrize(
    "name", ["weighted_mean", "smoothed_weighted_sum", "smoothed_weighted_none"]
)
def test_vmap(name, in_dims, device):
    case = LOSS[name]
    x, target, weight = case.tensors(torch.float64, device)
    tensors = [x, target, weight]
    changed = [
        (x, 2 * x, -x),
        (target, target.flip(1), torch.full_like(target, 255)),
        (weight, 2 * weight, weight.flip(0)),
    ]
    stacked = [
        t if d is None else torch.stack(c, d)
        for t, c, d in zip(tensors, changed, in_dims, strict=True)
    ]
    stacked[0] = stacked[0].requires_grad_()

    def f(x, target, weight):
        return cross_entropy(x, target, weight, **case.keywords)

    out = torch.vmap(f, in_dims)(*stacked)
    expected = torch.stack(
        [
            f(*(t if d is None else t.select(d, i) for t, d in zip(stacked, in_dims, strict=True)))
            for i in range(3)
        ]
    )
    torch.testing.assert_close(out, expected, equal_nan=True)
    g = torch.ones_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, stacked[0], g), torch.autograd.grad(expected, stacked[0], g)
    )


@pytest.mark.parametrize("name", ["weighted_mean", "sum", "none"])
def test_vmap_over_the_backward(name, device):
    case = LOSS[name]
    x, target, weight = case.tensors(torch.float64, device)
    x, target = x[:1, :, :2], target[:1, :2]

    def jacobian(loss):
        return torch.autograd.functional.jacobian(
            lambda x: loss(x, target, weight, **case.keywords), x, vectorize=True
        )

    torch.testing.assert_close(jacobian(cross_entropy), jacobian(F.cross_entropy))


@by_dtype
@pytest.mark.parametrize("name", ["smoothed_weighted_mean", "voc_classes"])
def test_twenty_runs_give_the_same_bits(name, dtype, device):
    case = LOSS[name]
    x, target, weight = case.tensors(dtype, device)
    x.requires_grad_()

    def run():
        loss = cross_entropy(x, target, weight, **case.keywords)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    first = run()
    for i in range(19):
        torch.use_deterministic_algorithms(i % 2 == 0)
        try:
            again = run()
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b in zip(first, again, strict=True):
            assert_bitwise_equal(a, b)


def test_threads_do_not_change_the_bits():
    x = randn((2, 21, 97, 101), torch.float32, "cpu").requires_grad_()
    target = torch.randint(21, (2, 97, 101))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = cross_entropy(x, target)
            results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert_bitwise_equal(loss, results[0][0])
        assert_bitwise_equal(grad, results[0][1])


def test_sum_over_many_pixels_keeps_its_accuracy(device):
    """A float32 running sum of a million equal losses drifts by far more than this."""
    x = torch.zeros(1, 3, 1000, 1000, device=device)
    target = torch.zeros(1, 1000, 1000, dtype=torch.uint8, device=device)
    loss = cross_entropy(x, target, reduction="sum")
    expected = 1e6 * torch.tensor(3.0).log().double().item()
    assert abs(loss.item() - expected) <= 2e-7 * expected


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_accepts_half_logits_as_they_are(half, device):
    x, target, weight = LOSS["weighted_mean"].tensors(torch.float32, device)
    x = x.to(half).requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=half):
        loss = cross_entropy(x, target, weight, ignore_index=255)
    assert loss.dtype == torch.float32
    expected = cross_entropy(x, target, weight, ignore_index=255)
    assert_bitwise_equal(loss.detach(), expected.detach())
    loss.backward()
    assert x.grad.dtype == half


@pytest.mark.parametrize("classes", [5, 50])
def test_label_out_of_range_names_the_pixel(classes, backend):
    if backend.device == "cuda":
        pytest.skip("a trap ends the process's use of the GPU, see test_cuda.py")
    target = torch.zeros(1, 4, 3, dtype=torch.uint8)
    target[0, 2, 1] = 200
    with pytest.raises(
        (ValueError, RuntimeError),
        match=rf"dilseg::cross_entropy: expected target labels in \[0, {classes}\) .* but "
        r"got label 200 at pixel n=0, h=2, w=1; did you forget ignore_index=255\?",
    ):
        cross_entropy(torch.zeros(1, classes, 4, 3), target)


def test_negative_class_weights(device):
    """torch takes them; with smoothing the factor of the probabilities may even vanish."""
    weight = torch.tensor([-1.0, 0.5, 2.0, -1.5], dtype=torch.float64, device=device)
    target = torch.tensor([[[0, 1, 2], [3, 0, 255]]], device=device)
    for smoothing in (0.0, 0.1):
        x = randn((1, 4, 2, 3), torch.float64, device).requires_grad_()
        ours = cross_entropy(
            x, target, weight, ignore_index=255, reduction="sum", label_smoothing=smoothing
        )
        rival = F.cross_entropy(
            x, target, weight, ignore_index=255, reduction="sum", label_smoothing=smoothing
        )
        torch.testing.assert_close(ours, rival)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(rival, x))


def test_negative_class_weights_that_cancel(device):
    # The factor of p at label 0: 0.75 * -1 + 0.25 / 3 * 9 = 0.
    weight = torch.tensor([-1.0, 1.0, 9.0], dtype=torch.float64, device=device)
    x = randn((1, 3, 1, 2), torch.float64, device).requires_grad_()
    target = torch.zeros((1, 1, 2), dtype=torch.int64, device=device)
    ours = cross_entropy(x, target, weight, reduction="sum", label_smoothing=0.25)
    rival = F.cross_entropy(x, target, weight, reduction="sum", label_smoothing=0.25)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(rival, x))
