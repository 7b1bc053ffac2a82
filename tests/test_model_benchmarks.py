# SPDX-License-Identifier: Apache-2.0
"""Whole networks in the benchmarks: on torch's operators, as cases, and in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.torch_ops import torch_ops
from dilseg import functional, models

# --- torch's operators ---------------------------------------------------------------------------


class NoOperatorOfOurs(TorchDispatchMode):
    """Refuses `torch.ops.dilseg.*`, and counts what it lets pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert not func.name().startswith("dilseg::"), func.name()
        self.passed += 1
        return func(*args, **(kwargs or {}))


def _network(name: str, **options: Any) -> models.SegmentationModel:
    """In float64, with weights under which every score differs from every other."""
    model = models.build(name, 5, **{"backbone": "demo", "dropout": 0.0, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=max(1, parameter[0].numel()) ** -0.5)
    return model


def _everything(model: models.SegmentationModel) -> list[torch.Tensor]:
    """Loss, gradients, logits, labels and probabilities of an image that fills no whole cells."""
    images = torch.randn(1, 3, 29, 22, dtype=torch.float64)
    target = torch.randint(0, 5, (1, 29, 22), dtype=torch.uint8)
    target[:, :3] = 255
    scores = model.scores(images)
    weight = torch.rand(5, dtype=torch.float64)
    loss = scores.cross_entropy(target, weight, ignore_index=255, label_smoothing=0.1)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    labels = scores.labels(confidence=True)
    return [loss, *gradients, scores.logits(), scores.labels(), *labels]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fcn32s", {}),
        ("fcn16s", {}),
        ("fcn8s", {}),
        ("fcn8s", {"at_once": True, "learned_upsampling": True}),
        ("dilatednet", {}),
        ("dilatednet", {"context": "large", "border": "zero", "dilations": (1, 2, 1)}),
    ],
)
def test_networks_are_the_same_on_torchs_operators(name: str, options: dict[str, Any]) -> None:
    model = _network(name, **options)
    torch.manual_seed(1)
    ours = _everything(model)
    torch.manual_seed(1)
    with torch_ops(), NoOperatorOfOurs() as mode:
        theirs = _everything(model)
    assert mode.passed > 100
    assert all(gradient.abs().max() > 0 for gradient in theirs[1:-4])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("rule", [
    {"scale_factor": (2, 3), "origin": (3, 5), "size": (4, 9)},
    {"scale_factor": 4, "border": "zero", "origin": (-2, 1), "size": (23, 20)},
    {"scale_factor": (33.5 / 5, 41.5 / 6), "align_corners": True, "border": "zero",
     "origin": (-5, 2), "size": (40, 36)},
    {"size": (33, 41), "align_corners": True},
    {"scale_factor": 2},
])  # fmt: skip
def test_every_window_of_an_upsampled_map_is_the_same(rule: dict[str, Any]) -> None:
    scores = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    ours = functional.upsample_add(scores, None, **rule)
    with torch_ops():
        theirs = functional.upsample_add(scores, None, **rule)
        labels, shares = functional.upsample_argmax(scores, confidence=True, **rule)
    torch.testing.assert_close(theirs, ours, rtol=0.0, atol=1e-12)
    torch.testing.assert_close((labels, shares), (ours.argmax(1), ours.softmax(1).amax(1)))


def test_a_factor_that_no_network_has_is_refused() -> None:
    with torch_ops(), pytest.raises(ValueError, match=r"a whole factor, but got 1\.5"):
        functional.upsample_add(torch.ones(1, 1, 2, 2), None, scale_factor=1.5)


def test_our_operators_are_back_behind_the_context_whatever_happened_in_it() -> None:
    own: dict[str, Callable[..., Any]] = dict(vars(functional))
    with pytest.raises(TypeError), torch_ops():
        functional.dilated_conv2d(None, None)
    assert vars(functional) == own
    with NoOperatorOfOurs(), pytest.raises(AssertionError, match="dilseg::cross_entropy"):
        functional.cross_entropy(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.int64))
