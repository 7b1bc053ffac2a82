# SPDX-License-Identifier: Apache-2.0
"""Real trainings of FCN-8s and DilatedNet: dilseg's operators against torch's.

    python -m benchmarks.training --root data/camvid                    # CamVid in SegNet's layout
    python -m benchmarks.training --data shapes                         # generated images, no files
    python -m benchmarks.training --root data/camvid --weights vgg16.pth --out training.json

Every training is `dilseg.engine.train` with the same seed and schedule, in a process of its own:
on torch's operators (torch_ops.py), twice on dilseg's, and on torch's in the other memory format,
which rounds otherwise. What is told of each:

    mean IoU     of the final weights, on whole validation images
    images/s     by the median step after a warm-up, from one optimiser step to the next: reading
                 and augmenting included, by the device's clock on a GPU
    peak memory  until the last step: what torch's allocator gave out on a GPU; elsewhere by how
                 much the process's resident memory rose (Linux only)

and of each network: by how much the loss curves on dilseg's and on torch's operators differ at
most, relative to torch's; by how much the two on torch's, since training makes rounding grow, and
that is how far it does; and whether the two trainings on dilseg's operators ended in the same
weights, bit for bit. If not, the exit code is 1. Sizes: `gpu` trains VGG-16 in bfloat16 for minutes
on a GPU; `cpu`, the default without one, a small backbone on small crops.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import comparison, machine, markdown, results_file, timing
from benchmarks.torch_ops import torch_ops
from dilseg.data import open_dataset
from dilseg.engine import configure, load_checkpoint, train
from dilseg.engine.files import write_json

FORMAT = "dilseg-training"
VERSION = 1
MODELS = ("fcn8s", "dilatednet")
# The trainings of one network, in this order: whose operators, and whether in the other format.
RUNS = (("torch", False), ("dilseg", False), ("dilseg", False), ("torch", True))
# Steps that are not timed: they allocate, and choose algorithms.
WARMUP = 5
LEAST_STEPS = WARMUP + 3

# Arguments of `dilseg train`, by size: of every network, then of one.
SIZES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "cpu": (
        {"device": "cpu", "backbone": "demo", "steps": 50, "batch_size": 4, "crop": (120, 160),
         "channels_last": True, "limit": 100, "eval_limit": 20, "cache": 1.0},
        {"fcn8s": {"steps": 100}},
    ),
    "gpu": (
        {"device": "cuda", "backbone": "vgg16", "steps": 300, "batch_size": 4, "amp": "bf16",
         "channels_last": True, "cache": 2.0},
        {"dilatednet": {"crop": (256, 256)}},
    ),
}  # fmt: skip

_STATUS = Path("/proc/self/status")
_ROW_KEYS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "ops": (str,),
    "layout": (str,),
    "mean_iou": (float, int),
    "images_per_s": (float, int),
    "step_s": (dict,),
    "peak_bytes": (int, type(None)),
    "losses": (list,),
    "weights_sha256": (str,),
}


class StepClock:
    """Called after every optimiser step; notes when it ended, and the peak of memory until then."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: list[Any] = []
        self._resident = None if self._cuda else _resident("VmRSS")
        self.peak_bytes: int | None = None

    def __call__(self, *_: object) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
            self.peak_bytes = torch.cuda.max_memory_allocated()
        else:
            self._marks.append(time.perf_counter())
            peak = _resident("VmHWM")
            if peak is not None and self._resident is not None:
                self.peak_bytes = peak - self._resident

    def seconds(self) -> list[float]:
        """Of every step after the warm-up."""
        if self._cuda:
            torch.cuda.synchronize()
        pairs = zip(self._marks[WARMUP - 1 :], self._marks[WARMUP:], strict=False)
        if self._cuda:
            return [start.elapsed_time(end) * 1e-3 for start, end in pairs]
        return [end - start for start, end in pairs]


def _resident(field: str) -> int | None:
    """VmRSS or VmHWM of this process, in bytes; None where the kernel does not say."""
    try:
        return timing.proc_bytes(_STATUS, field)
    except (OSError, ValueError):
        return None


def run(ops: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Trains once, in this process, on the operators of `ops` ("torch" or "dilseg").

    Args:
        ops: Whose operators.
        arguments: Of `dilseg.engine.configure`, without `out`.

    Returns:
        The row of the record.

    Raises:
        KeyboardInterrupt: The training was interrupted.
    """
    operators = torch_ops() if ops == "torch" else contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="dilseg-training-") as folder, operators:
        # One evaluation and one checkpoint, at the end, between no two steps that are timed.
        last = {"eval_every": arguments["steps"], "save_every": arguments["steps"]}
        config = configure(**arguments, **last, out=folder)
        clock = StepClock(config.device)
        hook = register_optimizer_step_post_hook(clock)
        try:
            result = train(config)
        finally:
            hook.remove()
        if result["status"] != "finished":
            raise KeyboardInterrupt
        with (Path(folder) / "log.csv").open(encoding="utf-8", newline="") as log:
            losses = [float(line["loss"]) for line in csv.DictReader(log)]
        weights = load_checkpoint(Path(folder) / "checkpoint.pt", lazy=True)["state_dict"]
        digest = _digest(weights)
    step_s = timing.summarise(clock.seconds())
    scores = result["evaluations"][-1]
    return {
        "model": config.model,
        "ops": ops,
        "layout": "channels_last" if config.channels_last else "nchw",
        "mean_iou": scores["mean_iou"],
        "pixel_accuracy": scores["pixel_accuracy"],
        "images_per_s": config.batch_size * config.accumulate / step_s.p50,
        "step_s": step_s.as_dict(),
        "peak_bytes": clock.peak_bytes,
        "losses": losses,
        "weights_sha256": digest,
    }


def _digest(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()


def run_apart(ops: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Does what `run` does in a fresh process, whose memory nothing else has touched."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run, ops, arguments).result()


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the rows of each network say together, of those that have all of them."""
    compared = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        if len(of_model) < len(RUNS):
            continue
        theirs, ours, again, reformatted = of_model
        compared.append(
            {
                "model": model,
                "loss_difference": _difference(ours["losses"], theirs["losses"]),
                "torch_loss_difference": _difference(reformatted["losses"], theirs["losses"]),
                "bitwise_equal": all(ours[k] == again[k] for k in ("weights_sha256", "losses")),
            }
        )
    return compared


def _difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest, relative to the reference."""
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


def validate(record: object, name: str = "training") -> dict[str, Any]:
    """Returns `record` when it is a training record of this version.

    Raises:
        ValueError: it is not; the message names the place, what belongs there, what stands there.
    """

    def expect(condition: bool, where: str, wanted: str, got: object) -> None:
        if not condition:
            raise ValueError(f"{name}{where}: expected {wanted}, but got {str(got)[:80]!r}")

    expect(isinstance(record, dict), "", "a JSON object", record)
    assert isinstance(record, dict)
    for key, value in (("format", FORMAT), ("version", VERSION)):
        expect(record.get(key) == value, f".{key}", repr(value), record.get(key))
    described = record.get("machine")
    named = isinstance(described, dict) and isinstance(described.get("name"), str)
    expect(named, ".machine.name", "a device name", described)
    for key in ("status", "started", "written", "data", "size"):
        expect(isinstance(record.get(key), str), f".{key}", "a text", record.get(key))
    for key in ("rows", "comparisons"):
        expect(isinstance(record.get(key), list), f".{key}", "a list", record.get(key))
    for index, row in enumerate(record["rows"]):
        where = f".rows[{index}]"
        expect(isinstance(row, dict), where, "an object", row)
        for key, types in _ROW_KEYS.items():
            wanted = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            expect(isinstance(row.get(key), types), f"{where}.{key}", wanted, row.get(key))
        median = row["step_s"].get("p50")
        positive = isinstance(median, float) and math.isfinite(median) and median > 0
        expect(positive, f"{where}.step_s.p50", "a positive number of seconds", median)
    return record


def render(record: dict[str, Any]) -> str:
    """The record in Markdown: caption, a line per training, what the lines say together.

    Raises:
        ValueError: `record` is malformed.
    """
    validate(record)
    lines = [
        (
            row["model"],
            row["ops"],
            row["layout"],
            f"{100 * row['mean_iou']:.2f} %",
            f"{row['images_per_s']:.3g}",
            f"{1e3 * row['step_s']['p50']:.3g} ms",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB",
            f"{row['losses'][-1]:.4f}",
        )
        for row in record["rows"]
    ]
    header = ("network", "operators", "layout", "mean IoU", "images/s", "step", "peak memory",
              "last loss")  # fmt: skip
    blocks = [
        f"{comparison.caption(record)} Data {record['data']}, size {record['size']}.",
        markdown.table(header, lines),
    ]
    for said in record["comparisons"]:
        equal = "the same weights, bit for bit" if said["bitwise_equal"] else "other weights"
        blocks.append(
            f"{said['model']}: the loss curve on dilseg's operators is at most "
            f"{said['loss_difference']:.2g} away from that on torch's, relative to it; torch's "
            f"own, in the other layout, {said['torch_loss_difference']:.2g}. Two trainings on "
            f"dilseg's operators ended in {equal}."
        )
    return "\n\n".join(blocks)


def make_arguments(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The arguments of the training of every network, checked.

    Raises:
        ValueError: some do not go together; the message names the option.
        FileNotFoundError: the data set or the weights are not there.
    """
    if options.data != "shapes" and options.root is None:
        raise ValueError(
            f"--root: give the folder of {options.data} (train.txt, train/, trainannot/, ...), or "
            "--data shapes for generated images."
        )
    if options.size == "gpu" and not torch.cuda.is_available():
        raise ValueError("--size gpu: PyTorch sees no GPU on this machine; use --size cpu.")
    common, own = SIZES[options.size]
    given = {name: getattr(options, name) for name in ("data", "root", "weights", "threads")}
    if options.steps is not None:
        given["steps"] = options.steps
    arguments = {
        model: {**common, **own.get(model, {}), **given, "model": model} for model in MODELS
    }
    for each in arguments.values():
        configure(**each)
    for split in ("train", "val"):
        open_dataset(options.data, options.root, split)
    if options.weights is not None and not Path(options.weights).is_file():
        raise FileNotFoundError(f"--weights {options.weights}: there is no such file.")
    return arguments


def _command(options: argparse.Namespace) -> list[str]:
    """The command line; of files and folders the name alone, since where they lie says nothing."""
    words = ["python", "-m", "benchmarks.training"]
    for name in ("data", "root", "size", "steps", "weights", "threads"):
        value = getattr(options, name)
        if value is not None:
            told = Path(value).name if name in ("root", "weights") else str(value)
            words += [f"--{name}", told]
    return words


def measure(options: argparse.Namespace, arguments: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Trains everything; returns the record, and keeps the file of `--out` up to date with it."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)  # the record tells this process's
    places = ("root", "weights")
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "status": "partial",
        "started": results_file.now(),
        "written": results_file.now(),
        "machine": machine.describe(SIZES[options.size][0]["device"]),
        "command": _command(options),
        "data": options.data,
        "size": options.size,
        "warmup": WARMUP,
        "arguments": {
            model: {name: value for name, value in each.items() if name not in places}
            for model, each in arguments.items()
        },
        "rows": [],
        "comparisons": [],
    }
    for model, each in arguments.items():
        for ops, reformatted in RUNS:
            print(f"== {model} on the operators of {ops}", flush=True)
            channels_last = each["channels_last"] != reformatted
            record["rows"].append(run_apart(ops, {**each, "channels_last": channels_last}))
            record["comparisons"] = compare(record["rows"])
            record["written"] = results_file.now()
            if len(record["rows"]) == len(arguments) * len(RUNS):
                record["status"] = "complete"
            if options.out is not None:
                write_json(options.out, validate(record))
    return record


def _steps(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < LEAST_STEPS:
        raise argparse.ArgumentTypeError(
            f"expected a count of at least {LEAST_STEPS}, of which {WARMUP} are not timed, but got "
            f"{text!r}"
        )
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit code 1 where a repetition differs, 2 for a mistake, 130 where stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--data", choices=("camvid", "shapes"), default="camvid")
    parser.add_argument("--root", metavar="DIR", help="folder of the data set")
    parser.add_argument("--size", choices=tuple(SIZES), default=default, help=f"here: {default}")
    parser.add_argument("--steps", type=_steps, help="of each training (default: the size's)")
    parser.add_argument("--weights", metavar="FILE", help="VGG-16 to start from, with --size gpu")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="record (JSON) to write")
    options = parser.parse_args(argv)
    try:
        record = measure(options, make_arguments(options))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"benchmarks.training: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.training: stopped", file=sys.stderr)
        return 130
    print(f"\n{render(record)}")
    return 0 if all(said["bitwise_equal"] for said in record["comparisons"]) else 1


if __name__ == "__main__":
    sys.exit(main())
