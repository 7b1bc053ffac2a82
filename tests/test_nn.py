# SPDX-License-Identifier: Apache-2.0
import copy
import io
import pickle

import pytest
import torch
from helpers.samples import randn
from torch import nn
from torch.nn import functional as F

import dilseg


def twins(*args, **kwargs):
    """A dilseg convolution and torch's, with the same parameters."""
    ours = dilseg.DilatedConv2d(*args, **kwargs)
    rival = nn.Conv2d(*args, **kwargs)
    rival.load_state_dict(ours.state_dict())
    return ours, rival


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, (2, 1), "same", "valid"])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
def test_every_padding_mode_is_torchs(padding_mode, padding, kernel, device):
    ours, rival = twins(
        4, 6, kernel, padding=padding, dilation=(2, 1), groups=2, padding_mode=padding_mode
    )
    ours, rival = ours.to(device), rival.to(device)
    x = randn((2, 4, 9, 8), torch.float32, device).requires_grad_()
    y, expected = ours(x), rival(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), [x, *ours.parameters()]),
        torch.autograd.grad(expected.sum(), [x, *rival.parameters()]),
    )


def test_unbatched_input(device):
    ours, rival = (m.to(device) for m in twins(4, 6, 3, dilation=2, padding_mode="circular"))
    x = randn((4, 9, 8), torch.float32, device)
    torch.testing.assert_close(ours(x), rival(x))


def test_construction_is_torchs():
    torch.manual_seed(3)
    ours = dilseg.DilatedConv2d(4, 6, (3, 2), 2, 1, 3, 2, False, "reflect", "cpu", torch.float64)
    torch.manual_seed(3)
    rival = nn.Conv2d(4, 6, (3, 2), 2, 1, 3, 2, False, "reflect", "cpu", torch.float64)
    assert isinstance(ours, nn.Conv2d)
    assert ours.state_dict().keys() == rival.state_dict().keys()
    assert torch.equal(ours.weight, rival.weight)
    assert ours.extra_repr() == rival.extra_repr()


def test_stride_with_same_padding_is_refused_when_constructed():
    with pytest.raises(ValueError, match="padding='same' is not supported for strided"):
        dilseg.DilatedConv2d(4, 6, 3, stride=2, padding="same")


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_fused_relu(padding_mode, device):
    conv = dilseg.DilatedConv2d(
        4, 6, 3, padding=2, dilation=2, padding_mode=padding_mode, activation="relu"
    ).to(device)
    x = randn((2, 4, 9, 8), torch.float32, device)
    rival = nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode=padding_mode).to(device)
    rival.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv(x), rival(x).relu())
    assert "activation='relu'" in repr(conv)
    assert "activation" not in repr(dilseg.DilatedConv2d(4, 6, 3))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"dilseg\.DilatedConv2d: expected activation .* 'gelu'"):
        dilseg.DilatedConv2d(4, 6, 3, activation="gelu")


def modules():
    return {
        "conv": dilseg.DilatedConv2d(2, 3, 3, dilation=2, activation="relu"),
        "upsample": dilseg.UpsampleAdd((2, 3), border="zero"),
        "loss": dilseg.CrossEntropyLoss(torch.tensor([1.0, 2.0]), 255, "sum", 0.1),
    }


def inputs(name):
    x = randn((1, 2, 8, 7), torch.float32, "cpu")
    other = {"upsample": randn((1, 2, 16, 21), torch.float32, "cpu")}
    other["loss"] = (x[:, 0] > 0).long()
    return (x, other[name]) if name in other else (x,)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", ["conv", "upsample", "loss"])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_compute_the_same(name, copied):
    module = modules()[name]
    again = copied(module)
    assert repr(again) == repr(module)
    assert again.state_dict().keys() == module.state_dict().keys()
    assert torch.equal(again(*inputs(name)), module(*inputs(name)))


@pytest.mark.parametrize("name", ["conv", "upsample", "loss"])
def test_export(name):
    program = torch.export.export(modules()[name], inputs(name))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert any(t.startswith("dilseg.") for t in targets)
    torch.testing.assert_close(program.module()(*inputs(name)), modules_like(program, name))


def modules_like(program, name):
    """The result of an eager module with the parameters of an exported one."""
    module = modules()[name]
    module.load_state_dict(program.state_dict)
    return module(*inputs(name))


def test_parameters_of_the_convolution_train(device):
    conv = dilseg.DilatedConv2d(2, 3, 3, padding=4, dilation=4).to(device)
    optimiser = torch.optim.SGD(conv.parameters(), lr=0.05)
    x = randn((2, 2, 9, 9), torch.float32, device)
    losses = []
    for _ in range(5):
        loss = (conv(x) - 1).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("align_corners", [False, True])
def test_upsample_add(align_corners, device):
    coarse = randn((2, 3, 5, 7), torch.float32, device)
    skip = randn((2, 3, 10, 14), torch.float32, device, seed=1)
    up = dilseg.UpsampleAdd(2, align_corners=align_corners)
    rival = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(up(coarse, skip), rival + skip)
    torch.testing.assert_close(up(coarse), rival)
    assert repr(up) == (
        f"UpsampleAdd(scale_factor=2, align_corners={align_corners}, border='clamp')"
    )


def test_upsample_add_takes_a_larger_skip(device):
    coarse = randn((1, 2, 3, 4), torch.float32, device)
    skip = randn((1, 2, 7, 9), torch.float32, device)
    out = dilseg.UpsampleAdd(2)(coarse, skip)
    rival = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(out, rival + skip[:, :, :6, :8])


def test_unknown_border_is_refused():
    with pytest.raises(ValueError, match=r"dilseg\.UpsampleAdd: expected border .* 'wrap'"):
        dilseg.UpsampleAdd(2, border="wrap")


def test_cross_entropy_loss(device):
    weight = torch.tensor([1.0, 2.0, 0.5], device=device)
    ours = dilseg.CrossEntropyLoss(weight, 255, label_smoothing=0.1)
    rival = nn.CrossEntropyLoss(weight, ignore_index=255, label_smoothing=0.1)
    x = randn((2, 3, 4, 5), torch.float32, device)
    target = torch.randint(3, (2, 4, 5), device=device)
    target[0, 0] = 255
    torch.testing.assert_close(ours(x, target), rival(x, target))
    assert isinstance(ours, nn.CrossEntropyLoss)
    assert ours.state_dict().keys() == rival.state_dict().keys()
    assert repr(ours) == (
        "CrossEntropyLoss(classes=3, ignore_index=255, reduction='mean', label_smoothing=0.1)"
    )


def test_upsample_cross_entropy_loss(device):
    weight = torch.tensor([1.0, 2.0, 0.5], device=device)
    ours = dilseg.UpsampleCrossEntropyLoss(weight, 255, label_smoothing=0.1)
    rival = nn.CrossEntropyLoss(weight, ignore_index=255, label_smoothing=0.1)
    x = randn((2, 3, 4, 5), torch.float32, device)
    target = torch.randint(3, (2, 16, 20), device=device)
    target[0, 0] = 255
    up = F.interpolate(x, scale_factor=4, mode="bilinear")
    torch.testing.assert_close(ours(x, target), rival(up, target))
    assert isinstance(ours, nn.CrossEntropyLoss)
    assert ours.state_dict().keys() == rival.state_dict().keys()
    assert repr(ours) == (
        "UpsampleCrossEntropyLoss(classes=3, ignore_index=255, reduction='mean', "
        "label_smoothing=0.1, scale_factor=None, align_corners=False, border='clamp')"
    )
    aligned = dilseg.UpsampleCrossEntropyLoss(scale_factor=4, align_corners=True)
    up = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=True)
    target[0, 0] = -100
    torch.testing.assert_close(aligned(x, target), F.cross_entropy(up, target))


def test_upsample_cross_entropy_loss_refuses_unknown_words():
    with pytest.raises(ValueError, match=r"dilseg\.UpsampleCrossEntropyLoss: .* border .* 'wrap'"):
        dilseg.UpsampleCrossEntropyLoss(border="wrap")
    with pytest.raises(ValueError, match=r"UpsampleCrossEntropyLoss: expected reduction .* 'avg'"):
        dilseg.UpsampleCrossEntropyLoss(reduction="avg")


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match=r"dilseg\.CrossEntropyLoss: expected reduction .* 'avg'"):
        dilseg.CrossEntropyLoss(reduction="avg")
