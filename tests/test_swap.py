# SPDX-License-Identifier: Apache-2.0
import copy
import re

import pytest
import torch
from helpers.samples import randn
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import dilseg


class Block(nn.Module):
    """A residual block as in a dilated ResNet."""

    def __init__(self, channels, dilation):
        super().__init__()
        options = {"padding": dilation, "dilation": dilation, "bias": False}
        self.conv1 = nn.Conv2d(channels, channels, 3, **options)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, **options)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x
        return F.relu(out, inplace=True)


class ASPP(nn.Module):
    """Parallel dilated branches, one depthwise separable, and image pooling."""

    def __init__(self, c_in, c_out, dilations=(6, 12, 18)):
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(c_in, c_out, 1)])
        self.branches += [nn.Conv2d(c_in, c_out, 3, padding=d, dilation=d) for d in dilations[:-1]]
        d = dilations[-1]
        self.branches.append(
            nn.Sequential(
                nn.Conv2d(c_in, c_in, 3, padding=d, dilation=d, groups=c_in, bias=False),
                nn.Conv2d(c_in, c_out, 1),
            )
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c_in, c_out, 1), nn.ReLU())
        self.project = nn.Conv2d(c_out * (len(self.branches) + 1), c_out, 1)

    def forward(self, x):
        out = [branch(x) for branch in self.branches]
        out.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear"))
        return self.project(torch.cat(out, 1))


class DeepLabLike(nn.Module):
    """The layout of DeepLab v3: a strided stem, dilated blocks, ASPP and a classifier."""

    def __init__(self, classes=5, width=16):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.layer3 = Block(width, 2)
        self.layer4 = Block(width, 4)
        self.aspp = ASPP(width, 8)
        self.classifier = nn.Conv2d(8, classes, 1)

    def forward(self, x):
        y = self.classifier(self.aspp(self.layer4(self.layer3(self.stem(x)))))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


DILATED = [
    *(f"layer{i}.conv{j}" for i in (3, 4) for j in (1, 2)),
    "aspp.branches.1",
    "aspp.branches.2",
    "aspp.branches.3.0",
]


def train_one_step(model, device):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = randn((2, 3, 41, 37), torch.float32, device, seed=1)
    target = torch.randint(5, (2, 41, 37), generator=torch.Generator().manual_seed(2)).to(device)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimiser.step()
    return loss.detach()


@pytest.mark.parametrize("min_dilation", [1, 2])
def test_deeplab_keeps_state_outputs_and_a_training_step(min_dilation, device):
    rival = DeepLabLike().to(device)
    model = copy.deepcopy(rival)
    report = dilseg.swap_conv2d(model, min_dilation=min_dilation)
    if min_dilation == 2:
        assert [e.name for e in report.swapped] == DILATED
    else:
        assert len(report.swapped) == len(report) == 13

    assert list(model.state_dict()) == list(rival.state_dict())
    x = randn((2, 3, 41, 37), torch.float32, device)
    model.eval(), rival.eval()
    torch.testing.assert_close(model(x), rival(x))
    model.train(), rival.train()
    torch.testing.assert_close(train_one_step(model, device), train_one_step(rival, device))
    torch.testing.assert_close(model.state_dict(), rival.state_dict(), rtol=1e-4, atol=1e-5)

    dilseg.restore_conv2d(model)
    assert all(type(m) is nn.Conv2d for m in model.modules() if isinstance(m, nn.Conv2d))
    model.eval(), rival.eval()
    torch.testing.assert_close(model(x), rival(x), rtol=1e-4, atol=1e-5)


def test_channels_last_and_half_survive(device):
    rival = DeepLabLike().to(device).eval().to(memory_format=torch.channels_last)
    model = copy.deepcopy(rival)
    dilseg.swap_conv2d(model)
    x = randn((1, 3, 41, 37), torch.float32, device).to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), rival(x))
    rival, model, x = rival.bfloat16(), model.bfloat16(), x.bfloat16()
    torch.testing.assert_close(model(x), rival(x), rtol=0.05, atol=0.05)


def torchvision_models():
    """torchvision.models, or a skip that says why it cannot be had."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: its binary does not fit this torch
        pytest.skip(f"torchvision cannot be imported: {error}")
    return models


@pytest.mark.parametrize(
    "name",
    [
        "deeplabv3_resnet50",
        "fcn_resnet50",
        "lraspp_mobilenet_v3_large",
        "deeplabv3_mobilenet_v3_large",
    ],
)
def test_torchvision(name):
    rival = torchvision_models().get_model(name, weights=None, weights_backbone=None).eval()
    model = copy.deepcopy(rival)
    assert dilseg.swap_conv2d(model).swapped
    assert list(model.state_dict()) == list(rival.state_dict())
    x = randn((1, 3, 65, 65), torch.float32, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(x)["out"], rival(x)["out"], rtol=1e-3, atol=1e-4)
    dilseg.restore_conv2d(model)
    assert not any(isinstance(m, dilseg.DilatedConv2d) for m in model.modules())


def test_identity_parameters_hooks_and_optimisers_survive():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, dilation=2))
    conv, weight = model[0], model[0].weight
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    conv.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    dilseg.swap_conv2d(model)
    assert model[0] is conv
    assert conv.weight is weight
    model(torch.ones(1, 2, 5, 5)).sum().backward()
    before = weight.detach().clone()
    optimiser.step()
    assert not torch.equal(weight, before)
    assert seen == [dilseg.DilatedConv2d]


def test_the_model_itself_may_be_a_convolution():
    conv = nn.Conv2d(2, 2, 3, dilation=2)
    report = dilseg.swap_conv2d(conv)
    assert type(conv) is dilseg.DilatedConv2d
    assert "(model)" in str(report)
    dilseg.restore_conv2d(conv)
    assert type(conv) is nn.Conv2d


def test_padding_modes_survive():
    model = nn.Conv2d(2, 2, 3, padding=2, dilation=2, padding_mode="reflect")
    x = torch.randn(1, 2, 7, 7)
    expected = model(x)
    dilseg.swap_conv2d(model)
    torch.testing.assert_close(model(x), expected)


def test_shared_modules_are_counted_once():
    conv = nn.Conv2d(2, 2, 3, padding=2, dilation=2)
    report = dilseg.swap_conv2d(nn.Sequential(conv, nn.ReLU(), conv))
    assert [e.name for e in report] == ["0"]


class OwnConv2d(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def lazy():
    return nn.LazyConv2d(2, 3, dilation=2)


def parametrized():
    return parametrizations.weight_norm(nn.Conv2d(2, 2, 3, dilation=2))


def with_own_forward():
    conv = nn.Conv2d(2, 2, 3, dilation=2)
    conv.forward = lambda x: x
    return conv


def with_own_activation():
    conv = nn.Conv2d(2, 2, 3, dilation=2)
    conv.activation = "relu"  # a note to someone else: nn.Conv2d applies none
    return conv


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(2, 2, 3), "dilation 1 is below min_dilation 2"),
        (lambda: OwnConv2d(2, 2, 3, dilation=2), r"subclass .*OwnConv2d"),
        (parametrized, r"subclass .*ParametrizedConv2d"),
        (lazy, "lazy: run one forward pass first"),
        (
            lambda: nn.Conv2d(2, 2, 3, dilation=2, dtype=torch.complex64),
            "no kernel for .*complex64",
        ),
        (lambda: dilseg.DilatedConv2d(2, 2, 3, dilation=2), "already a dilseg.DilatedConv2d"),
        (with_own_forward, "has a forward of its own"),
        (with_own_activation, "has an attribute `activation`"),
    ],
)
def test_what_is_kept_and_why(make, reason):
    model = nn.Sequential(make())
    kind = type(model[0])
    report = dilseg.swap_conv2d(model)
    assert type(model[0]) is kind
    assert not report.swapped
    (entry,) = report.kept
    assert entry.name == "0"
    assert re.search(reason, entry.reason), entry.reason


def test_a_parametrization_still_works_after_a_swap():
    model = nn.Sequential(parametrized())
    dilseg.swap_conv2d(model)
    assert parametrize.is_parametrized(model[0])
    assert model(torch.ones(1, 2, 5, 5)).shape == (1, 2, 1, 1)


def test_either_axis_counts():
    model = nn.Conv2d(2, 2, 3, dilation=(1, 4))
    assert dilseg.swap_conv2d(model, min_dilation=4).swapped
    dilseg.restore_conv2d(model)
    assert dilseg.swap_conv2d(model, min_dilation=5).kept


def test_restore_keeps_fused_activations():
    model = nn.Sequential(
        dilseg.DilatedConv2d(2, 2, 3, activation="relu"), dilseg.DilatedConv2d(2, 2, 3)
    )
    report = dilseg.restore_conv2d(model)
    assert [type(m) for m in model] == [dilseg.DilatedConv2d, nn.Conv2d]
    assert "fused activation 'relu'" in report.kept[0].reason
    assert [e.name for e in report.swapped] == ["1"]


def test_report_prints_a_table():
    model = nn.ModuleDict(
        {
            "first": nn.Conv2d(3, 8, 7, stride=2, padding=3),
            "second": nn.Conv2d(8, 8, (3, 5), padding="same", dilation=(2, 4), groups=4),
        }
    )
    heading, *rows = str(dilseg.swap_conv2d(model)).splitlines()
    assert heading == "1 of 2 convolutions swapped"
    assert [re.split(" {2,}", row) for row in rows] == [
        ["layer", "shape", "result", "why"],
        [
            "first",
            "3 -> 8, 7x7, stride 2, padding 3",
            "kept",
            "dilation 1 is below min_dilation 2",
        ],
        [
            "second",
            "8 -> 8, 3x5, padding same, dilation (2, 4), groups 4",
            "swapped",
            "dilation (2, 4)",
        ],
    ]
    for word in ("result", "swapped", "kept"):
        columns = [row.index(word) for row in rows if word in row.split()]
        assert columns == [rows[0].index("result")], "columns are not aligned"
    assert str(dilseg.restore_conv2d(model)).splitlines()[0] == "1 of 2 convolutions restored"


def test_report_of_a_model_without_convolutions():
    report = dilseg.swap_conv2d(nn.Linear(2, 2))
    assert str(report) == "0 of 0 convolutions swapped: the model has no nn.Conv2d"
    assert len(report) == 0


def test_wrong_arguments():
    model = nn.Conv2d(2, 2, 3)
    with pytest.raises(TypeError, match=r"dilseg\.swap_conv2d: expected model .* got function"):
        dilseg.swap_conv2d(lambda x: x)
    with pytest.raises(TypeError, match=r"dilseg\.restore_conv2d: expected model .* got dict"):
        dilseg.restore_conv2d({})
    with pytest.raises(TypeError, match="expected min_dilation to be an int, but got '2'"):
        dilseg.swap_conv2d(model, min_dilation="2")
    with pytest.raises(ValueError, match="expected min_dilation of at least 1, but got 0"):
        dilseg.swap_conv2d(model, min_dilation=0)
