# SPDX-License-Identifier: Apache-2.0
"""What :func:`dilseg.swap_conv2d` does for anybody's model: the same numbers? how much time?"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dilseg.engine.console import say
from dilseg.engine.files import write_json
from dilseg.engine.processes import pick_device
from dilseg.nn import DilatedConv2d
from dilseg.swap import swap_conv2d

__all__ = ["DTYPES", "TIE", "Launcher", "Pair", "bench_model", "in_turns", "judge", "table"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIE = 1.03  # ratios nearer to 1 than this count as equal
# Makes what launches once, with torch's layer or, for True, with dilseg's.
Launcher: TypeAlias = Callable[[bool], Callable[[], object]]
_READING_S = 0.01  # launches between two looks at the clock take about this long
_FEWEST_READINGS = 5
# Allowed: twice the original's own error against float64, and some roundings of the largest value;
# without a reference, some roundings of it for each convolution, between original and swapped.
_ROUNDINGS = 16
_ROUNDINGS_EACH = 4


@dataclass(frozen=True)
class Pair:
    """Median seconds of one launch, with nn.Conv2d and with dilseg."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How many times as fast dilseg is."""
        return self.before / self.after

    @property
    def verdict(self) -> str:
        """``gain``, ``tie`` or ``loss``."""
        return "gain" if self.ratio > TIE else "loss" if self.ratio < 1 / TIE else "tie"

    def as_dict(self) -> dict[str, Any]:
        """As in a JSON file."""
        return {
            "before": self.before,
            "after": self.after,
            "ratio": self.ratio,
            "verdict": self.verdict,
        }

    def cells(self) -> tuple[str, str, str, str]:
        """As in a table."""
        return (
            _duration(self.before),
            _duration(self.after),
            f"{self.ratio:.2f}x",
            self.verdict,
        )


def bench_model(
    model: str,
    inputs: Sequence[str],
    *,
    dtype: str = "float32",
    channels_last: bool = False,
    device: str = "auto",
    min_dilation: int = 2,
    step: bool = False,
    seconds: float = 3.0,
    json: str | Path | None = None,
) -> bool:
    """Swaps a model's dilated convolutions, compares its results and times both, layer by layer.

    The original and the swapped model take turns, so that a machine that slows down or speeds up
    does so for both.

    Args:
        model: ``module:factory``, where the module is importable or a path of a ``.py`` file, and
            the factory takes no arguments and returns the ``nn.Module``.
        inputs: Shape of each argument of the model, such as ``"1,3,512,512"``; it is given normal
            random numbers.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, of model and inputs.
        channels_last: Run in that memory format.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        min_dilation: As for :func:`dilseg.swap_conv2d`.
        step: Time forward and backward in training mode, instead of inference.
        seconds: Time to spend on the model; each layer gets a quarter of it.
        json: A file for the same figures.

    Returns:
        Whether the swapped model's results are as exact as the original's.

    Raises:
        ImportError: The module cannot be imported.
        ValueError: No such factory, a shape that is none, or a model that cannot be run so.
        TypeError: The factory's result is no ``nn.Module``.

    Difference from torch: torch has no counterpart.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, but got {dtype!r}.")
    if not seconds > 0:
        raise ValueError(f"--seconds: expected a positive number, but got {seconds:g}.")
    shapes = [_shape(text) for text in inputs]
    place = pick_device(device)
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = _build(model).to(device=place, dtype=DTYPES[dtype]).train(step)
    if channels_last:
        net = net.to(memory_format=layout)  # type: ignore[call-overload]
    arguments = [torch.randn(shape, device=place).to(DTYPES[dtype]) for shape in shapes]
    arguments = [x.to(memory_format=layout) if x.dim() == 4 else x for x in arguments]

    report = swap_conv2d(net, min_dilation=min_dilation)
    layers = {entry.name: net.get_submodule(entry.name) for entry in report.swapped}
    if not layers:
        say(
            f"{report}\nnothing to swap: no convolution has a dilation of {min_dilation} or more "
            "(--min-dilation 1 swaps all)"
        )
        return True
    swap = _Swap(layers.values())

    swap.set(False)
    seen = _inputs_of(net, layers, arguments)
    exact = _compare(net, swap, arguments, depth=len(report))
    say(exact.sentence)
    launcher = swap.launcher(_launch(net, arguments, step))
    whole = in_turns(launcher, place, seconds)
    peaks = _peaks(launcher, place)
    rows = {
        name: in_turns(swap.launcher(_launch(layers[name], [x], step)), place, seconds / 4)
        for name, x in seen.items()
    }
    what = "forward and backward" if step else "forward"
    say(f"{what}, {dtype}, {place}, medians of turns; gain and loss beyond {TIE - 1:.0%}\n")
    unseen = ("never called", "", "", "")
    say(
        table(
            ("layer", "shape", "nn.Conv2d", "dilseg", "ratio", ""),
            *(
                (
                    e.name or "(model)",
                    e.shape,
                    *(rows[e.name].cells() if e.name in rows else unseen),
                )
                for e in report.swapped
            ),
            ("whole model", "", *whole.cells()),
        )
    )
    if peaks is not None:
        before, after = (f"{peak / 2**20:.1f} MiB" for peak in peaks)
        say(
            f"\npeak memory beyond weights and inputs: {before} with nn.Conv2d, {after} with dilseg"
        )
    if json is not None:
        write_json(
            Path(json),
            {
                "format": "dilseg-bench",
                "version": 1,
                "model": model,
                "inputs": [list(shape) for shape in shapes],
                "dtype": dtype,
                "channels_last": channels_last,
                "device": str(place),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "mode": "step" if step else "forward",
                "error": exact.error,
                "allowed_error": exact.allowed,
                "seconds": whole.as_dict(),
                "peak_bytes": None if peaks is None else {"before": peaks[0], "after": peaks[1]},
                "layers": {name: pair.as_dict() for name, pair in rows.items()},
            },
        )
    return exact.holds


# The model and its inputs ----------------------------------------------------------------------


def _shape(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--input: expected sizes such as 1,3,512,512, all of at least 1, but got {text!r}."
        )
    return tuple(map(int, parts))


def _build(spec: str) -> nn.Module:
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ValueError(
            f"--model: expected module:factory, such as my_model:make or my_model.py:make, but got "
            f"{spec!r}."
        )
    module = _import(where)
    factory = getattr(module, name, None)
    if not callable(factory):
        found = sorted(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
        raise ValueError(
            f"--model: {where} has no function or class {name!r}; it has "
            f"{', '.join(found) or 'none'}."
        )
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(
            f"--model: {spec} could not be called without arguments ({error}); write a function "
            "without parameters that returns the model."
        ) from error
    try:
        net = factory()
    except Exception as error:
        raise ValueError(f"--model: {spec} failed: {type(error).__name__}: {error}.") from error
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"--model: expected {spec} to return a torch.nn.Module, but got {type(net).__name__}."
        )
    return net


def _import(where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            return _load(Path(where))
        if "" not in sys.path:
            sys.path.insert(0, "")  # modules in the current folder, as `python -m` finds them
        return importlib.import_module(where)
    except Exception as error:
        raise ImportError(
            f"--model: {where} could not be imported: {type(error).__name__}: {error}."
        ) from error


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return module


class _Swap:
    """The swapped layers, as nn.Conv2d or as dilseg's; only their class changes."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)

    def set(self, ours: bool) -> None:
        """Makes all of them dilseg's, or torch's."""
        for layer in self._layers:
            layer.__class__ = DilatedConv2d if ours else nn.Conv2d

    def launcher(self, launch: Callable[[], object]) -> Launcher:
        """`launch` with either."""

        def choose(ours: bool) -> Callable[[], object]:
            self.set(ours)
            return launch

        return choose


def _inputs_of(
    net: nn.Module, layers: Mapping[str, nn.Module], arguments: Sequence[Tensor]
) -> dict[str, Tensor]:
    """What each layer is given first; a layer that is never called has no entry."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.setdefault(name, (*given, *named.values())[0].detach())

        return hook

    handles = [
        layer.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            net(*arguments)
    except Exception as error:
        sizes = "; ".join(",".join(map(str, x.shape)) for x in arguments)
        raise ValueError(
            f"--input: the model could not be run on {sizes}: {error}. One --input per argument of "
            "its forward is expected."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


# The same numbers? -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Comparison:
    holds: bool
    error: float
    allowed: float
    sentence: str


def _leaves(value: object) -> Iterator[Tensor]:
    """The floating-point tensors of a result, which may be nested."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif hasattr(value, "__dict__"):
        yield from _leaves(vars(value))


def _run(net: nn.Module, arguments: Sequence[Tensor]) -> list[Tensor]:
    """Results that do not depend on random numbers or on statistics of the batch."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            results = [leaf.double() for leaf in _leaves(net(*arguments))]
    finally:
        net.train(training)
    if not results:
        raise ValueError("--model: expected a model that returns floating-point tensors.")
    return results


def _reference(
    net: nn.Module, arguments: Sequence[Tensor]
) -> tuple[torch.dtype, list[Tensor]] | None:
    """The model in a finer dtype, if it can run in one: some convert to float32 inside."""
    for dtype in (torch.float64, torch.float32):
        if torch.finfo(dtype).eps < torch.finfo(arguments[0].dtype).eps:
            try:
                return dtype, _run(copy.deepcopy(net).to(dtype), [x.to(dtype) for x in arguments])
            except Exception:  # whatever it is, the model itself has run
                continue
    return None


def _compare(
    net: nn.Module, swap: _Swap, arguments: Sequence[Tensor], *, depth: int
) -> _Comparison:
    swap.set(False)
    before = _run(net, arguments)
    reference = _reference(net, arguments)
    swap.set(True)
    after = _run(net, arguments)
    swap.set(False)
    if reference is None:
        origin, roundings = "the original", _ROUNDINGS_EACH * depth
        rule = f"{_ROUNDINGS_EACH} roundings for each of {depth} convolutions; it runs in no finer"
        rule += " dtype"
    else:
        origin, roundings = f"the model in {str(reference[0]).removeprefix('torch.')}", _ROUNDINGS
        rule = f"twice the original's own error and {_ROUNDINGS} roundings"
    holds, error, allowed = judge(
        after,
        before,
        before if reference is None else reference[1],
        roundings * torch.finfo(arguments[0].dtype).eps,
    )
    sentence = (
        f"results: off by {error:.2g} from {origin} at most, {allowed:.2g} is allowed ({rule})"
    )
    return _Comparison(holds, error, allowed, sentence if holds else f"DIFFERENT {sentence}")


def judge(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], truth: Sequence[Tensor], floor: float
) -> tuple[bool, float, float]:
    """Whether our results are as near to the truth as theirs; the worst error and its bound.

    Allowed is twice their error, and `floor` times the largest value.
    """
    worst = (0.0, 0.0)
    holds = True
    for a, b, t in zip(ours, theirs, truth, strict=True):
        if t.numel():
            error, rival = ((x.double() - t).abs().max().item() for x in (a, b))
            allowed = 2 * rival + floor * t.abs().max().item()
            holds = holds and error <= allowed  # false also where the error is nan
            if not error <= worst[0]:
                worst = (error, allowed)
    return holds, *worst


# How much time? --------------------------------------------------------------------------------


def _launch(module: nn.Module, arguments: Sequence[Tensor], step: bool) -> Callable[[], None]:
    if not step:

        def forward() -> None:
            with torch.inference_mode():
                module(*arguments)

        return forward
    leaves = [x.detach().requires_grad_() for x in arguments]
    wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]

    def forward_and_backward() -> None:
        results = list(_leaves(module(*leaves)))
        torch.autograd.grad(
            results, wanted, [torch.ones_like(r) for r in results], allow_unused=True
        )

    return forward_and_backward


def _timed(launch: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one of `count` launches."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        launch()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def in_turns(launcher: Launcher, device: torch.device, seconds: float) -> Pair:
    """Times both, in turns, for `seconds` in all: a machine that changes does so for both."""
    slowest = 0.0
    for ours in (False, True):
        launch = launcher(ours)
        launch()  # code, workspaces, and cuDNN's search
        slowest = max(slowest, _timed(launch, 1, device))
    count = max(1, round(_READING_S / max(slowest, 1e-9)))
    rounds = max(_FEWEST_READINGS, round(seconds / (2 * count * max(slowest, 1e-9))))
    readings: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds):
        for ours in (False, True) if turn % 2 == 0 else (True, False):
            readings[ours].append(_timed(launcher(ours), count, device))
    return Pair(statistics.median(readings[False]), statistics.median(readings[True]))


def _peaks(launcher: Launcher, device: torch.device) -> tuple[int, int] | None:
    """Bytes of one launch at its peak, before and after; None on a CPU, where none are counted."""
    if device.type != "cuda":
        return None
    peaks = []
    for ours in (False, True):
        launch = launcher(ours)
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        launch()
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - start)
    return peaks[0], peaks[1]


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def table(*lines: Sequence[str]) -> str:
    """Lines of cells, in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
