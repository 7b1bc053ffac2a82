# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers import reference
from helpers.closeness import assert_bitwise_equal, assert_three_way
from helpers.layouts import LAYOUTS, channels_last, contiguous
from helpers.opcheck import opcheck
from helpers.samples import DTYPES, UPSAMPLE_LOSS, UPSAMPLE_LOSS_CASES, randn
from test_upsample_add import rival_upsample_add
from torch.nn import functional as F

from dilseg.functional import cross_entropy, upsample_add, upsample_cross_entropy

by_case = pytest.mark.parametrize("case", UPSAMPLE_LOSS_CASES, ids=lambda c: c.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def rival_loss(case, x, target, weight):
    """torch's own operators, in float32 for half logits, as ours interpolates them."""
    up = rival_upsample_add(x.to(accumulator(x.dtype)), None, case.upsample)
    return F.cross_entropy(up, target.long(), weight, **case.loss.keywords)


def largest(x):
    return float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0


def compare_all(case, x, target, weight, grad_output):
    leaf = x.detach().requires_grad_()
    ours = upsample_cross_entropy(leaf, target, weight, **case.keywords)
    assert ours.dtype == accumulator(x.dtype)
    rival_leaf = x.detach().requires_grad_()
    rival = rival_loss(case, rival_leaf, target, weight)
    up = reference.upsample(x, case.upsample.output_size, *case.upsample.rule)
    loss, grad_up = reference.cross_entropy(
        up,
        target,
        weight,
        case.loss.ignore_index,
        case.loss.reduction,
        case.loss.label_smoothing,
        grad_output,
    )
    truth = reference.upsample_grad(grad_up, x.shape[2:], *case.upsample.rule)
    # The roundings of the coordinates' weights come on top of those of the loss.
    depth = max(64, target.numel())
    assert_three_way(ours, rival, loss, depth=depth, scale=1 + largest(loss) + largest(x))

    ours.backward(grad_output)
    rival.backward(grad_output)
    assert leaf.grad.dtype == x.dtype
    scale = largest(truth) * (1 + largest(x))
    assert_three_way(leaf.grad, rival_leaf.grad, truth, depth=256, scale=scale)


@by_dtype
@by_case
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_agrees_with_torch_and_reference(case, dtype, layout, device):
    x, target, weight = case.tensors(dtype, device)
    compare_all(case, layout(x), target, weight, case.grad_output(dtype, device))


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["smoothed_weighted_mean", "smoothed_weighted_none"])
def test_layouts(name, layout, dtype, device):
    case = UPSAMPLE_LOSS[name]
    x, target, weight = case.tensors(dtype, device)
    compare_all(case, LAYOUTS[layout](x), target, weight, case.grad_output(dtype, device))


def test_strided_and_expanded_labels_and_gradients(device):
    case = UPSAMPLE_LOSS["none"]
    x, target, weight = case.tensors(torch.float32, device)
    g = case.grad_output(torch.float32, device)
    compare_all(case, x, target.transpose(1, 2).contiguous().transpose(1, 2), weight, g)
    compare_all(case, x, target[:1].expand_as(target), weight, g)
    compare_all(case, x, target, weight, g[:, :1].expand_as(g))
    compare_all(case, x, target, weight, g.flatten()[0].expand_as(g))


@pytest.mark.parametrize("seed", range(12))
def test_random_problems(seed, device):
    """Against the two operators that it fuses."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    c = draw(1, 40)
    x = randn((draw(1, 2), c, draw(1, 9), draw(1, 9)), torch.float64, device, seed=seed)
    size = (draw(1, 50), draw(1, 50))
    target = torch.randint(c, (x.shape[0], *size), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.3] = 255
    target[0, 0, 0] = 0
    target = target.to(device)
    aligned = bool(draw(0, 1))
    scale = None if draw(0, 1) else (draw(2, 60) / 10, draw(2, 60) / 10)
    border = "zero" if scale and draw(0, 1) else "clamp"
    origin = (draw(-9, 9), draw(-9, 9)) if scale else (0, 0)
    rule = {
        "scale_factor": scale,
        "align_corners": aligned,
        "border": border,
        "origin": origin,
    }
    x.requires_grad_()
    ours = upsample_cross_entropy(x, target, ignore_index=255, **rule)
    up = upsample_add(x, None, size=size, **rule)
    both = cross_entropy(up, target, ignore_index=255)
    torch.testing.assert_close(ours, both)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(both, x))


def test_ignored_pixels_send_no_gradient_whatever_they_hold(device):
    x = randn((1, 3, 4, 4), torch.float32, device)
    target = torch.randint(3, (1, 16, 16), device=device)
    target[:, :, 10:] = 255  # all that read the last column, and some that read the one before
    clean = x.clone().requires_grad_()
    expected = upsample_cross_entropy(clean, target, ignore_index=255)
    expected.backward()
    assert clean.grad[..., :3].ne(0).any()
    assert clean.grad[..., 3].eq(0).all()
    for bad in (float("nan"), float("inf"), float("-inf")):
        dirty = x.clone()
        dirty[..., 3] = bad
        dirty.requires_grad_()
        loss = upsample_cross_entropy(dirty, target, ignore_index=255)
        loss.backward()
        assert_bitwise_equal(loss.detach(), expected.detach())
        assert_bitwise_equal(dirty.grad, clean.grad)


def test_nothing_valid_is_nan_for_mean_and_zero_for_sum(device):
    x = randn((1, 4, 2, 2), torch.float32, device).requires_grad_()
    target = torch.full((1, 8, 8), 255, device=device)
    assert upsample_cross_entropy(x, target, ignore_index=255).isnan()
    assert upsample_cross_entropy(x, target, ignore_index=255, reduction="sum") == 0
    assert upsample_cross_entropy(x, target, ignore_index=255, reduction="none").eq(0).all()
    upsample_cross_entropy(x, target, ignore_index=255).backward()
    assert x.grad.eq(0).all()


def test_inputs_that_no_label_reads_get_zeros(device):
    """A window over the middle of the map: beyond it the gradient is written, as zeros."""
    x = randn((1, 3, 8, 8), torch.float32, device).requires_grad_()
    target = torch.zeros((1, 4, 4), dtype=torch.int64, device=device)
    upsample_cross_entropy(x, target, scale_factor=2, origin=(6, 6)).backward()
    assert x.grad[:, :, 2:6, 2:6].ne(0).all()
    x.grad[:, :, 2:6, 2:6] = 0
    assert x.grad.eq(0).all()


def test_without_gradients_none_is_computed(device):
    x, target, _ = UPSAMPLE_LOSS["mean"].tensors(torch.float32, device)
    op = torch.ops.dilseg.upsample_cross_entropy
    options = (*UPSAMPLE_LOSS["mean"].rule, "mean", 255, 0.0)
    loss, _, grad = op(x, target, None, *options, False)
    assert grad.numel() == 0
    again, _, grad = op(x, target, None, *options, True)
    assert grad.shape == x.shape
    assert_bitwise_equal(loss, again)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@by_dtype
def test_create_graph_gives_the_same_bits(dtype, reduction, device):
    """Plain backward scales what forward kept; a graph of the gradient needs the operator."""
    case = UPSAMPLE_LOSS["fractional_scale"]
    x, target, weight = case.tensors(dtype, device)
    x.requires_grad_()
    options = {**case.keywords, "reduction": reduction}
    loss = upsample_cross_entropy(x, target, weight, **options)
    g = torch.full_like(loss, 0.37)
    kept = torch.autograd.grad(loss, x, g, retain_graph=True)[0]
    computed = torch.autograd.grad(loss, x, g, create_graph=True)[0]
    assert_bitwise_equal(kept, computed.detach())


SMOOTH = [
    UPSAMPLE_LOSS[name]
    for name in (
        "mean",
        "sum",
        "none",
        "smoothed_weighted_mean",
        "smoothed_weighted_none",
        "fractional_scale",
        "shrinking_scale",
        "aligned",
        "deconvolution",
    )
]


@pytest.mark.parametrize("case", SMOOTH, ids=lambda c: c.name)
def test_gradients_of_first_and_second_order(case, device):
    x, target, weight = case.tensors(torch.float64, device)
    x.requires_grad_()

    def f(x):
        return upsample_cross_entropy(x, target, weight, **case.keywords)

    assert torch.autograd.gradcheck(f, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x,), fast_mode=True)


def test_third_order_gradient(device):
    case = UPSAMPLE_LOSS["smoothed_weighted_mean"]
    x, target, weight = case.tensors(torch.float64, device)
    x.requires_grad_()
    ours = upsample_cross_entropy(x, target, weight, **case.keywords)
    rival = rival_loss(case, x, target, weight)
    for _ in range(3):
        ours, rival = (
            torch.autograd.grad(out, x, create_graph=True)[0].pow(2).sum() for out in (ours, rival)
        )
        torch.testing.assert_close(ours, rival)


def test_memory_format_follows_the_input(device):
    x, target, _ = UPSAMPLE_LOSS["mean"].tensors(torch.float32, device)
    for layout, memory_format in (
        (contiguous, torch.contiguous_format),
        (channels_last, torch.channels_last),
    ):
        leaf = layout(x).detach().requires_grad_()
        upsample_cross_entropy(leaf, target, ignore_index=255, reduction="none").sum().backward()
        assert leaf.grad.is_contiguous(memory_format=memory_format)


@by_case
def test_opcheck(case, device):
    x, target, weight = case.tensors(torch.float32, device)
    options = (*case.rule, *case.loss.options)
    op = torch.ops.dilseg.upsample_cross_entropy
    _, total_weight, _ = op(x, target, weight, *options, True)
    # opcheck compares by ==, and the loss over no pixel, nan, is not equal to itself.
    if case.name != "all_ignored_mean":
        opcheck(op, (x.requires_grad_(), target, weight, *options, True))
    g = case.grad_output(torch.float32, device).requires_grad_()
    x = x.detach().requires_grad_()
    opcheck(
        torch.ops.dilseg.upsample_cross_entropy_backward,
        (g, x, target, weight, total_weight, *options),
        traced=case in SMOOTH,
    )


@pytest.mark.parametrize("in_dims", [(0, 0, None), (1, None, None), (None, 1, None), (2, 0, 0)])
@pytest.mark.parametrize("name", ["smoothed_weighted_mean", "smoothed_weighted_none"])
def test_vmap(name, in_dims, device):
    case = UPSAMPLE_LOSS[name]
    x, target, weight = case.tensors(torch.float64, device)
    changed = [
        (x, 2 * x, -x),
        (target, target.flip(1), torch.full_like(target, 255)),
        (weight, 2 * weight, weight.flip(0)),
    ]
    stacked = [
        t if d is None else torch.stack(c, d)
        for t, c, d in zip((x, target, weight), changed, in_dims, strict=True)
    ]
    stacked[0] = stacked[0].requires_grad_()

    def f(x, target, weight):
        return upsample_cross_entropy(x, target, weight, **case.keywords)

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


@by_dtype
@pytest.mark.parametrize("name", ["smoothed_weighted_mean", "voc_eight_times"])
def test_twenty_runs_give_the_same_bits(name, dtype, device):
    case = UPSAMPLE_LOSS[name]
    x, target, weight = case.tensors(dtype, device)
    x.requires_grad_()

    def run():
        loss = upsample_cross_entropy(x, target, weight, **case.keywords)
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
    x = randn((2, 21, 17, 19), torch.float32, "cpu").requires_grad_()
    target = torch.randint(21, (2, 136, 152))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = upsample_cross_entropy(x, target)
            results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert_bitwise_equal(loss, results[0][0])
        assert_bitwise_equal(grad, results[0][1])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_accepts_half_logits_as_they_are(half, device):
    case = UPSAMPLE_LOSS["mean"]
    x, target, _ = case.tensors(torch.float32, device)
    x = x.to(half).requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=half):
        loss = upsample_cross_entropy(x, target, **case.keywords)
    assert loss.dtype == torch.float32
    expected = upsample_cross_entropy(x, target, **case.keywords)
    assert_bitwise_equal(loss.detach(), expected.detach())
    loss.backward()
    assert x.grad.dtype == half


def test_half_logits_are_not_rounded_after_interpolation(device):
    """They are the same as float32 logits of the same values."""
    case = UPSAMPLE_LOSS["voc_eight_times"]
    x, target, _ = case.tensors(torch.bfloat16, device)
    half, full = x.requires_grad_(), x.detach().float().requires_grad_()
    a = upsample_cross_entropy(half, target, **case.keywords)
    b = upsample_cross_entropy(full, target, **case.keywords)
    assert_bitwise_equal(a.detach(), b.detach())
    a.backward()
    b.backward()
    assert_bitwise_equal(half.grad, full.grad.to(torch.bfloat16))


def test_large_problem_on_the_cpu_against_torch():
    """Many bands and tiles at once, odd sizes."""
    x = randn((2, 19, 37, 43), torch.float32, "cpu").requires_grad_()
    target = torch.randint(19, (2, 301, 347))
    target[:, :40] = 255
    ours = upsample_cross_entropy(x, target, ignore_index=255)
    up = F.interpolate(x.double(), (301, 347), mode="bilinear")
    truth = F.cross_entropy(up, target, ignore_index=255)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)
    a = torch.autograd.grad(ours, x)[0].double()
    b = torch.autograd.grad(truth, x)[0].double()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("classes", [5, 50])
def test_label_out_of_range_names_the_pixel(classes, backend):
    if backend.device == "cuda":
        pytest.skip("a trap ends the process's use of the GPU, see test_cuda.py")
    target = torch.zeros(1, 4, 3, dtype=torch.uint8)
    target[0, 2, 1] = 200
    with pytest.raises(
        (ValueError, RuntimeError),
        match=rf"dilseg::upsample_cross_entropy: expected target labels in \[0, {classes}\) .* but "
        r"got label 200 at pixel n=0, h=2, w=1; did you forget ignore_index=255\?",
    ):
        upsample_cross_entropy(torch.zeros(1, classes, 2, 2), target)


def test_negative_class_weights(device):
    """torch takes them; with smoothing the factor of the probabilities may even vanish."""
    weight = torch.tensor([-1.0, 0.5, 2.0, -1.5], dtype=torch.float64, device=device)
    target = torch.tensor([[[0, 1, 2], [3, 0, 255]]], device=device)
    for smoothing in (0.0, 0.1):
        x = randn((1, 4, 1, 2), torch.float64, device).requires_grad_()
        ours = upsample_cross_entropy(
            x, target, weight, ignore_index=255, reduction="sum", label_smoothing=smoothing
        )
        rival = F.cross_entropy(
            F.interpolate(x, (2, 3), mode="bilinear"),
            target,
            weight,
            ignore_index=255,
            reduction="sum",
            label_smoothing=smoothing,
        )
        torch.testing.assert_close(ours, rival)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(rival, x))


def test_negative_class_weights_that_cancel(device):
    # The factor of p at label 0: 0.75 * -1 + 0.25 / 3 * 9 = 0.
    weight = torch.tensor([-1.0, 1.0, 9.0], dtype=torch.float64, device=device)
    x = randn((1, 3, 1, 2), torch.float64, device).requires_grad_()
    target = torch.zeros((1, 1, 2), dtype=torch.int64, device=device)
    ours = upsample_cross_entropy(x, target, weight, reduction="sum", label_smoothing=0.25)
    rival = F.cross_entropy(x, target, weight, reduction="sum", label_smoothing=0.25)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(rival, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_logits_of_full_resolution_are_moved(dtype, counted):
    x = randn((1, 21, 32, 32), dtype, "cpu")
    target = torch.randint(21, (1, 256, 256))
    options = ([8.0, 8.0], False, "clamp", [0, 0], "mean", 255, 0.0)
    forward_op = torch.ops.dilseg.upsample_cross_entropy
    backward_op = torch.ops.dilseg.upsample_cross_entropy_backward
    with counted() as forward:
        loss, total_weight, grad = forward_op(x, target, None, *options, True)
    with counted() as backward:
        backward_op(torch.ones_like(loss), x, target, None, total_weight, *options)
    with counted() as without_gradient:
        forward_op(x, target, None, *options, False)
    floor = target.nbytes + x.nbytes
    assert floor + grad.nbytes <= forward.total <= 1.5 * (floor + grad.nbytes)
    assert floor + x.nbytes <= backward.total <= 1.5 * (floor + x.nbytes)
    assert floor <= without_gradient.total <= 1.2 * floor
