# SPDX-License-Identifier: Apache-2.0
"""torch.compile, torch.export, fake tensors. The aot_eager backend traces without compiling."""

import copy

import pytest
import torch
from helpers.closeness import assert_bitwise_equal
from helpers.samples import CONV, LOSS, UPSAMPLE, randn
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dilseg
from dilseg.functional import (
    cross_entropy,
    dilated_conv2d,
    upsample_add,
    upsample_argmax,
    upsample_cross_entropy,
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(f, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(f, fullgraph=True, backend=counter, **options), counter


def check(f, problems, device):
    """Compares ``f``, compiled once for all sizes, with eager ``f``: output and gradients."""
    fast, counter = compiled(f, dynamic=True)
    for inputs in problems:
        results = []
        for function in (f, fast):
            leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
            out = function(*leaves)
            grads = torch.autograd.grad(
                out.float().square().sum(), [t for t in leaves if t.is_floating_point()]
            )
            results.append((out.detach(), *grads))
        for a, b in zip(*results, strict=True):
            assert_bitwise_equal(a, b)
            assert a.stride() == b.stride()
    assert counter.frame_count == 1


def test_dilated_conv2d_with_dynamic_sizes(device):
    def f(x, w, b):
        return dilated_conv2d(x, w, b, padding="same", dilation=2, activation="relu")

    w, b = randn((4, 3, 3, 3), torch.float32, device), randn((4,), torch.float32, device)
    sizes = [(2, 3, 9, 11), (3, 3, 12, 10), (5, 3, 7, 19)]
    check(f, [(randn(s, torch.float32, device), w, b) for s in sizes], device)


def test_strided_padding_with_dynamic_sizes(device):
    def f(x, w):
        return dilated_conv2d(x, w, stride=(2, 3), padding=(1, 4), dilation=(1, 3))

    w = randn((4, 3, 3, 3), torch.float32, device)
    sizes = [(2, 3, 9, 11), (3, 3, 12, 10)]
    check(f, [(randn(s, torch.float32, device), w) for s in sizes], device)


@pytest.mark.parametrize("options", [{}, {"border": "zero"}, {"align_corners": True}])
def test_upsample_add_with_dynamic_sizes(options, device):
    def f(x, skip):
        return upsample_add(x, skip, scale_factor=2, offset=(1, 2), **options)

    problems = [
        (
            randn((n, 3, h, w), torch.float32, device),
            randn((n, 3, 2 * h + 3, 2 * w + 4), torch.float32, device),
        )
        for n, h, w in [(2, 5, 7), (3, 8, 6)]
    ]
    check(f, problems, device)


def test_upsample_add_to_the_size_of_the_skip(device):
    def f(x, skip):
        return upsample_add(x, skip, size=skip.shape[-2:])

    problems = [
        (
            randn((2, 3, h, w), torch.float32, device),
            randn((2, 3, 19, w + 9), torch.float32, device),
        )
        for h, w in [(5, 7), (8, 6)]
    ]
    check(f, problems, device)


def test_fractional_scale_with_dynamic_sizes(device):
    def f(x):
        return upsample_add(x, None, scale_factor=(1.5, 2.5))

    check(f, [(randn((2, 3, h, h + 1), torch.float32, device),) for h in (5, 8)], device)


def test_scale_as_an_argument(device):
    def f(x, scale):
        return upsample_add(x, None, scale_factor=scale)

    fast, _ = compiled(f, dynamic=True)
    x = randn((1, 2, 5, 6), torch.float32, device)
    for scale in (2.5, 3.0):
        assert_bitwise_equal(fast(x, scale), f(x, scale))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_with_dynamic_sizes(reduction, device):
    def f(x, target):
        return cross_entropy(x, target, ignore_index=255, reduction=reduction, label_smoothing=0.1)

    problems = []
    for n, h, w in [(2, 5, 7), (3, 8, 6)]:
        target = torch.randint(4, (n, h, w), device=device, dtype=torch.uint8)
        target[:, 0] = 255
        problems.append((randn((n, 4, h, w), torch.float32, device), target))
    check(f, problems, device)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("scale", [None, 3])
def test_upsample_cross_entropy_with_dynamic_sizes(reduction, scale, device):
    def f(x, target):
        return upsample_cross_entropy(
            x,
            target,
            scale_factor=scale,
            ignore_index=255,
            reduction=reduction,
            label_smoothing=0.1,
        )

    problems = []
    for n, h, w in [(2, 5, 7), (3, 8, 6)]:
        target = torch.randint(4, (n, 3 * h, 3 * w), device=device, dtype=torch.uint8)
        target[:, 0] = 255
        problems.append((randn((n, 4, h, w), torch.float32, device), target))
    check(f, problems, device)


def test_upsample_argmax_with_dynamic_sizes(device):
    def f(x):
        return upsample_argmax(x, scale_factor=2, dtype=torch.uint8, confidence=True)

    fast, _ = compiled(f, dynamic=True)
    for n, h, w in [(2, 5, 7), (3, 8, 6)]:
        x = randn((n, 4, h, w), torch.float32, device)
        for a, b in zip(fast(x), f(x), strict=True):
            assert_bitwise_equal(a, b)


class Net(nn.Module):
    """Every module, in both memory formats between them."""

    def __init__(self):
        super().__init__()
        self.conv1 = dilseg.DilatedConv2d(3, 8, 3, padding=2, dilation=2, activation="relu")
        self.pool = nn.MaxPool2d(2)
        self.conv2 = dilseg.DilatedConv2d(8, 8, 3, padding="same", dilation=3, groups=2)
        self.up = dilseg.UpsampleAdd(2)
        self.loss = dilseg.CrossEntropyLoss(ignore_index=255)

    def forward(self, x, target):
        skip = self.conv1(x)
        return self.loss(self.up(self.conv2(self.pool(skip)), skip), target)


def step(model, net, x, target):
    net.zero_grad()
    loss = model(x, target)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_network_in_one_graph(memory_format, device):
    net = Net().to(device)
    fast, counter = compiled(net, dynamic=True)
    graphs = []
    for size in ((8, 10), (12, 6)):
        x = randn((2, 3, *size), torch.float32, device).contiguous(memory_format=memory_format)
        target = torch.randint(8, (2, *size), device=device)
        torch.testing.assert_close(step(fast, net, x, target), step(net, net, x, target))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1], "another size compiled the network again"


def test_network_under_autocast(device):
    net = Net().to(device)
    kind = torch.device(device).type

    def f(x, target):
        with torch.autocast(kind, dtype=torch.bfloat16):
            return net(x, target)

    fast, _ = compiled(f)
    x = randn((2, 3, 8, 10), torch.float32, device)
    target = torch.randint(8, (2, 8, 10), device=device)
    torch.testing.assert_close(step(fast, net, x, target), step(f, net, x, target))


def test_swapped_model(device):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, dilation=2), nn.ReLU()).to(device)
    dilseg.swap_conv2d(net)
    fast, _ = compiled(net)
    x = randn((2, 3, 8, 10), torch.float32, device)
    torch.testing.assert_close(fast(x), net(x))


@pytest.mark.slow
def test_network_with_inductor(device):
    """The default backend, which generates and compiles code around the operators."""
    net = Net().to(device)
    fast = torch.compile(net, fullgraph=True, dynamic=True)
    for size in ((8, 10), (12, 6)):
        x = randn((2, 3, *size), torch.float32, device)
        target = torch.randint(8, (2, *size), device=device)
        torch.testing.assert_close(
            step(fast, net, x, target), step(net, net, x, target), rtol=1e-4, atol=1e-5
        )


def test_export_with_dynamic_sizes():
    net = Net()
    batch, half_h, half_w = (torch.export.Dim(n, min=2, max=64) for n in ("b", "h", "w"))
    sizes = {0: batch, 2: 2 * half_h, 3: 2 * half_w}
    program = torch.export.export(
        net,
        (torch.randn(2, 3, 8, 10), torch.randint(8, (2, 8, 10))),
        dynamic_shapes=(sizes, {0: batch, 1: 2 * half_h, 2: 2 * half_w}),
    )
    x, target = torch.randn(3, 3, 12, 6), torch.randint(8, (3, 12, 6))
    torch.testing.assert_close(program.module()(x, target), net(x, target))


def test_double_backward_can_be_traced(device):
    x = randn((1, 2, 6, 6), torch.float64, device).requires_grad_()
    w = randn((2, 2, 3, 3), torch.float64, device).requires_grad_()

    def f(x, w):
        y = dilated_conv2d(x, w, padding=2, dilation=2, activation="relu").square().sum()
        grads = torch.autograd.grad(y, (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w))

    graph = make_fx(f, tracing_mode="symbolic")(x, w)
    torch.testing.assert_close(graph(x, w), f(x, w))


@pytest.mark.parametrize("case", list(CONV.values())[:8], ids=lambda c: c.name)
def test_fake_convolution(case):
    with FakeTensorMode():
        x, w, b = case.tensors(torch.bfloat16, "cpu")
        x = x.to(memory_format=torch.channels_last)
        out = dilated_conv2d(x, w, b, *case.geometry)
    assert out.shape == case.output_shape
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_fake_tensors_of_a_gpu_that_is_not_there():
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 8, device="cuda")
        w = torch.empty(4, 3, 3, 3, device="cuda")
        up = upsample_add(dilated_conv2d(x, w), None, scale_factor=8)
        target = torch.empty(2, 48, 48, device="cuda", dtype=torch.uint8)
        loss = cross_entropy(up, target)
    # Without gradients: torch's own autograd asks a GPU that is not there for its stream.
    assert up.device == loss.device == x.device


def test_meta_tensors():
    x, skip = (t.to("meta") for t in UPSAMPLE["cropped_skip"].tensors(torch.float32, "cpu"))
    assert upsample_add(x, skip, **UPSAMPLE["cropped_skip"].options).shape == (2, 3, 10, 14)
    x, target, weight = (t.to("meta") for t in LOSS["weighted_none"].tensors(torch.half, "cpu"))
    loss = cross_entropy(x, target, weight, reduction="none")
    assert (loss.shape, loss.dtype) == (target.shape, torch.float32)
    fine = torch.empty(2, 14, 6, dtype=torch.int64, device="meta")
    loss = upsample_cross_entropy(x, fine, weight, reduction="none")
    assert (loss.shape, loss.dtype) == (fine.shape, torch.float32)
    label, confidence = upsample_argmax(x, scale_factor=2, dtype=torch.uint8, confidence=True)
    assert label.shape == confidence.shape == fine.shape
    assert (label.dtype, confidence.dtype) == (torch.uint8, torch.float32)


class Pyramid(nn.Module):
    """Modules, functions, a padding mode and the loss: every way into the package."""

    def __init__(self):
        super().__init__()
        self.body = dilseg.DilatedConv2d(3, 4, 3, padding=2, dilation=2, activation="relu")
        self.tail = dilseg.DilatedConv2d(
            4, 4, 3, padding="same", dilation=2, padding_mode="reflect"
        )
        self.up = dilseg.UpsampleAdd(2)
        self.loss = dilseg.CrossEntropyLoss(ignore_index=255)
        self.upsampled_loss = dilseg.UpsampleCrossEntropyLoss(ignore_index=255)

    def forward(self, x, target):
        return (
            self.loss(self.up(self.tail(self.body(x))), target)
            + self.upsampled_loss(x, target)
            + upsample_add(x, None, scale_factor=2).mean()
        )


def test_symbolic_trace_records_each_function_as_one_node(device):
    model = Pyramid().to(device)
    graph = torch.fx.symbolic_trace(model)
    x = randn((1, 3, 6, 7), torch.float32, device)
    target = torch.zeros((1, 12, 14), dtype=torch.int64, device=device)

    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count(dilated_conv2d) == 2
    assert targets.count(upsample_add) == 2
    assert targets.count(cross_entropy) == 1
    assert targets.count(upsample_cross_entropy) == 1
    assert_bitwise_equal(graph(x, target), model(x, target))
    assert_bitwise_equal(copy.deepcopy(graph)(x, target), model(x, target))
