# SPDX-License-Identifier: Apache-2.0
"""What the operators' nodes owe to torch: transforms, compiled autograd, hooks, what they keep.

That the gradients are right is asked of each operator in its own file.
"""

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.closeness import assert_bitwise_equal
from helpers.samples import randn
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dilseg
from dilseg.functional import (
    cross_entropy,
    dilated_conv2d,
    upsample_add,
    upsample_argmax,
    upsample_cross_entropy,
)

LABELS = torch.tensor([[[0, 2, 1, 0], [255, 1, 2, 2], [0, 0, 255, 1]]])
FINE = LABELS.repeat_interleave(2, 1).repeat_interleave(2, 2)
WEIGHT = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


@dataclass(frozen=True)
class Problem:
    """A function of differentiable tensors, in our operators and in torch's."""

    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def tensors(self, device, *, requires_grad=False) -> list[Tensor]:
        return [
            randn(shape, torch.float64, device, seed=i).requires_grad_(requires_grad)
            for i, shape in enumerate(self.shapes)
        ]


def _upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


PROBLEMS = {
    "dilated_conv2d": Problem(
        lambda x, w, b: dilated_conv2d(x, w, b, (1, 2), 2, 2, 2, activation="relu"),
        lambda x, w, b: F.conv2d(x, w, b, (1, 2), 2, 2, 2).relu(),
        ((2, 4, 5, 6), (6, 2, 3, 3), (6,)),
    ),
    "upsample_add": Problem(
        lambda x, skip: upsample_add(x, skip, scale_factor=2, offset=(1, 0)),
        lambda x, skip: _upsampled(x) + skip[:, :, 1:],
        ((1, 3, 3, 4), (1, 3, 7, 8)),
    ),
    "cross_entropy": Problem(
        lambda x: cross_entropy(
            x, LABELS.to(x.device), WEIGHT.to(x.device), ignore_index=255, label_smoothing=0.1
        ),
        lambda x: F.cross_entropy(
            x, LABELS.to(x.device), WEIGHT.to(x.device), ignore_index=255, label_smoothing=0.1
        ),
        ((1, 3, 3, 4),),
    ),
    "upsample_cross_entropy": Problem(
        lambda x: upsample_cross_entropy(x, FINE.to(x.device), ignore_index=255),
        lambda x: F.cross_entropy(_upsampled(x), FINE.to(x.device), ignore_index=255),
        ((1, 3, 3, 4),),
    ),
}
by_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def scalar(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function whose derivatives of every order depend on those of ``f``."""
    return lambda *tensors: f(*tensors).pow(3).sum()


def every(problem: Problem) -> tuple[int, ...]:
    return tuple(range(len(problem.shapes)))


# --------------------------------------------------------------------------------------------------
# torch.func
# --------------------------------------------------------------------------------------------------


@by_problem
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, every: torch.func.grad(scalar(f), every),
        lambda f, every: lambda *tensors: torch.func.vjp(f, *tensors)[1](f(*tensors).detach()),
        lambda f, every: torch.func.jacrev(f, every),
        lambda f, every: torch.func.jacrev(torch.func.jacrev(scalar(f))),
        lambda f, every: torch.func.grad(
            lambda *tensors: torch.func.grad(scalar(f))(*tensors).pow(2).sum(), every
        ),
    ],
    ids=["grad", "vjp", "jacrev", "hessian", "grad_of_grad"],
)
def test_transforms(transform, problem, device):
    tensors = problem.tensors(device)
    torch.testing.assert_close(
        transform(problem.ours, every(problem))(*tensors),
        transform(problem.torchs, every(problem))(*tensors),
    )


def test_gradients_per_sample(device):
    """vmap over grad: the usual reason for torch.func in training."""
    x, w, b = PROBLEMS["dilated_conv2d"].tensors(device)
    target = torch.randint(6, (2, 5, 3), device=device)

    def loss(w, b, x, target, conv, cross_entropy):
        y = conv(x.unsqueeze(0), w, b)
        return cross_entropy(y, target.unsqueeze(0))

    def gradients(conv, cross_entropy):
        grad = torch.func.grad(lambda *a: loss(*a, conv, cross_entropy), (0, 1))
        return torch.func.vmap(grad, (None, None, 0, 0))(w, b, x, target)

    torch.testing.assert_close(
        gradients(PROBLEMS["dilated_conv2d"].ours, cross_entropy),
        gradients(PROBLEMS["dilated_conv2d"].torchs, F.cross_entropy),
    )


def test_functional_call_of_a_module(device):
    ours = dilseg.DilatedConv2d(3, 4, 3, padding=2, dilation=2).to(device)
    rival = nn.Conv2d(3, 4, 3, padding=2, dilation=2).to(device)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    x = randn((2, 3, 6, 5), torch.float32, device)

    def gradients(module):
        def loss(parameters):
            return torch.func.functional_call(module, parameters, (x,)).square().mean()

        return torch.func.grad(loss)(parameters)

    torch.testing.assert_close(gradients(ours), gradients(rival))


_ZEROS = torch.zeros(1, 1, 3, 3)
_RULE = ([2.0, 2.0], False, "clamp")


@pytest.mark.parametrize(
    ("name", "argument", "call"),
    [
        (
            "dilated_conv2d",
            "bias",
            lambda op, t: op(_ZEROS, _ZEROS, t[0, 0, 0, :1], 1, 0, 1, 1, None),
        ),
        (
            "dilated_conv2d_grad_input",
            "grad_output",
            lambda op, t: op(t, _ZEROS, [3, 3], 1, [1] * 4, 1, 1),
        ),
        (
            "dilated_conv2d_grad_weight",
            "input",
            lambda op, t: op(_ZEROS, t, [3, 3], 1, [1] * 4, 1, 1, False),
        ),
        (
            "upsample_add_backward",
            "grad_output",
            lambda op, t: op(t, [2, 2], *_RULE, [0, 0]),
        ),
        (
            "cross_entropy_backward",
            "input",
            lambda op, t: op(
                _ZEROS[0, 0, 0, 0],
                t,
                t[0].detach().long(),
                None,
                _ZEROS[0],
                _ZEROS[0, 0, 0, 0],
                "sum",
                0,
                0.0,
            ),
        ),
        (
            "upsample_argmax",
            "input",
            lambda op, t: op(t, [6, 6], *_RULE, [0, 0], torch.int64, False),
        ),
    ],
)
def test_operators_refuse_tangents(name, argument, call):
    """Of the public functions, tests/test_errors.py asks the same."""
    pattern = rf"^dilseg::{name}: expected {argument} without a forward-mode tangent"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(_ZEROS, _ZEROS)
        with pytest.raises(NotImplementedError, match=pattern):
            call(getattr(torch.ops.dilseg, name), dual)


# --------------------------------------------------------------------------------------------------
# Compiled autograd
# --------------------------------------------------------------------------------------------------


@by_problem
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_autograd(dynamic, problem, device):
    """The backward pass of an eager forward pass, traced into one graph and run."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compiler(graph):
        return torch.compile(graph, backend=backend, fullgraph=True, dynamic=dynamic)

    def gradients():
        tensors = problem.tensors(device, requires_grad=True)
        scalar(problem.ours)(*tensors).backward()
        return [t.grad for t in tensors]

    expected = gradients()
    with compiled_autograd._enable(compiler, dynamic=dynamic):
        for _ in range(2):
            for ours, eager in zip(gradients(), expected, strict=True):
                assert_bitwise_equal(ours, eager)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_compiled_autograd_of_other_sizes(device):
    """Sizes are inputs of the graph, what is no size is part of it."""
    torch._dynamo.reset()
    w = randn((4, 3, 3, 3), torch.float64, device, seed=1).requires_grad_()

    def gradients(size, dilation):
        x = randn((2, 3, *size), torch.float64, device).requires_grad_()
        out = dilated_conv2d(x, w, padding=dilation, dilation=dilation)
        out = upsample_add(out, None, scale_factor=2)
        return torch.autograd.grad(out.pow(2).sum(), (x, w))

    calls = [((5, 6), 2), ((7, 4), 2), ((9, 8), 2), ((9, 8), 1)]
    expected = [gradients(*call) for call in calls]
    with compiled_autograd._enable(
        lambda graph: torch.compile(graph, backend="eager", fullgraph=True, dynamic=True)
    ):
        for call, eager in zip(calls, expected, strict=True):
            for a, b in zip(gradients(*call), eager, strict=True):
                assert_bitwise_equal(a, b)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------
# What a node keeps
# --------------------------------------------------------------------------------------------------


@by_problem
def test_saved_tensor_hooks(problem, device):
    """As torch.autograd.graph.save_on_cpu: what is unpacked is another tensor."""
    packed = []

    def pack(tensor):
        packed.append(tensor.clone())
        return len(packed) - 1

    def gradients():
        tensors = problem.tensors(device, requires_grad=True)
        first = torch.autograd.grad(scalar(problem.ours)(*tensors), tensors, create_graph=True)
        return first, torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        torch.testing.assert_close(gradients(), expected)
    assert packed


@by_problem
def test_checkpoint(problem, device):
    def gradients(call):
        tensors = problem.tensors(device, requires_grad=True)
        return torch.autograd.grad(call(scalar(problem.ours), *tensors), tensors)

    for ours, expected in zip(
        gradients(lambda f, *tensors: checkpoint(f, *tensors, use_reentrant=False)),
        gradients(lambda f, *tensors: f(*tensors)),
        strict=True,
    ):
        assert_bitwise_equal(ours, expected)


@pytest.mark.parametrize(
    ("changed", "needed"), [("x", "w"), ("w", "x"), ("y", "x"), ("y", "b"), ("x", ""), ("b", "xw")]
)
def test_tensors_changed_in_place(changed, needed, device):
    """An error where the gradient would be wrong, and only there."""
    named = dict(zip("xwb", PROBLEMS["dilated_conv2d"].tensors(device), strict=True))
    for name in needed or "b":
        named[name].requires_grad_()
    named["y"] = dilated_conv2d(*named.values(), (1, 2), 2, 2, 2, activation="relu")
    loss = named["y"].sum()
    with torch.no_grad():
        named[changed].mul_(2)
    if needed and changed != "b":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()


@by_problem
def test_backward_twice(problem, device):
    tensors = problem.tensors(device, requires_grad=True)
    loss = problem.ours(*tensors).sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, tensors), strict=True):
        assert_bitwise_equal(a, b)
    if problem is not PROBLEMS["upsample_add"]:  # which keeps no tensor
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@by_problem
def test_a_dropped_graph_is_freed_at_once(problem, device):
    gc.disable()
    try:
        tensors = problem.tensors(device, requires_grad=True)
        output = problem.ours(*tensors)
        alive = [weakref.ref(output), *map(weakref.ref, tensors)]
        del output, tensors
        assert [reference() for reference in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_gradients_that_nobody_asked_for_are_not_computed(device):
    """Asked of one tensor, though others require a gradient too."""
    x, w, b = PROBLEMS["dilated_conv2d"].tensors(device, requires_grad=True)
    loss = PROBLEMS["dilated_conv2d"].ours(x, w, b).sum()
    for tensor, expected in ((x, "grad_input"), (w, "grad_weight"), (b, None)):
        with torch.profiler.profile() as profile:
            torch.autograd.grad(loss, tensor, retain_graph=True)
        names = {e.key for e in profile.key_averages() if e.key.startswith("dilseg::")}
        assert names == ({f"dilseg::dilated_conv2d_{expected}"} if expected else set())


def test_labels_carry_no_gradient(device):
    x = randn((1, 3, 2, 2), torch.float32, device).requires_grad_()
    labels, confidence = upsample_argmax(x, scale_factor=2, confidence=True)
    assert not labels.requires_grad
    assert not confidence.requires_grad


@by_problem
def test_nodes_have_names(problem, device):
    (name,) = (n for n, p in PROBLEMS.items() if p is problem)
    node = problem.ours(*problem.tensors(device, requires_grad=True)).grad_fn
    assert node.name() == "".join(map(str.capitalize, name.split("_"))) + "Backward"


# --------------------------------------------------------------------------------------------------
# Host cost
# --------------------------------------------------------------------------------------------------


def python_calls(f: Callable[[], object]) -> int:
    """Python functions that are entered while ``f`` runs, its own included."""
    entered = 0

    def count(frame, event, arg):
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        f()
    finally:
        sys.setprofile(None)
    return entered


def test_backward_enters_no_python():
    """Counted against torch's operators, whose calls cost the interpreter nothing either."""
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    label = torch.zeros(1, 10, 10, dtype=torch.int64)
    ours, rival = dilseg.DilatedConv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
    loss = cross_entropy(upsample_add(ours(x), None, size=(10, 10)), label)
    expected = F.cross_entropy(F.interpolate(rival(x), (10, 10), mode="bilinear"), label)
    assert python_calls(loss.backward) == python_calls(expected.backward)


def test_forward_enters_little_python():
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    ours, rival = dilseg.DilatedConv2d(2, 3, 3, padding=2, dilation=2), nn.Conv2d(2, 3, 3)
    assert python_calls(lambda: ours(x)) - python_calls(lambda: rival(x)) <= 16
