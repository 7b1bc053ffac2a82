# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.closeness import assert_bitwise_equal
from helpers.convolution import compare_all
from helpers.layouts import GRAD_LAYOUTS, LAYOUTS, channels_last, contiguous
from helpers.opcheck import opcheck
from helpers.samples import CONV, CONV_CASES, DTYPES, ConvCase, randn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dilseg.functional import dilated_conv2d

# The schedules of the kernels that run here are asked for family by family, in other modules.
pytestmark = pytest.mark.usefixtures("one_schedule")

by_case = pytest.mark.parametrize("case", CONV_CASES, ids=lambda c: c.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Small problems that, between them, have groups, strides, unequal axes and no bias.
SMALL = [
    replace(CONV[name], n=1, c_in=c_in, c_out=c_out, h_in=5, w_in=4)
    for name, c_in, c_out in [
        ("prime_sizes_dilated", 2, 3),
        ("every_axis_differs", 2, 2),
        ("groups", 3, 3),
        ("stride_leaves_a_rest", 1, 2),
        ("depthwise_multiplier", 4, 4),
    ]
]
by_small = pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)


class CountOps(TorchDispatchMode):
    """Counts the dilseg operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dilseg":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@by_dtype
@by_case
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_agrees_with_torch_and_reference(case, dtype, layout, device):
    x, w, b = case.tensors(dtype, device)
    compare_all(case, layout(x), w, b, layout(case.grad_output(dtype, device)))


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight"])
def test_layouts(which, layout, dtype, device):
    case = CONV["prime_sizes_dilated"]
    x, w, b = case.tensors(dtype, device)
    if which == "input":
        x = LAYOUTS[layout](x)
    else:
        w = LAYOUTS[layout](w)
    compare_all(case, x, w, b, case.grad_output(dtype, device))


@by_dtype
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_grad_output_layouts(layout, dtype, device):
    case = CONV["every_axis_differs"]
    x, w, b = case.tensors(dtype, device)
    compare_all(case, x, w, b, GRAD_LAYOUTS[layout](case.grad_output(dtype, device)))


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(seed, device):
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    groups = draw(1, 3)
    kernel, dilation = (draw(1, 4), draw(1, 4)), (draw(1, 5), draw(1, 5))
    padding = (draw(0, 6), draw(0, 6))
    window = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    case = ConvCase(
        name=f"seed {seed}",
        n=draw(1, 3),
        c_in=groups * draw(1, 4),
        c_out=groups * draw(1, 4),
        h_in=max(1, window[0] - 2 * padding[0]) + draw(0, 9),
        w_in=max(1, window[1] - 2 * padding[1]) + draw(0, 9),
        kernel=kernel,
        stride=(draw(1, 3), draw(1, 3)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bool(draw(0, 1)),
    )
    x, w, b = case.tensors(torch.float32, device)
    compare_all(case, x, w, b, case.grad_output(torch.float32, device))


@by_dtype
@pytest.mark.parametrize("name", ["prime_sizes_dilated", "depthwise", "groups", "batch_0"])
def test_fused_relu(name, dtype, device):
    case = CONV[name]
    x, w, b = case.tensors(dtype, device)
    compare_all(case, x, w, b, case.grad_output(dtype, device), activation="relu")


@by_dtype
def test_fused_relu_gradients_are_those_of_the_masked_gradient(dtype, device):
    case = CONV["prime_sizes_dilated"]
    inputs = [t.requires_grad_() for t in case.tensors(dtype, device)]
    g = case.grad_output(dtype, device)
    fused = dilated_conv2d(*inputs, *case.geometry, activation="relu")
    plain = dilated_conv2d(*inputs, *case.geometry)
    for a, b in zip(
        torch.autograd.grad(fused, inputs, g),
        torch.autograd.grad(plain, inputs, torch.where(fused > 0, g, 0)),
        strict=True,
    ):
        assert_bitwise_equal(a, b)


def test_fused_relu_keeps_nan(device):
    x = torch.full((1, 1, 3, 3), float("nan"), device=device)
    w = torch.ones(1, 1, 1, 1, device=device)
    assert dilated_conv2d(x, w, activation="relu").isnan().all()


@pytest.mark.parametrize(
    "case",
    # The memory format of an empty tensor, or of one pixel, says nothing; nor do long sums.
    [
        c
        for c in CONV_CASES
        if c.n and c.h_in * c.w_in > 1 and c.output_shape[2:] != (1, 1) and c.depth < 150
    ],
    ids=lambda c: c.name,
)
def test_memory_format_follows_the_input(case, device):
    x, w, b = case.tensors(torch.float32, device)
    for layout, memory_format in (
        (contiguous, torch.contiguous_format),
        (channels_last, torch.channels_last),
    ):
        inputs = [layout(x).requires_grad_(), w.clone().requires_grad_()]
        out = dilated_conv2d(*inputs, b, *case.geometry)
        assert out.is_contiguous(memory_format=memory_format)
        grads = torch.autograd.grad(out, inputs, layout(case.grad_output(torch.float32, device)))
        assert grads[0].is_contiguous(memory_format=memory_format)
        assert grads[1].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 4), (3, 2)])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_same_padding(kernel, dilation, device):
    x, w = randn((2, 3, 7, 9), torch.float64, device), randn((4, 3, *kernel), torch.float64, device)
    out = dilated_conv2d(x, w, padding="same", dilation=dilation)
    assert out.shape[2:] == x.shape[2:]
    torch.testing.assert_close(out, F.conv2d(x, w, padding="same", dilation=dilation))


def test_same_padding_is_differentiable_when_uneven(device):
    x = randn((1, 2, 5, 6), torch.float64, device).requires_grad_()
    w = randn((2, 2, 2, 4), torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: dilated_conv2d(x, w, padding="same"), (x, w))


def test_valid_padding_and_scalars_and_singletons(device):
    x, w = randn((1, 2, 9, 9), torch.float64, device), randn((3, 2, 3, 3), torch.float64, device)
    expected = F.conv2d(x, w, stride=2, dilation=2)
    torch.testing.assert_close(dilated_conv2d(x, w, None, 2, "valid", 2), expected)
    torch.testing.assert_close(dilated_conv2d(x, w, None, (2,), [0, 0], [2]), expected)


def test_unbatched_input(device):
    x, w, b = CONV["prime_sizes_dilated"].tensors(torch.float64, device)
    out = dilated_conv2d(x[0], w, b, padding=2, dilation=2)
    torch.testing.assert_close(out, F.conv2d(x[0], w, b, padding=2, dilation=2))


@by_small
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_of_first_and_second_order(case, activation, device):
    inputs = [t.requires_grad_() for t in case.tensors(torch.float64, device) if t is not None]

    def f(x, w, b=None):
        return dilated_conv2d(x, w, b, *case.geometry, activation=activation)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@by_small
def test_gradients_of_the_gradient_operators(case, device):
    x, w, _ = (t if t is None else t.requires_grad_() for t in case.tensors(torch.float64, device))
    g = case.grad_output(torch.float64, device).requires_grad_()
    stride, padding, dilation, groups = case.geometry
    pads = [padding[0], padding[0], padding[1], padding[1]]

    def grad_input(g, w):
        return torch.ops.dilseg.dilated_conv2d_grad_input(
            g, w, x.shape[2:], stride, pads, dilation, groups
        )

    def grad_weight(g, x):
        return torch.ops.dilseg.dilated_conv2d_grad_weight(
            g, x, w.shape[2:], stride, pads, dilation, groups, True
        )

    for f, inputs in ((grad_input, (g, w)), (grad_weight, (g, x))):
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_third_order_gradient(device):
    case = SMALL[0]
    x, w, b = (t.requires_grad_() for t in case.tensors(torch.float64, device))
    y = dilated_conv2d(x, w, b, *case.geometry).pow(3).sum()
    rival = F.conv2d(x, w, b, *case.geometry).pow(3).sum()
    for _ in range(3):
        y, rival = (
            sum(g.pow(2).sum() for g in torch.autograd.grad(out, (x, w), create_graph=True))
            for out in (y, rival)
        )
    torch.testing.assert_close(y, rival)


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ("x", {"dilated_conv2d_grad_input": 1}),
        ("w", {"dilated_conv2d_grad_weight": 1}),
        ("b", {}),
        ("wb", {"dilated_conv2d_grad_weight": 1}),
        ("xwb", {"dilated_conv2d_grad_input": 1, "dilated_conv2d_grad_weight": 1}),
    ],
)
def test_backward_computes_only_what_is_needed(needed, expected, device):
    case = CONV["prime_sizes_dilated"]
    tensors = dict(zip("xwb", case.tensors(torch.float64, device), strict=True))
    for name in needed:
        tensors[name].requires_grad_()
    out = dilated_conv2d(*tensors.values(), *case.geometry, activation="relu")
    with CountOps() as ops:
        out.sum().backward()
    assert ops.counts == expected
    rival = {n: t.detach().requires_grad_(n in needed) for n, t in tensors.items()}
    F.conv2d(*rival.values(), *case.geometry).relu().sum().backward()
    for name in tensors:
        assert (tensors[name].grad is None) == (name not in needed)
        if name in needed:
            torch.testing.assert_close(tensors[name].grad, rival[name].grad)


def test_backward_saves_only_what_is_needed(device):
    x, w, b = CONV["prime_sizes_dilated"].tensors(torch.float32, device)
    saved = []

    def pack(t):
        saved.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dilated_conv2d(x.requires_grad_(), w, b, padding=2, dilation=2)
    assert saved == [w.data_ptr()]


def test_output_without_gradient(device):
    """An output that does not reach the loss sends no gradient."""
    x = randn((1, 2, 5, 5), torch.float32, device).requires_grad_()
    w = randn((2, 2, 3, 3), torch.float32, device).requires_grad_()
    grad_weight, grad_bias = torch.ops.dilseg.dilated_conv2d_grad_weight(
        x.detach()[:, :, :3, :3].requires_grad_(),
        x,
        [3, 3],
        [1, 1],
        [0] * 4,
        [1, 1],
        1,
        True,
    )
    assert torch.autograd.grad(grad_bias.sum(), x, allow_unused=True) == (None,)
    assert grad_weight.requires_grad
    out = dilated_conv2d(x, w)
    assert torch.autograd.grad(out.sum() * 0 + w.sum(), w)[0].eq(1).all()


@by_case
def test_opcheck(case, device):
    x, w, b = case.tensors(torch.float32, device)
    stride, padding, dilation, groups = case.geometry
    pads = [padding[0], padding[0], padding[1], padding[1]]
    geometry = (list(stride), pads, list(dilation), groups)
    g = case.grad_output(torch.float32, device)
    ops = torch.ops.dilseg
    activation = "relu" if case.bias else None
    inputs = [t if t is None else t.requires_grad_() for t in (x, w, b)]
    opcheck(ops.dilated_conv2d, (*inputs, *geometry, activation))
    g.requires_grad_()
    traced = case.name in ("every_axis_differs", "groups")
    args = (g, w, [case.h_in, case.w_in], *geometry)
    opcheck(ops.dilated_conv2d_grad_input, args, traced=traced)
    args = (g, x, list(case.kernel), *geometry, case.bias)
    opcheck(ops.dilated_conv2d_grad_weight, args, traced=traced)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_layouts(layout, device):
    """Fake tensors must know the strides of results, whatever those of the arguments are."""
    case = CONV["every_axis_differs"]
    x, w, b = case.tensors(torch.float32, device)
    g = case.grad_output(torch.float32, device)
    x, w, g = (LAYOUTS[layout](t).detach().requires_grad_() for t in (x, w, g))
    stride, padding, dilation, groups = case.geometry
    pads = [padding[0], padding[0], padding[1], padding[1]]
    geometry = (list(stride), pads, list(dilation), groups)
    ops = torch.ops.dilseg
    opcheck(ops.dilated_conv2d, (x, w, b, *geometry, None), traced=layout == "channels_last")
    args = (g, w, [case.h_in, case.w_in], *geometry)
    opcheck(ops.dilated_conv2d_grad_input, args, traced=False)
    args = (g, x, list(case.kernel), *geometry, True)
    opcheck(ops.dilated_conv2d_grad_weight, args, traced=False)


@pytest.mark.parametrize("mapped", ["x", "w", "b", "xw", "xb", "wb", "xwb"])
@pytest.mark.parametrize("name", ["prime_sizes_dilated", "groups", "depthwise"])
def test_vmap(name, mapped, device):
    case = CONV[name]
    tensors = dict(zip("xwb", case.tensors(torch.float64, device), strict=True))
    in_dims = tuple({"x": 1, "w": 2, "b": 0}[n] if n in mapped else None for n in "xwb")
    for n, dim in zip("xwb", in_dims, strict=True):
        if dim is not None:
            tensors[n] = torch.stack([tensors[n] * (i + 1) for i in range(3)], dim)

    def f(x, w, b):
        return dilated_conv2d(x, w, b, *case.geometry, activation="relu")

    out = torch.vmap(f, in_dims=in_dims)(*tensors.values())
    for i in range(3):
        picked = [
            t if d is None else t.select(d, i)
            for t, d in zip(tensors.values(), in_dims, strict=True)
        ]
        torch.testing.assert_close(out[i], f(*picked))


@pytest.mark.parametrize("name", ["prime_sizes_dilated", "groups"])
def test_vmap_under_autograd(name, device):
    """Weights per sample, and a gradient for each."""
    case = CONV[name]
    x, w, b = case.tensors(torch.float64, device)
    weights = torch.stack([w, 2 * w]).requires_grad_()

    def f(x, w):
        return dilated_conv2d(x.unsqueeze(0), w, b, *case.geometry).pow(2).sum()

    ours = torch.autograd.grad(torch.vmap(f)(x, weights).sum(), weights)[0]
    expected = torch.autograd.grad(sum(map(f, x, weights)), weights)[0]
    torch.testing.assert_close(ours, expected)


def test_vmap_over_the_backward(device):
    """Jacobians: many output gradients at once, for one forward pass."""
    case = SMALL[2]
    x, w, b = case.tensors(torch.float64, device)

    def ours(x, w):
        return dilated_conv2d(x, w, b, *case.geometry, activation="relu")

    def rival(x, w):
        return F.conv2d(x, w, b, *case.geometry).relu()

    for j, r in zip(
        torch.autograd.functional.jacobian(ours, (x, w), vectorize=True),
        torch.autograd.functional.jacobian(rival, (x, w), vectorize=True),
        strict=True,
    ):
        torch.testing.assert_close(j, r)


@pytest.mark.parametrize("mapped", ["g", "w", "gw"])
def test_vmap_of_grad_input(mapped, device):
    case = CONV["groups"]
    _, w, _ = case.tensors(torch.float64, device)
    g = case.grad_output(torch.float64, device)
    stride, padding, dilation, groups = case.geometry
    pads = [padding[0], padding[0], padding[1], padding[1]]
    in_dims = tuple(0 if name in mapped else None for name in "gw")
    stacked = [
        t if d is None else torch.stack([t, 2 * t, 3 * t])
        for t, d in zip((g, w), in_dims, strict=True)
    ]

    def f(g, w):
        return torch.ops.dilseg.dilated_conv2d_grad_input(
            g, w, [case.h_in, case.w_in], stride, pads, dilation, groups
        )

    out = torch.vmap(f, in_dims)(*stacked)
    power = len(mapped)
    for i in range(3):
        torch.testing.assert_close(out[i], (i + 1) ** power * f(g, w))


@by_dtype
@pytest.mark.parametrize("name", ["prime_sizes_dilated", "depthwise", "long_sum"])
def test_twenty_runs_give_the_same_bits(name, dtype, device):
    case = CONV[name]
    inputs = [t.requires_grad_() for t in case.tensors(dtype, device)]
    g = case.grad_output(dtype, device)

    def run():
        out = dilated_conv2d(*inputs, *case.geometry)
        return (out.detach(), *torch.autograd.grad(out, inputs, g))

    first = run()
    for i in range(19):
        torch.use_deterministic_algorithms(i % 2 == 0)
        try:
            again = run()
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b in zip(first, again, strict=True):
            assert_bitwise_equal(a, b)


def test_inputs_are_left_alone(device):
    case = CONV["prime_sizes_dilated"]
    inputs = [t.requires_grad_() for t in case.tensors(torch.float32, device)]
    copies = [t.detach().clone() for t in inputs]
    g = case.grad_output(torch.float32, device)
    g_copy = g.clone()
    dilated_conv2d(*inputs, *case.geometry, activation="relu").backward(g)
    for t, copy in zip([*inputs, g], [*copies, g_copy], strict=True):
        assert_bitwise_equal(t.detach(), copy)


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_runs_in_the_lower_precision(lower, device):
    case = CONV["prime_sizes_dilated"]
    x, w, b = (t.requires_grad_() for t in case.tensors(torch.float32, device))
    with torch.autocast(torch.device(device).type, dtype=lower):
        out = dilated_conv2d(x, w, b, *case.geometry, activation="relu")
    assert out.dtype == lower
    expected = dilated_conv2d(*(t.to(lower) for t in (x, w, b)), *case.geometry, activation="relu")
    assert_bitwise_equal(out.detach(), expected.detach())
    out.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(device):
    x, w, b = CONV["prime_sizes_dilated"].tensors(torch.float64, device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        assert dilated_conv2d(x, w, b).dtype == torch.float64
