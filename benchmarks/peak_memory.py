# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one FCN-8s training step on the CPU, for three ways to the loss.

    python -m benchmarks.peak_memory
    python -m benchmarks.peak_memory --size 384 --batch 1

The ways differ in what follows the network's scores of stride 8; all give the same loss:

    fused     Scores.cross_entropy: upsample_cross_entropy, what `dilseg train` does
    two ops   upsample_add, then cross_entropy
    torch     F.conv_transpose2d with the fixed bilinear kernel (one group per class), the crop,
              then F.cross_entropy with int64 labels

Each way runs several times, each in a process of its own; the table has the median and the range.
A small step comes first, so that libraries are loaded and
buffers of fixed size are there. Then writing 5 to /proc/self/clear_refs sets the high-water mark of
resident memory (VmHWM) back to what is resident now (VmRSS), the measured part runs once, and the
figure is the new high-water mark less what was resident before. Two parts are measured:

    loss part   from the scores of stride 8 to their gradient: loss, forward and backward
    whole step  forward and backward of network and loss, gradients of all weights included

The optimiser is left out: it is the same for all. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dilseg import functional, models
from dilseg.models import Scores

IGNORE = 255


def fused(scores: Scores, target: Tensor) -> Tensor:
    """The loss as `dilseg train` computes it."""
    return scores.cross_entropy(target, ignore_index=IGNORE)


def two_ops(scores: Scores, target: Tensor) -> Tensor:
    """Logits at image size, then their loss, each by an op of this package."""
    return functional.cross_entropy(scores.logits(), target, ignore_index=IGNORE)


def torch_ops(scores: Scores, target: Tensor) -> Tensor:
    """The published deconvolution and crop, and the loss, by torch."""
    stride = scores.scale_factor
    assert stride is not None
    classes = scores.scores.shape[1]
    kernel = models.bilinear_kernel(2 * stride, dtype=scores.scores.dtype)
    full = F.conv_transpose2d(
        scores.scores, kernel.expand(classes, 1, -1, -1), stride=stride, groups=classes
    )
    # The padless deconvolution starts half a stride before the map that `origin` counts from.
    (top, left), (h, w) = (o + stride // 2 for o in scores.origin), scores.size
    return F.cross_entropy(
        full[:, :, top : top + h, left : left + w], target.long(), ignore_index=IGNORE
    )


WAYS: dict[str, Callable[[Scores, Tensor], Tensor]] = {
    "fused": fused,
    "two ops": two_ops,
    "torch": torch_ops,
}


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: this needs Linux.")


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which resident memory rises, at most, above its present level while `work` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed must not be there to be used again
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before)


def measure(
    way: str, *, backbone: str, fc_channels: int, classes: int, size: int, batch: int
) -> dict[str, float]:
    """Measure one way in this process.

    Returns:
        Bytes of both parts, and the loss, which is the same for every way.
    """
    torch.manual_seed(0)
    model = models.fcn8s(classes, backbone, fc_channels=fc_channels, dropout=0.0)
    with torch.no_grad():  # scores start at zero: give every class its own
        for layer in (model.score_fr, model.score_pool4, model.score_pool3):
            layer.weight.normal_(std=0.01)

    def sample(n: int, side: int) -> tuple[Tensor, Tensor]:
        target = torch.randint(0, classes, (n, side, side), dtype=torch.uint8)
        target[:, :3] = IGNORE
        return torch.randn(n, 3, side, side), target

    loss_of = WAYS[way]
    images, target = sample(1, 64)
    loss_of(model.scores(images), target).backward()
    model.zero_grad(set_to_none=True)

    images, target = sample(batch, size)
    with torch.no_grad():
        scores = model.scores(images)
        loss = loss_of(scores, target).item()
    scores.scores.requires_grad_()
    loss_part = peak_of(lambda: loss_of(scores, target).backward())
    whole_step = peak_of(lambda: loss_of(model.scores(images), target).backward())
    return {"loss_part": loss_part, "whole_step": whole_step, "loss": loss}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """The measurements as a Markdown table in MiB: median (least to most) of the runs."""

    def cell(values: list[float]) -> str:
        low, middle, high = (round(f(values) / 2**20) for f in (min, statistics.median, max))
        return f"{middle} MiB" + (f" ({low} to {high})" if low < high else "")

    lines = ["| way to the loss | loss part | whole step |", "|---|---|---|"]
    for way, runs in rows.items():
        parts = (cell([run[part] for run in runs]) for part in ("loss_part", "whole_step"))
        lines.append(f"| {way} | {' | '.join(parts)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every way in a process of its own and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peak_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backbone", default="vgg16", help="vgg16 (default) or demo")
    parser.add_argument("--fc-channels", type=int, default=512, help="width of fc6, fc7 (512)")
    parser.add_argument("--classes", type=int, default=21, help="(21)")
    parser.add_argument("--size", type=int, default=512, help="side of the images (512)")
    parser.add_argument("--batch", type=int, default=2, help="images (2)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--runs", type=int, default=3, help="processes per way (3)")
    parser.add_argument("--way", choices=list(WAYS), help="measure one here, and print JSON")
    args = parser.parse_args(argv)
    if args.way is not None:
        torch.set_num_threads(args.threads)
        row = measure(
            args.way,
            backbone=args.backbone,
            fc_channels=args.fc_channels,
            classes=args.classes,
            size=args.size,
            batch=args.batch,
        )
        print(json.dumps(row))
        return 0
    given = [
        word
        for name in ("backbone", "fc_channels", "classes", "size", "batch", "threads")
        for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))
    ]
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.runs):
        for way, runs in rows.items():
            command = [sys.executable, "-m", "benchmarks.peak_memory", *given, "--way", way]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout))
    losses = ", ".join(f"{runs[0]['loss']:.6f}" for runs in rows.values())
    print(
        f"FCN-8s, {args.backbone}, fc_channels={args.fc_channels}, {args.classes} classes, "
        f"{args.batch} x {args.size} x {args.size}, float32, torch {torch.__version__}, "
        f"{args.threads} threads, {args.runs} runs\n\n{table(rows)}\n\n"
        f"losses: {losses}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
