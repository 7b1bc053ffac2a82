# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch
from helpers import reference
from helpers.closeness import assert_bitwise_equal, assert_three_way
from helpers.layouts import GRAD_LAYOUTS, LAYOUTS, channels_last, contiguous
from helpers.opcheck import opcheck
from helpers.samples import DTYPES, UPSAMPLE, UPSAMPLE_CASES, UpsampleCase, randn
from torch.nn import functional as F

from dilseg.functional import upsample_add

by_case = pytest.mark.parametrize("case", UPSAMPLE_CASES, ids=lambda c: c.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def rival_upsample_add(x, skip, case):
    """The same from torch's own operators, in the dtype of ``x``."""
    if case.border == "zero" or case.origin != (0, 0) or (case.scale and case.size):
        # A ring of copies of the edge, or of zeros, makes the edge an interior.
        ring = 8
        mode = "constant" if case.border == "zero" else "replicate"
        # replicate has no kernel for empty maps, which none of these cases has.
        padded = F.pad(x, (ring,) * 4, mode=mode)
        up = F.interpolate(padded, scale_factor=case.scale, mode="bilinear")
        top, left = (int(ring * s) + o for s, o in zip(case.scale, case.origin, strict=True))
        up = up[:, :, top : top + case.output_size[0], left : left + case.output_size[1]]
    else:
        up = F.interpolate(
            x,
            size=case.size,
            scale_factor=case.scale,
            mode="bilinear",
            align_corners=case.align_corners,
        )
    return up if skip is None else up + case.crop(skip)


def compare_all(case, x, skip, grad_output):
    inputs = [t.detach().requires_grad_() for t in (x, skip) if t is not None]
    args = inputs if skip is not None else [*inputs, None]
    ours = upsample_add(*args, **case.options)
    assert ours.dtype == x.dtype
    rival = rival_upsample_add(*args, case)
    expected = reference.upsample(x, case.output_size, *case.rule)
    scale = largest(expected)
    if skip is not None:
        expected = expected + case.crop(skip).double()
        scale += largest(skip)
    # Weights come from coordinates in float32 (float64 for float64), which adds a few roundings.
    assert_three_way(ours, rival, expected, depth=64, scale=1 + scale)

    grads = torch.autograd.grad(ours, inputs, grad_output)
    rivals = torch.autograd.grad(rival, inputs, grad_output)
    truth = reference.upsample_grad(grad_output, case.input[2:], *case.rule)
    assert_three_way(grads[0], rivals[0], truth, depth=256, scale=1 + largest(truth))
    if skip is not None:
        padded = torch.zeros_like(skip)
        case.crop(padded)[:] = grad_output
        assert torch.equal(grads[1], padded)


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


@by_dtype
@by_case
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_agrees_with_torch_and_reference(case, dtype, layout, device):
    x, skip = case.tensors(dtype, device)
    skip = None if skip is None else layout(skip)
    compare_all(case, layout(x), skip, layout(case.grad_output(dtype, device)))


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "skip"])
@pytest.mark.parametrize("name", ["fractional_scale", "cropped_skip"])
def test_layouts(name, which, layout, dtype, device):
    case = UPSAMPLE[name]
    x, skip = case.tensors(dtype, device)
    if which == "input":
        x = LAYOUTS[layout](x)
    else:
        skip = LAYOUTS[layout](skip)
    compare_all(case, x, skip, case.grad_output(dtype, device))


@by_dtype
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_grad_output_layouts(layout, dtype, device):
    case = UPSAMPLE["fractional_scale"]
    compare_all(
        case, *case.tensors(dtype, device), GRAD_LAYOUTS[layout](case.grad_output(dtype, device))
    )


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(seed, device):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    shape = (draw(1, 3), draw(1, 5), draw(1, 9), draw(1, 9))
    case = replace(
        UPSAMPLE["twice"],
        input=shape,
        offset=(draw(0, 3), draw(0, 3)),
        skip_margin=(draw(0, 3), draw(0, 3)),
        align_corners=bool(draw(0, 1)),
    )
    if draw(0, 1):
        case = replace(case, scale=None, size=(draw(1, 20), draw(1, 20)))
    else:
        case = replace(case, scale=tuple(max(draw(1, 40) / 10, 1 / n) for n in shape[2:]))
    x, skip = case.tensors(torch.float32, device)
    compare_all(case, x, skip, case.grad_output(torch.float32, device))


@pytest.mark.parametrize("scale", [2, 4, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_zero_border_is_the_papers_deconvolution(scale, dtype, device):
    """FCN's deconvolution: window 2s, stride s, no padding, filled with the bilinear kernel."""
    x = randn((1, 2, 3, 4), dtype, device)
    centre = scale - 0.5
    profile = 1 - (torch.arange(2 * scale, dtype=torch.float64) - centre).abs() / scale
    kernel = torch.outer(profile, profile).to(dtype).to(device).expand(2, 1, -1, -1)
    expected = F.conv_transpose2d(x, kernel, stride=scale, groups=2)
    size = expected.shape[2:]
    origin = (-(scale // 2), -(scale // 2))
    out = upsample_add(x, None, scale_factor=scale, size=size, border="zero", origin=origin)
    torch.testing.assert_close(out, expected)


def test_a_window_is_a_part_of_the_whole(device):
    case = UPSAMPLE["window_inside"]
    x, _ = case.tensors(torch.float32, device)
    whole = upsample_add(x, None, scale_factor=4)
    part = upsample_add(x, None, scale_factor=4, size=(7, 9), origin=(3, 5))
    assert_bitwise_equal(part, whole[:, :, 3:10, 5:14].contiguous())


def gapped(x):
    """The same values and memory format, but pixels that do not lie side by side."""
    wide = torch.empty_like(torch.cat([x, x], 3), memory_format=torch.preserve_format)
    wide[..., ::2] = x
    return wide[..., ::2]


@by_dtype
@by_case
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_fast_and_generic_kernels_agree(case, dtype, layout, device):
    """Only dense maps go to the fast kernels."""
    x, skip = case.tensors(dtype, device)
    x = layout(x)
    skip = None if skip is None else layout(skip)
    fast = upsample_add(x, skip, **case.options)
    assert_bitwise_equal(fast, upsample_add(gapped(x), skip, **case.options))


def test_a_row_of_more_cells_than_threads(device):
    """So many images that their maps are not cut for the sake of more blocks."""
    x = channels_last(randn((256, 24, 1, 17), torch.float32, device)).requires_grad_()
    g = channels_last(randn(x.shape, torch.float32, device, seed=1))
    (grad,) = torch.autograd.grad(upsample_add(x, None, scale_factor=1), x, g)
    assert_bitwise_equal(grad, g)


def test_half_types_are_rounded_once(device):
    x = randn((1, 3, 5, 7), torch.bfloat16, device)
    skip = randn((1, 3, 10, 14), torch.bfloat16, device, seed=1)
    once = upsample_add(x.float(), skip.float(), scale_factor=2).bfloat16()
    assert_bitwise_equal(upsample_add(x, skip, scale_factor=2), once)


def test_scalar_and_pair_arguments_agree(device):
    x = randn((1, 2, 5, 7), torch.float32, device)
    a = upsample_add(x, None, scale_factor=2)
    assert_bitwise_equal(a, upsample_add(x, None, scale_factor=(2.0, 2.0)))
    a = upsample_add(x, None, size=9)
    assert_bitwise_equal(a, upsample_add(x, None, size=[9, 9]))


@pytest.mark.parametrize(
    "case",
    # The memory format of an empty tensor, or of one pixel, says nothing.
    [c for c in UPSAMPLE_CASES if c.input[0] and c.input[2:] != (1, 1) != c.output_size],
    ids=lambda c: c.name,
)
def test_memory_format_follows_the_input(case, device):
    if case.input[1] == 1:
        pytest.skip("one channel is contiguous in both formats")
    x, skip = case.tensors(torch.float32, device)
    for layout, memory_format in (
        (contiguous, torch.contiguous_format),
        (channels_last, torch.channels_last),
    ):
        leaf = layout(x).detach().requires_grad_()
        out = upsample_add(leaf, skip, **case.options)
        assert out.is_contiguous(memory_format=memory_format)
        out.backward(layout(case.grad_output(torch.float32, device)))
        assert leaf.grad.is_contiguous(memory_format=memory_format)


SECOND_ORDER = ["twice", "twice_aligned", "by_size", "cropped_skip", "full_deconvolution_window"]


@pytest.mark.parametrize("name", [*SECOND_ORDER, "shrinking_size", "single_row"])
def test_gradients_of_first_and_second_order(name, device):
    case = replace(UPSAMPLE[name], input=(1, 2, *UPSAMPLE[name].input[2:]))
    case = replace(case, input=(1, 2, *(min(n, 6) for n in case.input[2:])))
    inputs = [t.requires_grad_() for t in case.tensors(torch.float64, device) if t is not None]

    def f(x, skip=None):
        return upsample_add(x, skip, **case.options)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    # The operator is linear: squared, its second derivative is not zero.
    assert torch.autograd.gradgradcheck(lambda *t: f(*t).pow(2), inputs, fast_mode=True)


def test_gradients_of_the_backward_operator(device):
    g = randn((1, 2, 9, 7), torch.float64, device).requires_grad_()

    def f(g):
        return torch.ops.dilseg.upsample_add_backward(g, [4, 3], None, False, "clamp", [0, 0]).pow(
            2
        )

    assert torch.autograd.gradcheck(f, (g,), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (g,), fast_mode=True)


@pytest.mark.parametrize("needed", ["x", "s", "xs"])
def test_backward_computes_only_what_is_needed(needed, device):
    x, skip = UPSAMPLE["cropped_skip"].tensors(torch.float32, device)
    x.requires_grad_("x" in needed)
    skip.requires_grad_("s" in needed)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        out = upsample_add(x, skip, **UPSAMPLE["cropped_skip"].options)
    assert not saved
    out.sum().backward()
    assert (x.grad is None) == ("x" not in needed)
    assert (skip.grad is None) == ("s" not in needed)


@by_case
def test_opcheck(case, device):
    x, skip = case.tensors(torch.float32, device)
    inputs = [t if t is None else t.requires_grad_() for t in (x, skip)]
    scales = None if case.scale is None else list(case.scale)
    rule = (scales, case.align_corners, case.border)
    opcheck(
        torch.ops.dilseg.upsample_add,
        (*inputs, list(case.output_size), *rule, list(case.offset), list(case.origin)),
    )
    g = case.grad_output(torch.float32, device).requires_grad_()
    opcheck(
        torch.ops.dilseg.upsample_add_backward,
        (g, list(case.input[2:]), *rule, list(case.origin)),
        traced=case.name in SECOND_ORDER,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_layouts(layout, device):
    case = UPSAMPLE["cropped_skip"]
    x, skip = (
        LAYOUTS[layout](t).detach().requires_grad_() for t in case.tensors(torch.float32, device)
    )
    rule = ([2.0, 2.0], False, "clamp")
    opcheck(
        torch.ops.dilseg.upsample_add,
        (x, skip, [10, 14], *rule, [5, 3], [0, 0]),
        traced=layout == "channels_last",
    )
    g = LAYOUTS[layout](case.grad_output(torch.float32, device))
    opcheck(torch.ops.dilseg.upsample_add_backward, (g, [5, 7], *rule, [0, 0]), traced=False)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 2), (3, 0)])
def test_vmap(in_dims, device):
    x, skip = UPSAMPLE["cropped_skip"].tensors(torch.float64, device)
    options = UPSAMPLE["cropped_skip"].options
    stacked = [
        t if d is None else torch.stack([t, 2 * t, -t], d)
        for t, d in zip((x, skip), in_dims, strict=True)
    ]

    def f(x, skip):
        return upsample_add(x, skip, **options)

    out = torch.vmap(f, in_dims)(*stacked)
    for i in range(3):
        picked = [t if d is None else t.select(d, i) for t, d in zip(stacked, in_dims, strict=True)]
        torch.testing.assert_close(out[i], f(*picked))


def test_vmap_over_the_backward(device):
    x, _ = replace(UPSAMPLE["twice"], input=(1, 1, 3, 2)).tensors(torch.float64, device)
    ours = torch.autograd.functional.jacobian(
        lambda x: upsample_add(x, None, scale_factor=2), x, vectorize=True
    )
    rival = torch.autograd.functional.jacobian(
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), x, vectorize=True
    )
    torch.testing.assert_close(ours, rival)


@by_dtype
def test_twenty_runs_give_the_same_bits(dtype, device):
    case = UPSAMPLE["eight_times"]
    x, skip = (t.requires_grad_() for t in case.tensors(dtype, device))
    g = case.grad_output(dtype, device)

    def run():
        out = upsample_add(x, skip, **case.options)
        return (out.detach(), *torch.autograd.grad(out, (x, skip), g))

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
    g = randn((2, 21, 136, 152), torch.float32, "cpu", seed=1)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = upsample_add(x, g, scale_factor=8)
            results.append((out.detach(), torch.autograd.grad(out, x, g)[0]))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert_bitwise_equal(out, results[0][0])
        assert_bitwise_equal(grad, results[0][1])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_promotes_to_the_widest(half, device):
    x = randn((1, 2, 3, 4), half, device).requires_grad_()
    skip = randn((1, 2, 6, 8), torch.float32, device)
    with torch.autocast(torch.device(device).type, dtype=half):
        out = upsample_add(x, skip, scale_factor=2)
        assert upsample_add(x, skip.to(half), scale_factor=2).dtype == half
    assert_bitwise_equal(out.detach(), upsample_add(x.float(), skip, scale_factor=2).detach())
    out.sum().backward()
    assert x.grad.dtype == half


def test_inputs_are_left_alone(device):
    x, skip = UPSAMPLE["cropped_skip"].tensors(torch.float32, device)
    copies = x.clone(), skip.clone()
    upsample_add(x, skip, **UPSAMPLE["cropped_skip"].options)
    assert_bitwise_equal(x, copies[0])
    assert_bitwise_equal(skip, copies[1])


# Rows and columns that two blocks read are counted twice, so the maps are those whose tiles are as
# large as on a GPU; see docs/kernels/upsample_add.md.
TRAFFIC = {
    "eight_times": UpsampleCase("", input=(2, 3, 16, 32), scale=(8.0, 8.0)),
    "twice": UpsampleCase("", input=(2, 3, 32, 64), scale=(2.0, 2.0)),
    "twice_without_skip": UpsampleCase("", input=(1, 3, 32, 64), scale=(2.0, 2.0), skip=False),
    "scale_one": UpsampleCase("", input=(1, 2, 32, 128), scale=(1.0, 1.0)),
    "odd_crop": UpsampleCase(
        "", input=(1, 3, 16, 16), scale=(8.0, 8.0), offset=(3, 5), skip_margin=(1, 2)
    ),
}


by_size = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@by_size
@pytest.mark.parametrize("name", TRAFFIC)
def test_emulated_forward_reads_little_twice(name, dtype, counted):
    case = TRAFFIC[name]
    for layout, excess in ((contiguous, 1.05), (channels_last, 1.06)):
        x, skip = (None if t is None else layout(t) for t in case.tensors(dtype, "cpu"))
        with counted() as traffic:
            out = upsample_add(x, skip, **case.options)
        outputs = out.numel() * (1 if skip is None else 2)
        floor = x.element_size() * (x.numel() + outputs)
        assert floor <= traffic.total <= excess * floor


@pytest.mark.parametrize(
    ("shape", "scale", "layout", "dtype"),
    [
        ((1, 132, 32, 8), 8, contiguous, torch.float32),  # two segments
        ((1, 66, 16, 64), 2, contiguous, torch.float32),
        ((1, 66, 16, 64), 2, contiguous, torch.bfloat16),
        ((2, 3, 5, 512), 2, contiguous, torch.float32),  # two strips
        ((2, 3, 5, 1024), 2, contiguous, torch.bfloat16),
        ((1, 132, 8, 9), 3, contiguous, torch.bfloat16),  # no vectors
        ((33, 16, 8, 8), 8, channels_last, torch.bfloat16),
        ((130, 5, 8, 8), 2, channels_last, torch.float32),
    ],
    ids=lambda value: getattr(value, "__name__", str(value).removeprefix("torch.")),
)
def test_emulated_backward_reads_the_gradient_once(shape, scale, layout, dtype, counted):
    x = layout(randn(shape, dtype, "cpu")).requires_grad_()
    out = upsample_add(x, None, scale_factor=scale)
    grad_output = layout(randn(out.shape, dtype, "cpu"))
    with counted() as traffic:
        torch.autograd.grad(out, x, grad_output)
    floor = x.element_size() * (x.numel() + out.numel())
    assert floor <= traffic.total <= 1.05 * floor
