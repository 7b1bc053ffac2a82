# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import emulation, reference
from helpers.closeness import assert_bitwise_equal, assert_three_way
from helpers.layouts import GRAD_LAYOUTS, LAYOUTS, channels_last, contiguous
from helpers.opcheck import opcheck
from helpers.samples import CONV, CONV_CASES, DTYPES, ConvCase, randn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dilseg.functional import dilated_conv2d

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
    # The memory format of an empty tensor, or of one pixel, says nothing.
    [c for c in CONV_CASES if c.n and c.h_in * c.w_in > 1 and c.output_shape[2:] != (1, 1)],
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


# --- the weight gradient on tensor cores ---------------------------------------------------------


@dataclass(frozen=True)
class GemmCase:
    """A problem with the tile and the splits that shall run it."""

    name: str
    c_in: int
    c_out: int
    tile: int = 64
    splits: int = 1
    n: int = 1
    size: tuple[int, int] = (7, 9)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def output_size(self):
        pads = (sum(self.padding[:2]), sum(self.padding[2:]))
        return tuple(
            (length + p - d * (k - 1) - 1) // s + 1
            for length, p, d, k, s in zip(
                self.size, pads, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    def tensors(self, draw):
        """grad_output and input, by ``draw(shape, seed)``."""
        return (
            draw((self.n, self.c_out, *self.output_size), 1),
            draw((self.n, self.c_in, *self.size), 2),
        )


# A dtype, and how products of float32 are formed.
IEEE, BF16X3, TF32 = range(3)
GEMM_MATH = {
    "float16": (torch.float16, IEEE),
    "bfloat16": (torch.bfloat16, IEEE),
    "ieee": (torch.float32, IEEE),
    "bf16x3": (torch.float32, BF16X3),
    "tf32": (torch.float32, TF32),
}
DILATED = {"kernel": (3, 3), "padding": (2, 2, 2, 2), "dilation": (2, 2)}
GEMM_CASES = [
    GemmCase("8_channels", 8, 8),
    GemmCase("16_and_24_channels", 16, 24, **DILATED),
    GemmCase("small_tile_minus_8", 56, 64, splits=2),
    GemmCase("small_tile_plus_8", 72, 136),
    GemmCase("large_tile_minus_8", 120, 128, 128),
    GemmCase("large_tile_plus_8", 136, 72, 128, splits=2),
    GemmCase("odd_channels", 5, 21, **DILATED),
    GemmCase("odd_channels_large_tile", 131, 3, 128),
    GemmCase("groups_of_8_and_16", 16, 32, groups=2, **DILATED),
    GemmCase("groups_in_large_tiles", 16, 16, 128, groups=2),
    GemmCase(
        "dilation_larger_than_map",
        8,
        8,
        size=(3, 5),
        kernel=(3, 3),
        padding=(6, 6, 7, 7),
        dilation=(6, 7),
    ),
    GemmCase("stride_2_and_3", 8, 16, stride=(2, 3), **DILATED),
    GemmCase("unequal_padding", 8, 8, kernel=(2, 3), padding=(0, 3, 2, 1), dilation=(3, 1)),
    GemmCase("batch_3", 8, 8, n=3, splits=3, kernel=(3, 1), padding=(1, 1, 0, 0)),
    GemmCase("images_smaller_than_a_stage", 8, 8, n=41, size=(1, 2)),
    GemmCase("more_splits_than_stages", 8, 8, splits=8),
    GemmCase("many_taps", 8, 8, size=(3, 4), kernel=(9, 9), padding=(4, 4, 4, 4)),
    GemmCase("more_stages_than_in_flight", 8, 8, size=(17, 19), splits=2),
]
GEMM = {case.name: case for case in GEMM_CASES}


@pytest.fixture
def tensor_cores():
    """The weight gradient by the GEMM kernels, whatever the plan would choose."""
    if (reason := emulation.why_no_emulator()) is not None:
        pytest.skip(reason)

    def run(case, grad_output, x, precision=IEEE, channels_last_weight=False):
        return emulation.run_schedules(
            "dilated_conv2d_grad_weight_gemm",
            grad_output,
            x,
            case.kernel,
            case.stride,
            case.padding[::2],
            case.dilation,
            case.groups,
            case.tile,
            case.splits,
            precision,
            channels_last_weight,
        )

    with emulation.active():
        yield run


def gemm_truth(case, grad_output, x):
    top, bottom, left, right = case.padding
    padded = F.pad(x.double(), (left, right, top, bottom))
    return reference.conv2d_grad_weight(
        grad_output, padded, case.kernel, case.stride, (0, 0), case.dilation, case.groups
    )


def eighths(dtype):
    """Draws multiples of 1/8 whose products and sums are exact in every arithmetic."""

    def draw(shape, seed):
        g = torch.Generator().manual_seed(seed)
        return (torch.randint(-8, 9, shape, generator=g) / 8).to(dtype)

    return draw


def assert_gemm_is_exact(run, case, math, layout=contiguous, **options):
    dtype, precision = GEMM_MATH[math]
    grad_output, x = (layout(t) for t in case.tensors(eighths(dtype)))
    ours = run(case, grad_output, x, precision, **options)
    for k, r in zip(ours, gemm_truth(case, grad_output, x), strict=True):
        assert_bitwise_equal(k + 0, r.to(dtype) + 0)  # -0 + 0 = 0


@pytest.mark.parametrize("math", ["bfloat16", "ieee"])
@pytest.mark.parametrize("case", GEMM_CASES, ids=lambda c: c.name)
def test_emulated_gemm_grad_weight_is_exact(case, math, tensor_cores):
    assert_gemm_is_exact(tensor_cores, case, math)


@pytest.mark.parametrize("math", ["float16", "bf16x3", "tf32"])
@pytest.mark.parametrize("name", ["small_tile_plus_8", "large_tile_plus_8"])
def test_emulated_gemm_grad_weight_in_every_arithmetic(name, math, tensor_cores):
    assert_gemm_is_exact(tensor_cores, GEMM[name], math)


def packed_slice(x):
    """Some channels of a wider channels_last tensor, at 16-byte boundaries."""
    n, c, h, w = x.shape
    wide = channels_last(x.new_full((n, c + 16, h, w), float("nan")))
    wide[:, 8 : 8 + c] = x
    return wide[:, 8 : 8 + c]


@pytest.mark.parametrize("math", ["bfloat16", "ieee"])
@pytest.mark.parametrize("channels_last_weight", [False, True])
@pytest.mark.parametrize("layout", [*GRAD_LAYOUTS.values(), packed_slice], ids=lambda f: f.__name__)
def test_emulated_gemm_grad_weight_of_layouts(layout, channels_last_weight, math, tensor_cores):
    assert_gemm_is_exact(
        tensor_cores,
        GEMM["16_and_24_channels"],
        math,
        layout,
        channels_last_weight=channels_last_weight,
    )


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("c_in", [5, 8])
def test_emulated_gemm_grad_weight_writes_channels_last(c_in, splits, tensor_cores):
    case = replace(GEMM["odd_channels"], c_in=c_in, splits=splits)
    assert_gemm_is_exact(tensor_cores, case, "bfloat16", channels_last, channels_last_weight=True)


@contextmanager
def truncated_sums(on):
    emulation.library().emu_set_truncate(on)
    try:
        yield
    finally:
        emulation.library().emu_set_truncate(False)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    ("math", "least", "most"), [("ieee", 0, None), ("bf16x3", 1e-6, 2e-5), ("tf32", 1e-4, 5e-4)]
)
def test_emulated_gemm_grad_weight_of_long_sums(math, least, most, truncated, tensor_cores):
    """Relative rms errors over 4608 pixels in one chain; None: 1.5 times torch's in float32."""
    dtype, precision = GEMM_MATH[math]
    case = GemmCase("long_sum", 24, 24, size=(64, 72))
    grad_output, x = case.tensors(lambda shape, seed: randn(shape, dtype, "cpu", seed=seed))
    truth = gemm_truth(case, grad_output, x)[0]
    rival = torch.ops.aten.convolution_backward(
        grad_output,
        x,
        x.new_zeros(truth.shape),
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, False],
    )[1]
    with truncated_sums(truncated):
        ours = tensor_cores(case, grad_output, x, precision)[0]

    def error(t):
        return float((t.double() - truth).norm() / truth.norm())

    assert least <= error(ours) <= (most or 1.5 * error(rival))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (GEMM["8_channels"], torch.float64),
        (replace(GEMM["8_channels"], n=0), torch.float32),
        (replace(GEMM["8_channels"], groups=2), torch.bfloat16),
        (replace(GEMM["8_channels"], c_in=16, c_out=24, groups=2), torch.bfloat16),
    ],
    ids=["float64", "batch_0", "groups_cut_chunks", "groups_cut_chunks_of_the_output"],
)
def test_emulated_gemm_grad_weight_refuses(case, dtype, tensor_cores):
    with pytest.raises(RuntimeError, match="the plan refuses the problem"):
        tensor_cores(case, *case.tensors(eighths(dtype)))


def test_emulated_gemm_grad_weight_follows_torchs_switch_to_tf32(tensor_cores):
    case = GEMM["16_and_24_channels"]
    grad_output, x = case.tensors(lambda shape, seed: randn(shape, torch.float32, "cpu", seed=seed))
    truth = gemm_truth(case, grad_output, x)[0]

    def error():
        ours, _ = torch.ops.dilseg.dilated_conv2d_grad_weight(
            grad_output, x, case.kernel, case.stride, case.padding, case.dilation, 1, False
        )
        return float((ours.double() - truth).norm() / truth.norm())

    assert error() < 1e-6
    torch.backends.cudnn.allow_tf32 = True
    try:
        assert 1e-4 < error() < 5e-4
    finally:
        torch.backends.cudnn.allow_tf32 = False
