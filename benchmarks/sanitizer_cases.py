# SPDX-License-Identifier: Apache-2.0
"""Launches that compute-sanitizer watches: every op and gradient, awkward sizes, both layouts.

Run by the GPU job under each tool of compute-sanitizer; alone, `python -m
benchmarks.sanitizer_cases` is a quick check that results agree with the CPU's. Maps are small
because the tools slow kernels down a hundredfold.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

import dilseg

# (name, launch): launch(device) returns results that must not depend on the device.
SanitizerCase = tuple[str, Callable[[torch.device], tuple[torch.Tensor, ...]]]

_LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    # Made on the CPU: the sanitizer then sees only our kernels and copies, and both devices get the
    # same numbers.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _with_gradients(
    function: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
    draw: Callable[[tuple[int, ...], int], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    leaves = [value.requires_grad_() for value in inputs]
    output = function(*leaves)
    shape = tuple(output.shape)
    grad_output = _random(shape, output.dtype, seed=9) if draw is None else draw(shape, 9)
    grad_output = grad_output.to(output.device)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def _convolutions(dtype: torch.dtype, layout: str) -> Iterator[SanitizerCase]:
    shapes = (
        # n, c_in, c_out, h, w, kernel, stride, padding, dilation, groups
        (1, 3, 5, 7, 9, 3, 1, 2, 2, 1),  # odd sizes, h != w
        (2, 4, 6, 5, 5, 3, 2, 8, 7, 2),  # dilation larger than the map, stride, groups
        (1, 33, 33, 6, 5, 3, 1, 1, 1, 33),  # depthwise, past one warp of channels
        (1, 40, 9, 1, 1, 1, 1, 0, 1, 1),  # 1x1 map and window
    )
    for index, (n, c_in, c_out, h, w, k, stride, padding, dilation, groups) in enumerate(shapes):

        def launch(
            device: torch.device,
            sizes: tuple[int, ...] = (n, c_in, c_out, h, w, k),
            options: tuple[int, ...] = (stride, padding, dilation, groups),
            seed: int = index,
        ) -> tuple[torch.Tensor, ...]:
            n, c_in, c_out, h, w, k = sizes
            input = _random((n, c_in, h, w), dtype, seed).to(memory_format=_LAYOUTS[layout])
            weight = _random((c_out, c_in // options[3], k, k), dtype, seed + 1)
            bias = _random((c_out,), dtype, seed + 2)
            return _with_gradients(
                lambda x, y, b: dilseg.functional.dilated_conv2d(x, y, b, *options),
                *(value.to(device) for value in (input, weight, bias)),
            )

        yield f"dilated_conv2d {index} {dtype} {layout}", launch


# Small problems that a family of kernels takes where it is preferred; the plan would give most of
# them to another. n, c_in, c_out, h, w, kernel, stride, padding, dilation, groups.
_FAMILIES: dict[str, tuple[tuple[int, ...], ...]] = {
    "gemm": (
        (1, 24, 40, 9, 7, 3, 1, 2, 2, 1),
        (2, 16, 136, 9, 8, 3, 2, 1, 1, 1),  # past a tile of columns, stride
        (1, 32, 48, 7, 9, 3, 1, 3, 3, 2),
    ),
    "wgmma": (
        (1, 72, 72, 9, 15, 3, 1, 2, 2, 1),  # past a step of channels, a tile and more of pixels
        (3, 13, 264, 7, 9, 3, 1, 1, 1, 1),  # packed first, past the largest tile
    ),
    "patch": (
        (1, 21, 21, 9, 11, 3, 1, 4, 4, 1),
        (1, 42, 84, 9, 7, 3, 1, 1, 1, 1),
    ),
    "depthwise": ((1, 33, 66, 9, 11, 3, 1, 2, 2, 33),),
}
# How products of float32 are formed; half types have one way.
_PRECISIONS = {torch.float32: ("ieee", "bf16x3", "tf32"), torch.bfloat16: (None,)}


def _families(dtype: torch.dtype, layout: str) -> Iterator[SanitizerCase]:
    """Every family of convolution kernels, on multiples of 1/8: exact in every arithmetic."""

    def eighths(shape: tuple[int, ...], seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(-4, 5, shape, generator=generator) / 8).to(dtype)

    for family, problems in _FAMILIES.items():
        for index, problem in enumerate(problems):
            for precision in _PRECISIONS[dtype]:

                def launch(
                    device: torch.device,
                    family: str = family,
                    problem: tuple[int, ...] = problem,
                    precision: Literal["ieee", "bf16x3", "tf32"] | None = precision,
                ) -> tuple[torch.Tensor, ...]:
                    n, c_in, c_out, h, w, k, *options, groups = problem
                    input = eighths((n, c_in, h, w), 1).to(memory_format=_LAYOUTS[layout])
                    weight = eighths((c_out, c_in // groups, k, k), 2)
                    torch.ops.dilseg._prefer_dilated_conv2d_kernel(family)
                    dilseg.set_float32_conv_precision(precision)
                    try:
                        return _with_gradients(
                            lambda x, y, b: dilseg.functional.dilated_conv2d(
                                x, y, b, *options, groups
                            ),
                            *(v.to(device) for v in (input, weight, eighths((c_out,), 3))),
                            draw=eighths,
                        )
                    finally:
                        dilseg.set_float32_conv_precision(None)
                        torch.ops.dilseg._prefer_dilated_conv2d_kernel("")

                yield f"{family} {index} {precision or dtype} {layout}", launch


def _upsamplings(dtype: torch.dtype, layout: str) -> Iterator[SanitizerCase]:
    choices: tuple[dict[str, Any], ...] = (
        {"scale_factor": 2, "border": "clamp"},
        {"scale_factor": 3, "border": "zero"},
        {"size": (11, 3), "align_corners": True},
        {"size": (1, 1)},
    )
    for index, options in enumerate(choices):

        def launch(
            device: torch.device, options: dict[str, Any] = options, seed: int = index
        ) -> tuple[torch.Tensor, ...]:
            input = _random((2, 5, 4, 7), dtype, seed).to(memory_format=_LAYOUTS[layout])
            skip = _random((2, 5, 13, 22), dtype, seed + 1).to(memory_format=_LAYOUTS[layout])
            return _with_gradients(
                functools.partial(dilseg.functional.upsample_add, offset=(1, 1), **options),
                input.to(device),
                skip.to(device),
            )

        yield f"upsample_add {index} {dtype} {layout}", launch


def _losses(dtype: torch.dtype, layout: str) -> Iterator[SanitizerCase]:
    reductions: tuple[Literal["mean", "none"], ...] = ("mean", "none")
    for reduction in reductions:
        for classes, label_dtype in ((21, torch.int64), (150, torch.uint8)):

            def launch(
                device: torch.device,
                reduction: Literal["mean", "none"] = reduction,
                classes: int = classes,
                label_dtype: torch.dtype = label_dtype,
            ) -> tuple[torch.Tensor, ...]:
                input = _random((2, classes, 5, 7), dtype, 3).to(memory_format=_LAYOUTS[layout])
                generator = torch.Generator().manual_seed(4)
                target = torch.randint(0, classes, (2, 5, 7), generator=generator)
                target[:, 1:3, 2] = 255
                target = target.to(label_dtype).to(device)
                weight = torch.linspace(0.5, 1.5, classes).to(dtype).to(device)
                loss = functools.partial(
                    dilseg.functional.cross_entropy,
                    target=target,
                    weight=weight,
                    ignore_index=255,
                    reduction=reduction,
                    label_smoothing=0.1,
                )
                return _with_gradients(loss, input.to(device))

            yield f"cross_entropy {reduction} {classes} {dtype} {layout}", launch


def _upsampled(dtype: torch.dtype, layout: str) -> Iterator[SanitizerCase]:
    """The loss and the argmax of upsampled logits: both kernels, both borders, a tile and more."""
    reductions: tuple[Literal["mean", "none"], ...] = ("mean", "none")
    rules: tuple[dict[str, Any], ...] = (
        {"scale_factor": 8},
        {"scale_factor": 2, "border": "zero", "origin": (-1, -2)},
    )
    for index, (classes, rule) in enumerate(
        (classes, rule) for classes in (3, 21, 40) for rule in rules
    ):
        size = (33, 67) if index % 2 == 0 else (9, 15)

        def logits(device: torch.device, classes: int = classes) -> torch.Tensor:
            values = _random((2, classes, 5, 9), dtype, 5).to(memory_format=_LAYOUTS[layout])
            return values.to(device)

        for reduction in reductions:

            def launch(
                device: torch.device,
                logits: Callable[[torch.device], torch.Tensor] = logits,
                classes: int = classes,
                size: tuple[int, int] = size,
                reduction: Literal["mean", "none"] = reduction,
                rule: dict[str, Any] = rule,
            ) -> tuple[torch.Tensor, ...]:
                generator = torch.Generator().manual_seed(6)
                target = torch.randint(0, classes, (2, *size), generator=generator)
                target[:, 1:3, 2] = 255
                loss = functools.partial(
                    dilseg.functional.upsample_cross_entropy,
                    target=target.to(device),
                    ignore_index=255,
                    reduction=reduction,
                    label_smoothing=0.1,
                    **rule,
                )
                return _with_gradients(loss, logits(device))

            yield f"upsample_cross_entropy {reduction} {index} {dtype} {layout}", launch

        def label(
            device: torch.device,
            logits: Callable[[torch.device], torch.Tensor] = logits,
            size: tuple[int, int] = size,
            rule: dict[str, Any] = rule,
        ) -> tuple[torch.Tensor, ...]:
            # Labels of nearly equal logits may differ between devices; their probability may not.
            _, confidence = dilseg.functional.upsample_argmax(
                logits(device), size=size, confidence=True, **rule
            )
            return (confidence,)

        yield f"upsample_argmax {index} {dtype} {layout}", label


def sanitizer_cases() -> Iterator[SanitizerCase]:
    """Every case, in a fixed order."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for layout in _LAYOUTS:
            yield from _convolutions(dtype, layout)
            if dtype in _PRECISIONS:
                yield from _families(dtype, layout)
            yield from _upsamplings(dtype, layout)
            yield from _losses(dtype, layout)
            yield from _upsampled(dtype, layout)


def compare(name: str, got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    """Checks results of one device against the CPU's.

    Raises:
        ValueError: they differ by more than the dtype explains.
    """
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        largest = b.abs().max().item()
        error = (a.cpu().double() - b.double()).abs().max().item()
        # 40 roundings at depth a few hundred; this list hunts memory errors, the tests hold the
        # tight bounds.
        allowed = 40 * torch.finfo(b.dtype).eps * max(largest, 1.0)
        if not error <= allowed:
            raise ValueError(
                f"{name}: result {index} is off by {error:.3g}, where {allowed:.3g} is allowed"
            )


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases on the device given as the argument (default cuda); prints their count."""
    arguments = sys.argv[1:] if arguments is None else arguments
    device = torch.device(arguments[0] if arguments else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.sanitizer_cases: PyTorch sees no GPU on this machine", file=sys.stderr)
        return 2
    count = 0
    for name, launch in sanitizer_cases():
        compare(name, launch(device), launch(torch.device("cpu")))
        count += 1
    print(f"sanitizer cases: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
