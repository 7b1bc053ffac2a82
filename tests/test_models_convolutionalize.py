# SPDX-License-Identifier: Apache-2.0
"""Classifiers of several builds, before and after they become fully convolutional."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dilseg.models import convolutionalize


class LeNet(nn.Module):
    """Functional pooling, ReLU and dropout, and a view, as tutorials write it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5)
        self.conv2 = nn.Conv2d(4, 6, 5)
        self.fc1 = nn.Linear(6 * 4 * 4, 12)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        return self.fc2(x)


class VGGLike(nn.Module):
    """features, avgpool, flatten, classifier: torchvision's VGG and AlexNet."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.MaxPool2d(2)
        )
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(4 * 7 * 7, 16),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(16, 16),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(16, 5),
        )

    def forward(self, x):
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class ResidualNet(nn.Module):
    """A skip and a global average, as in ResNet; `head` says how the average is written."""

    def __init__(self, head):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 5)
        self.head = head

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block(x))
        if self.head == "module":
            x = torch.flatten(self.avgpool(x), 1)
        elif self.head == "functional":
            x = F.adaptive_avg_pool2d(x, (1, 1)).reshape(x.shape[0], -1)
        else:
            x = x.mean((2, 3))
        return self.fc(x)


def assert_same_scores(classifier, dense, images):
    """Equal to rounding: sums run in another order."""
    classifier.eval()
    dense.eval()
    scores = dense(images)
    assert scores.shape[2:] == (1, 1)
    torch.testing.assert_close(scores[:, :, 0, 0], classifier(images), rtol=1e-4, atol=1e-5)


def test_lenet_on_its_own_size():
    classifier = LeNet()
    assert_same_scores(classifier, convolutionalize(classifier), torch.randn(3, 1, 28, 28))


def test_lenet_on_larger_images_is_a_sliding_window():
    classifier = LeNet().double().eval()
    dense = convolutionalize(classifier, (1, 28, 28)).eval()
    images = torch.randn(2, 1, 40, 36, dtype=torch.float64)
    scores = dense(images)
    assert scores.shape == (2, 10, 4, 3)
    for row in range(4):
        for column in range(3):
            window = images[:, :, 4 * row : 4 * row + 28, 4 * column : 4 * column + 28]
            torch.testing.assert_close(scores[:, :, row, column], classifier(window))


def test_torchvision_style():
    classifier = VGGLike()
    dense = convolutionalize(classifier, (3, 28, 28))
    assert_same_scores(classifier, dense, torch.randn(2, 3, 28, 28))
    # Weights keep their names, so that a checkpoint of the classifier can be compared.
    assert list(dense.state_dict()) == list(classifier.state_dict())
    assert dense.state_dict()["classifier.0.weight"].shape == (16, 4, 7, 7)
    assert dense(torch.randn(1, 3, 44, 32)).shape == (1, 5, 5, 2)


def test_sequential_with_strided_adaptive_pooling():
    classifier = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d((3, 2)), nn.Flatten(), nn.Linear(24, 5)
    )
    dense = convolutionalize(classifier, (3, 14, 10))
    assert_same_scores(classifier, dense, torch.randn(2, 3, 14, 10))


@pytest.mark.parametrize("head", ["module", "functional", "mean"])
def test_global_average_becomes_a_sliding_one(head):
    classifier = ResidualNet(head)
    dense = convolutionalize(classifier, (3, 16, 12))
    assert_same_scores(classifier, dense, torch.randn(2, 3, 16, 12))
    assert dense(torch.randn(1, 3, 20, 12)).shape == (1, 5, 3, 1)


def test_normalised_head_and_soft_output():
    classifier = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.Flatten(),
        nn.Linear(3 * 4 * 5, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 4, bias=False),
        nn.Softmax(dim=-1),
    )
    classifier(torch.randn(16, 2, 6, 7))  # moves the running statistics
    dense = convolutionalize(classifier, (2, 6, 7))
    assert_same_scores(classifier, dense, torch.randn(3, 2, 6, 7))
    torch.testing.assert_close(dense(torch.randn(1, 2, 9, 9)).sum(1), torch.ones(1, 4, 3))


@pytest.mark.parametrize(
    "head",
    [
        lambda x: F.log_softmax(x, dim=1),
        lambda x: torch.softmax(x, -1),
        lambda x: x.log_softmax(dim=-1),
    ],
)
def test_functional_softmax(head):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.fc = nn.Linear(2 * 2 * 2, 5)

        def forward(self, x):
            return head(self.fc(self.conv(x).flatten(1)))

    classifier = Net()
    assert_same_scores(classifier, convolutionalize(classifier), torch.randn(2, 1, 4, 4))


def test_shared_layer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.into = nn.Linear(2 * 2 * 2, 5)
            self.again = nn.Linear(5, 5)

        def forward(self, x):
            x = self.into(self.conv(x).flatten(1))
            return self.again(torch.tanh(self.again(x))) + x

    classifier = Twice()
    assert_same_scores(classifier, convolutionalize(classifier), torch.randn(2, 1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_gradient_flags_stay(dtype):
    classifier = LeNet().to(dtype)
    classifier.fc1.weight.requires_grad_(False)
    dense = convolutionalize(classifier)
    assert dense.fc1.weight.dtype == dtype
    assert not dense.fc1.weight.requires_grad
    assert dense.fc2.weight.requires_grad


def test_the_classifier_is_not_touched():
    classifier = LeNet()
    before = copy.deepcopy(classifier.state_dict())
    dense = convolutionalize(classifier)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert classifier.training
    assert isinstance(classifier.fc1, nn.Linear)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_functional_dropout_follows_the_mode():
    classifier = LeNet()
    images = torch.randn(1, 1, 28, 28)
    dense = convolutionalize(classifier)
    assert dense.training
    assert not torch.equal(dense(images), dense(images))
    dense.eval()
    assert torch.equal(dense(images), dense(images))


def test_modes_of_submodules_stay():
    classifier = VGGLike()
    classifier.classifier[2].eval()
    dense = convolutionalize(classifier, (3, 28, 28))
    assert dense.classifier.get_submodule("5").training
    assert not dense.classifier.get_submodule("2").training


def head_on(*layers):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), *layers)


@pytest.mark.parametrize(
    ("classifier", "shape", "error", "message"),
    [
        (VGGLike(), None, ValueError, "cannot be inferred: 'avgpool' fits any size"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), None, ValueError, "it has no convolution"),
        (head_on(nn.Linear(2 * 3, 1)), None, ValueError, "no square image up to 512 pixels fits"),
        (LeNet(), (1, 20, 20), ValueError, r"that the classifier accepts, but got \(1, 20, 20\)"),
        (LeNet(), (3, 28, 28), ValueError, r"that the classifier accepts, but got \(3, 28, 28\)"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
            (1, 8, 8),
            ValueError,
            "nn.Linear layers after a flattening, but got none",
        ),
        (
            head_on(nn.LayerNorm(8), nn.Linear(8, 2)),
            (1, 4, 4),
            NotImplementedError,
            r"but got '_2' \(LayerNorm.*no equivalent on a map",
        ),
        (
            head_on(nn.BatchNorm1d(8), nn.Linear(8, 2)),
            (1, 4, 4),
            NotImplementedError,
            r"but got '_2' \(BatchNorm1d",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(6, 2)),
            (1, 8, 8),
            NotImplementedError,
            r"but got '_1' \(Linear",
        ),
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9, 2)),
            (1, 8, 8),
            ValueError,
            "windows of one size, but got a 8 x 8 map for a 3 x 3 result",
        ),
    ],
)
def test_what_cannot_be_converted_is_said(classifier, shape, error, message):
    with pytest.raises(error, match=message):
        convolutionalize(classifier, shape)


def test_control_flow_cannot_be_traced():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"tracing Branching failed .* nn.Sequential"):
        convolutionalize(Branching(), (1, 8, 8))


def test_several_outputs_are_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            scores = self.fc(x.flatten(1))
            return scores, scores

    with pytest.raises(NotImplementedError, match="returns one tensor"):
        convolutionalize(Two(), (1, 2, 2))
