# SPDX-License-Identifier: Apache-2.0
"""Who is measured: dilseg and its rivals, on identical tensors, under identical flags.

A job is one row: a case, a mode, a provider, a precision and a layout. `prepare` turns a job into
something to launch, and `verify` refuses to time a wrong answer.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import dilseg
from benchmarks.cases import (
    OPS,
    Case,
    ConvCase,
    CrossEntropyCase,
    ModelCase,
    UpsampleAddCase,
    UpsampleArgmaxCase,
    UpsampleCrossEntropyCase,
)
from benchmarks.timing import Launch
from benchmarks.torch_ops import torch_ops
from dilseg.models import Scores, SegmentationModel

Tensors = dict[str, torch.Tensor]
Forward = Callable[[Case, Tensors], torch.Tensor]

IGNORE = 255
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Precision:
    """A dtype, and torch's switch for fp32 convolutions that every provider runs under."""

    dtype: torch.dtype
    conv: str = "ieee"


PRECISIONS: dict[str, Precision] = {
    "float32": Precision(torch.float32),
    "tf32": Precision(torch.float32, conv="tf32"),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "float64": Precision(torch.float64),
}

# Floor of the error rule |ours - fp64| <= 2 |torch - fp64| + floor * max|fp64|: a few roundings of
# the stored result, for the cases where torch happens to be exact.
_FLOOR = {
    torch.float64: 1e-14,
    torch.float32: 4 * 2.0**-24,
    torch.bfloat16: 2 * 2.0**-8,
    torch.float16: 2 * 2.0**-11,
}
# The same for the gradients of a whole network, relative to their norm. Where a pooling sees two
# values, or a ReLU zero, within a rounding, the last bit decides which way a pixel's gradient goes:
# one that goes the other way is no wrong answer, and more than rounding.
_KINKS = 0.01


class _Network(torch.nn.Module):
    """What is measured of a network: labels of images or, given labels, their mean loss."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: torch.Tensor, target: torch.Tensor | None = None, *, logits: bool = False
    ) -> torch.Tensor:
        scores = self.model.scores(images)
        assert isinstance(scores, Scores)
        if logits:
            return scores.logits()
        if target is not None:
            return scores.cross_entropy(target, ignore_index=IGNORE)
        return scores.labels(dtype=torch.int64)


@functools.cache
def _network(case: ModelCase) -> _Network:
    """Without values: the parameters are tensors of the job, as a layer's weights are."""
    return _Network(case.build())


def _run_network(network: _Network, tensors: Tensors, **options: bool) -> torch.Tensor:
    parameters = {
        f"model.{name}": value for name, value in tensors.items() if name not in ("input", "target")
    }
    inputs = (tensors["input"], tensors.get("target"))
    output: torch.Tensor = torch.func.functional_call(network, parameters, inputs, options)
    return output


def _dilseg_forward(case: Case, tensors: Tensors) -> torch.Tensor:
    if isinstance(case, ConvCase):
        return dilseg.functional.dilated_conv2d(
            tensors["input"],
            tensors["weight"],
            tensors.get("bias"),
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
        )
    if isinstance(case, UpsampleAddCase):
        return dilseg.functional.upsample_add(
            tensors["input"], tensors.get("skip"), scale_factor=case.scale
        )
    if isinstance(case, UpsampleCrossEntropyCase):
        return dilseg.functional.upsample_cross_entropy(
            tensors["input"], tensors["target"], scale_factor=case.scale, ignore_index=IGNORE
        )
    if isinstance(case, UpsampleArgmaxCase):
        labels = dilseg.functional.upsample_argmax(tensors["input"], scale_factor=case.scale)
        assert isinstance(labels, torch.Tensor)
        return labels
    if isinstance(case, ModelCase):
        return _run_network(_network(case), tensors)
    return dilseg.functional.cross_entropy(tensors["input"], tensors["target"], ignore_index=IGNORE)


def _torch_forward(case: Case, tensors: Tensors) -> torch.Tensor:
    if isinstance(case, ConvCase):
        return F.conv2d(
            tensors["input"],
            tensors["weight"],
            tensors.get("bias"),
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
        )
    if isinstance(case, ModelCase):
        with torch_ops():
            return _run_network(_network(case), tensors)
    input = tensors["input"]
    if isinstance(case, (UpsampleAddCase, UpsampleCrossEntropyCase, UpsampleArgmaxCase)):
        input = F.interpolate(input, scale_factor=case.scale, mode="bilinear", align_corners=False)
    if isinstance(case, UpsampleAddCase):
        return input + tensors["skip"] if "skip" in tensors else input
    if isinstance(case, UpsampleArgmaxCase):
        return input.argmax(1)
    return F.cross_entropy(input, tensors["target"], ignore_index=IGNORE)


def _torch_autocast_forward(case: Case, tensors: Tensors) -> torch.Tensor:
    input = tensors["input"]
    with torch.autocast(input.device.type, dtype=input.dtype):
        return _torch_forward(case, tensors)


@functools.cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    # Without fullgraph, torch.compile may leave a part, or past its limit of recompilations all of
    # it, to eager, and the row would be eager's under another name. With it, that is an error.
    return torch.compile(function, dynamic=False, fullgraph=True)


def _torch_compile_forward(case: Case, tensors: Tensors) -> torch.Tensor:
    if isinstance(case, ModelCase):
        with torch_ops():
            return _compiled(_run_network)(_network(case), tensors)
    return _compiled(_torch_forward)(case, tensors)


@dataclass(frozen=True)
class Provider:
    """One way of computing the same thing."""

    name: str
    description: str
    forward: Forward
    ops: tuple[str, ...] = OPS
    devices: tuple[str, ...] = ("cpu", "cuda")
    half_only: bool = False
    cudnn_benchmark: bool = True
    graph: bool = False  # captured once as a CUDA graph, then replayed


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("dilseg", "this package", _dilseg_forward),
        Provider("torch", "PyTorch eager; on a GPU with cuDNN's benchmark mode on", _torch_forward),
        Provider(
            "torch_heuristic",
            "PyTorch eager with cuDNN's benchmark mode off, its default",
            _torch_forward,
            ops=(ConvCase.op,),
            devices=("cuda",),
            cudnn_benchmark=False,
        ),
        Provider(
            "torch_autocast",
            "PyTorch eager under autocast, which computes the loss in fp32",
            _torch_autocast_forward,
            ops=(CrossEntropyCase.op, UpsampleCrossEntropyCase.op),
            devices=("cuda",),
            half_only=True,
        ),
        Provider("dilseg_graph", "this package, as a CUDA graph", _dilseg_forward, graph=True),
        Provider("torch_graph", "PyTorch eager, as a CUDA graph", _torch_forward, graph=True),
        Provider("torch_compile", "torch.compile, static shapes", _torch_compile_forward),
    )
}
# torch_compile spends seconds of compiling per row, so it is measured where asked for.
DEFAULT_PROVIDERS = ("dilseg", "torch", "torch_heuristic", "torch_autocast")


@dataclass(frozen=True)
class Job:
    """One row of the table to be."""

    case: Case
    mode: str
    provider: Provider
    precision: str
    layout: str
    device: str

    @property
    def group(self) -> str:
        """What is compared with each other: everything but the provider."""
        return f"{self.case.op}/{self.case.name}/{self.mode}/{self.precision}/{self.layout}"

    @property
    def id(self) -> str:
        """The job's name on a pytest command line."""
        parts = (self.case.name, self.mode, self.precision, self.layout, self.provider.name)
        return "-".join(parts)


def make_jobs(
    cases: list[Case],
    device: str,
    *,
    providers: tuple[str, ...],
    precisions: tuple[str, ...],
    layouts: tuple[str, ...],
) -> list[Job]:
    """Every combination that means something, providers of one group next to each other.

    Raises:
        ValueError: an unknown provider, precision or layout.
    """
    for kind, names, known in (
        ("provider", providers, PROVIDERS),
        ("precision", precisions, PRECISIONS),
        ("layout", layouts, LAYOUTS),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"no {kind} {name!r}; there are {', '.join(known)}")
    jobs = []
    for case in cases:
        for precision in precisions:
            if precision == "tf32" and case.op not in (ConvCase.op, ModelCase.op):
                continue  # the switch changes nothing there
            half = PRECISIONS[precision].dtype in (torch.bfloat16, torch.float16)
            for layout in layouts:
                for mode in case.modes:
                    for provider in (PROVIDERS[name] for name in providers):
                        if case.op not in provider.ops or device not in provider.devices:
                            continue
                        if provider.half_only and not half:
                            continue
                        jobs.append(Job(case, mode, provider, precision, layout, device))
    return jobs


@contextlib.contextmanager
def flags(job: Job) -> Iterator[dict[str, object]]:
    """Sets the global switches for a job and yields them.

    They are the same for every provider, save cuDNN's benchmark mode.
    """
    conv = PRECISIONS[job.precision].conv
    # Any: torch replaces these modules by objects, of which type checkers know nothing.
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    before = (cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision,
              cudnn.rnn.fp32_precision, matmul.fp32_precision)  # fmt: skip
    # The rnn switch is set along with conv's because torch refuses to read its older flag while the
    # two differ.
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = matmul.fp32_precision = conv
    cudnn.benchmark, cudnn.deterministic = job.provider.cudnn_benchmark, False
    try:
        yield {
            "fp32_precision": conv,
            "cudnn_benchmark": job.provider.cudnn_benchmark,
            "deterministic": False,
        }
    finally:
        (cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision,
         cudnn.rnn.fp32_precision, matmul.fp32_precision) = before  # fmt: skip


def make_inputs(job: Job) -> Tensors:
    """Random normal tensors of the case, equal for every provider.

    Not constants: those draw less power on a GPU and run faster.
    """
    case, device = job.case, torch.device(job.device)
    dtype, layout = PRECISIONS[job.precision].dtype, LAYOUTS[job.layout]
    generator = torch.Generator(device=device).manual_seed(20160427)
    shapes = case.shapes()
    classes, gain, bias = shapes["input"][1], 1.0, 1.0
    if isinstance(case, ModelCase):
        # Behind many ReLUs He's weights and small biases leave scores that differ between pixels.
        classes, gain, bias = case.num_classes, 2.0, 0.1
        shapes |= case.parameters()
        if job.mode == "forward":
            del shapes["target"]
    tensors: Tensors = {}
    for name, shape in shapes.items():
        if name == "output":
            continue
        if name == "target":
            labels = torch.randint(0, classes, shape, generator=generator, device=device)
            void = torch.rand(shape, generator=generator, device=device)
            assert isinstance(case, (CrossEntropyCase, UpsampleCrossEntropyCase, ModelCase))
            tensors[name] = labels.masked_fill_(void < case.ignored, IGNORE)
            continue
        value = torch.randn(shape, generator=generator, device=device)
        if name.endswith("weight"):
            # Keeps outputs near 1, as a trained layer does.
            value *= math.sqrt(gain / math.prod(shape[1:]))
        elif name.endswith("bias"):
            value *= bias
        value = value.to(dtype)
        tensors[name] = value.to(memory_format=layout) if value.dim() == 4 else value
    return tensors


def _leaves(job: Job, tensors: Tensors) -> list[str]:
    if job.mode == "forward":
        return []
    if job.mode == "grad_input":
        return ["input"]
    if isinstance(job.case, ModelCase):
        return list(job.case.parameters())
    names = ["weight", "bias"] if job.mode == "grad_weight" else ["input", "weight", "bias", "skip"]
    return [name for name in names if name in tensors]


def prepare(job: Job, tensors: Tensors, forward: Forward | None = None) -> Launch:
    """A function of no arguments that launches the job once and returns a tuple of tensors.

    Gradients come from `torch.autograd.grad` on a graph made beforehand, so every provider pays
    the same for autograd. A provider of CUDA graphs replays that launch.
    """
    if forward is None and job.provider.graph:
        return _captured(job, tensors)
    forward = forward or job.provider.forward
    if forward is _torch_compile_forward:
        # What it compiled for the rows before counts towards its limit of recompilations.
        torch.compiler.reset()
    names = _leaves(job, tensors)
    case = job.case
    if not names:

        def launch_forward() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (forward(case, tensors),)

        return launch_forward

    tensors = {
        name: value.detach().requires_grad_(name in names) for name, value in tensors.items()
    }
    leaves = [tensors[name] for name in names]
    output = forward(case, tensors)
    generator = torch.Generator(device=output.device).manual_seed(7)
    # Rounded to the job's dtype whatever the output's is, so that the fp64 reference gets the very
    # same numbers.
    grad_output = torch.randn(output.shape, generator=generator, device=output.device)
    grad_output = grad_output.to(PRECISIONS[job.precision].dtype).to(output.dtype)
    if output.dim() == 4:
        grad_output = grad_output.to(memory_format=LAYOUTS[job.layout])

    if job.mode == "step":
        del output

        def launch_step() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(forward(case, tensors), leaves, grad_output)

        return launch_step

    def launch_gradient() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, leaves, grad_output, retain_graph=True)

    return launch_gradient


def _captured(job: Job, tensors: Tensors) -> Launch:
    """Replays a launch; its results are in the same memory every time."""
    # One stream for all of it: autograd runs a gradient on the stream of its forward pass.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch = prepare(job, tensors, job.provider.forward)
        for _ in range(3):  # what is loaded, searched or allocated at first may not be captured
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = launch()

    def replay() -> tuple[torch.Tensor, ...]:
        graph.replay()
        return results

    return replay


@dataclass(frozen=True)
class Check:
    """What `verify` found: largest errors against fp64, ours and eager torch's; largest value."""

    max_error: float
    torch_max_error: float
    max_value: float


def _key(job: Job) -> tuple[object, ...]:
    return job.case, job.mode, job.precision, job.layout, job.device


@dataclass(frozen=True)
class _Reference:
    """fp64 results on the rounded inputs, and eager torch's error in the job's own dtype.

    `scores` are in fp64 at full resolution, where results are labels: they are compared by them.
    """

    exact: tuple[torch.Tensor, ...]
    torch_errors: list[float]
    scores: torch.Tensor | None


_reference_cache: dict[tuple[object, ...], _Reference] = {}


def _reference(job: Job, tensors: Tensors) -> _Reference:
    """Only the latest one is kept: the providers of a group run after each other."""
    key = _key(job)
    if key not in _reference_cache:
        _reference_cache.clear()
        wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        if isinstance(job.case, ModelCase):
            with _no_cudnn_benchmark():  # trying algorithms in fp64 is slower than using one
                _reference_cache[key] = _network_reference(job, job.case, tensors, wide)
            return _reference_cache[key]
        scores = None
        if isinstance(job.case, UpsampleArgmaxCase):
            scores = F.interpolate(
                wide["input"], scale_factor=job.case.scale, mode="bilinear", align_corners=False
            )
            exact: tuple[torch.Tensor, ...] = (scores.amax(1),)
        else:
            exact = prepare(job, wide, _torch_forward)()
        same_dtype = prepare(job, tensors, _torch_forward)()
        if scores is not None:
            same_dtype = tuple(_score_of(scores, labels) for labels in same_dtype)
        errors = [_max_abs(r - t.double()) for r, t in zip(exact, same_dtype, strict=True)]
        _reference_cache[key] = _Reference(exact, errors, scores)
    return _reference_cache[key]


@contextlib.contextmanager
def _no_cudnn_benchmark() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = False
    try:
        yield
    finally:
        cudnn.benchmark = before


def _network_reference(job: Job, case: ModelCase, tensors: Tensors, wide: Tensors) -> _Reference:
    if job.mode == "forward":
        with torch.no_grad(), torch_ops():
            logits, exact_logits = (
                _run_network(_network(case), values, logits=True) for values in (tensors, wide)
            )
        # A class is named wrongly by as much as two logits are off together.
        error = 2.0 * _max_abs(logits.double() - exact_logits)
        return _Reference((exact_logits.amax(1),), [error], exact_logits)
    gradients, exact = (prepare(job, values, _torch_forward)() for values in (tensors, wide))
    return _Reference(exact, [_worst_distance(gradients, exact)], None)


def _worst_distance(values: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    """The largest norm of an error relative to that of the exact value."""
    pairs = zip(values, exact, strict=True)
    # Of the tensor, since Python's max takes no notice of a nan.
    return torch.stack([(v.double() - wide).norm() / wide.norm() for v, wide in pairs]).max().item()


def _score_of(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The fp64 score of the class that each label names.

    A rounding may swap two classes that are equally good, so labels are not compared one by one:
    what counts is how much worse the chosen class is than the best.

    Raises:
        ValueError: these are not int64 labels, one per pixel, of classes that there are.
    """
    wanted = (scores.shape[0], *scores.shape[2:])
    if labels.dtype != torch.int64 or tuple(labels.shape) != wanted:
        raise ValueError(
            f"expected int64 labels of shape {list(wanted)}, but got {labels.dtype} of shape "
            f"{list(labels.shape)}; a wrong answer is not timed"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise ValueError(
            f"expected labels in [0, {scores.shape[1]}), but got {low} to {high}; a wrong answer "
            "is not timed"
        )
    return scores.gather(1, labels.unsqueeze(1)).squeeze(1)


def _max_abs(value: torch.Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def _expect_within(
    job: Job, what: str, error: float, allowed: float, torch_error: float, largest: float
) -> None:
    if not error <= allowed:
        raise ValueError(
            f"{job.group}: {what} of {job.provider.name} is off by {error:.3g} from fp64, where "
            f"{allowed:.3g} is allowed (torch itself is off by {torch_error:.3g}, the largest "
            f"value is {largest:.3g}); a wrong answer is not timed"
        )


def verify(job: Job, tensors: Tensors, results: tuple[torch.Tensor, ...]) -> Check:
    """Compares results with fp64 before anything is timed.

    The rule: no further from fp64 than twice eager torch in the same dtype, plus a few roundings
    of the largest value. The error of a label is how far its class's score lies below the best. The
    error of a network's gradients is the worst relative error of one of them, by norms.

    Raises:
        ValueError: a result breaks the rule or is not finite.
    """
    wanted = _reference(job, tensors)
    if isinstance(job.case, ModelCase) and job.mode == "step":
        error, (torch_error,) = _worst_distance(results, wanted.exact), wanted.torch_errors
        _expect_within(job, "a gradient", error, 2.0 * torch_error + _KINKS, torch_error, 1.0)
        return Check(error, torch_error, 1.0)
    if wanted.scores is not None:
        results = tuple(_score_of(wanted.scores, labels) for labels in results)
    dtype = PRECISIONS[job.precision].dtype
    worst = Check(0.0, 0.0, 0.0)
    for index, (reference, result, torch_error) in enumerate(
        zip(wanted.exact, results, wanted.torch_errors, strict=True)
    ):
        error = _max_abs(result.double() - reference)
        largest = _max_abs(reference)
        allowed = 2.0 * torch_error + _FLOOR[dtype] * largest
        _expect_within(job, f"result {index}", error, allowed, torch_error, largest)
        if error >= worst.max_error:
            worst = Check(error, torch_error, largest)
    return worst
