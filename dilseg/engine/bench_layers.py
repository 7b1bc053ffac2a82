# SPDX-License-Identifier: Apache-2.0
"""A handful of layers of the papers and of mobile networks, dilseg's against torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilseg import functional
from dilseg.engine.bench import DTYPES, TIE, Pair, in_turns, judge, table
from dilseg.engine.console import say
from dilseg.engine.files import write_json
from dilseg.engine.processes import pick_device

__all__ = ["bench_layers"]

SIZE = 64  # of the maps; those that are upsampled by 8 make images of 512
_ROUNDINGS = 16  # allowed beside twice torch's own error, as for a model


@dataclass(frozen=True)
class _Layer:
    name: str
    inputs: tuple[tuple[int, ...], ...]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    is_labels: bool = False  # without gradients, and judged by the score of the class it names


def _upsampled(input: Tensor, scale: int) -> Tensor:
    return F.interpolate(input, scale_factor=scale, mode="bilinear", align_corners=False)


def _labels(input: Tensor) -> Tensor:
    labels = functional.upsample_argmax(input, scale_factor=8)
    assert isinstance(labels, Tensor)  # no confidence was asked for
    return labels


def _layers(device: torch.device) -> list[_Layer]:
    def conv(name: str, channels: int, dilation: int, groups: int = 1) -> _Layer:
        options: dict[str, Any] = {"padding": dilation, "dilation": dilation, "groups": groups}
        return _Layer(
            name,
            (
                (1, channels, SIZE, SIZE),
                (channels, channels // groups, 3, 3),
                (channels,),
            ),
            partial(functional.dilated_conv2d, **options),
            partial(F.conv2d, **options),
        )

    scores = (1, 21, SIZE, SIZE)
    target = torch.randint(0, 21, (1, 8 * SIZE, 8 * SIZE), device=device)
    return [
        conv("convolution 512, dilation 2", 512, 2),
        conv("convolution 21, dilation 4", 21, 4),
        conv("depthwise 96, dilation 2", 96, 2, groups=96),
        _Layer(
            "upsample x8 and loss",
            (scores,),
            lambda x: functional.upsample_cross_entropy(x, target, scale_factor=8),
            lambda x: F.cross_entropy(_upsampled(x, 8), target),
        ),
        _Layer(
            "upsample x2 and add",
            (scores, (1, 21, 2 * SIZE, 2 * SIZE)),
            lambda x, skip: functional.upsample_add(x, skip, scale_factor=2),
            lambda x, skip: _upsampled(x, 2) + skip,
        ),
        _Layer(
            "upsample x8 and argmax",
            (scores,),
            _labels,
            lambda x: _upsampled(x, 8).argmax(1),
            is_labels=True,
        ),
    ]


def _run(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], step: bool
) -> tuple[Tensor, ...]:
    if not step:
        with torch.inference_mode():
            return (function(*inputs),)
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    return result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result))


def _judge(layer: _Layer, inputs: Sequence[Tensor], step: bool) -> tuple[bool, float, float]:
    exact = [x.double() for x in inputs]
    ours, theirs, truth = (
        _run(function, given, step)
        for function, given in ((layer.ours, inputs), (layer.theirs, inputs), (layer.theirs, exact))
    )
    if layer.is_labels:
        scores = _upsampled(exact[0], 8)
        ours, theirs, truth = (
            (scores.gather(1, label[:, None]),) for (label,) in (ours, theirs, truth)
        )
    return judge(ours, theirs, truth, _ROUNDINGS * torch.finfo(inputs[0].dtype).eps)


def bench_layers(
    *,
    dtype: str = "float32",
    channels_last: bool = False,
    device: str = "auto",
    seconds: float = 1.0,
    json: str | Path | None = None,
) -> bool:
    """Compares dilseg's layers with torch's on the same tensors, then times both in turns.

    Args:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        channels_last: Run in that memory format.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        seconds: Time to spend on each layer, forward and with its gradients.
        json: A file for the same figures.

    Returns:
        Whether every result is as exact as torch's; one that is not is not timed.

    Raises:
        ValueError: An option is none of these.

    Difference from torch: torch has no counterpart.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, but got {dtype!r}.")
    if not seconds > 0:
        raise ValueError(f"--seconds: expected a positive number, but got {seconds:g}.")
    place = pick_device(device)
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    lines: list[Sequence[str]] = [("layer", "input", "mode", "torch", "dilseg", "ratio", "")]
    figures: list[dict[str, Any]] = []
    holds = True
    for layer in _layers(place):
        inputs = [torch.randn(size, device=place).to(DTYPES[dtype]) for size in layer.inputs]
        inputs = [x.to(memory_format=layout) if x.dim() == 4 else x for x in inputs]
        for step in (False,) if layer.is_labels else (False, True):
            same, error, allowed = _judge(layer, inputs, step)
            holds = holds and same
            pair = _time(layer, inputs, step, place, seconds) if same else None
            mode = "step" if step else "forward"
            shape = "x".join(map(str, layer.inputs[0]))
            bad = (f"DIFFERENT: off by {error:.2g}, {allowed:.2g} is allowed", "", "", "")
            lines.append((layer.name, shape, mode, *(bad if pair is None else pair.cells())))
            figures.append(
                {
                    "layer": layer.name,
                    "input": list(layer.inputs[0]),
                    "mode": mode,
                    "error": error,
                    "allowed_error": allowed,
                    "seconds": None if pair is None else pair.as_dict(),
                }
            )
    say(
        f"{dtype}, {place}, {torch.get_num_threads()} threads, medians of turns; gain and loss "
        f"beyond {TIE - 1:.0%}; results compared with float64 before\n\n{table(*lines)}"
    )
    if json is not None:
        write_json(
            Path(json),
            {
                "format": "dilseg-bench-layers",
                "version": 1,
                "dtype": dtype,
                "channels_last": channels_last,
                "device": str(place),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "layers": figures,
            },
        )
    return holds


def _time(
    layer: _Layer, inputs: Sequence[Tensor], step: bool, device: torch.device, seconds: float
) -> Pair:
    return in_turns(
        lambda ours: partial(_run, layer.ours if ours else layer.theirs, inputs, step),
        device,
        seconds,
    )
