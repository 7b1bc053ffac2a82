# SPDX-License-Identifier: Apache-2.0
"""Training, on a CPU, a GPU or several, that can stop at any moment and resume exactly."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dilseg.data import IGNORE, Augmented, SegmentationDataset, class_weights, open_dataset
from dilseg.engine.checkpoint import (
    DataSpec,
    ModelSpec,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    specs,
)
from dilseg.engine.config import TrainConfig, changed_from_recipe, configure, option
from dilseg.engine.console import Progress, say
from dilseg.engine.evaluate import autocast, evaluate_heads
from dilseg.engine.features import StoredFeatures
from dilseg.engine.files import claim, require, write_json
from dilseg.engine.optim import learning_rate_factor, make_optimizer, set_learning_rate
from dilseg.engine.processes import Processes, processes
from dilseg.engine.record import LossLog, Row, draw_curve, environment, now
from dilseg.engine.samples import Cached, Part, TrainingStream, training_transform
from dilseg.models import (
    DilatedNet,
    HeadScores,
    LateFusionFCN,
    Normalization,
    Scores,
    SegmentationModel,
    load_backbone,
    load_stage,
)

__all__ = ["DivergedError", "FinishedError", "SegmentationLoss", "resume_config", "train"]

CHECKPOINT, BEST, LOG, RECORD, CURVE = (
    "checkpoint.pt", "best.pt", "log.csv", "record.json", "curve.png",
)  # fmt: skip

GPU_LOG_INTERVAL = 20
"""Steps whose losses stay on a GPU before they are read together: reading waits for the GPU."""

GPU_WORKERS = 4

CURVE_SECONDS = 10.0
"""Drawing takes tenths of a second, which a run that saves every few steps would feel."""

INITIAL_LOSS_FACTOR = 2.0
"""A first loss above this many ln(classes) is worth a warning: a fair guess has ln(classes)."""

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "root",
        "out",
        "workers",
        "cache",
        "threads",
        "device",
        "save_every",
        "eval_every",
        "eval_limit",
    }
)


class DivergedError(RuntimeError):
    """The loss became nan or infinite."""


class FinishedError(ValueError):
    """A run has done all its steps: there is nothing to resume."""


class SegmentationLoss(nn.Module):
    """A network and its loss in one module: what DistributedDataParallel wraps.

    Args:
        model: A network with `scores`.
        weight: Class weights, float ``[num_classes]``, or None.
        label_smoothing: In [0, 1).
        stored_features: Whether images come as the scores of a DilatedNet's front end.
    """

    def __init__(
        self,
        model: SegmentationModel,
        weight: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        *,
        stored_features: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        self.model = model
        self.stored_features = stored_features
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight, persistent=False)
        # Weight of every possible label of each head: void, and what is no class, weighs nothing.
        classes = list(model.heads.values()) or [model.num_classes]
        weights = torch.ones(sum(classes)) if weight is None else weight
        tables = [F.pad(own, (0, 256 - len(own))) for own in torch.split(weights, classes)]
        self.register_buffer("label_weight", torch.stack(tables), persistent=False)

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy at image resolution, summed over the labelled pixels of this process.

        Where the network's last step is a fixed upsampling, no logits of that size are made. Of
        several heads the losses are added.

        Args:
            images: Normalised float ``[n, c, h, w]``, or with `stored_features` the scores
                ``[n, num_classes, rows, columns]``.
            target: uint8 ``[n, h, w]``, or ``[n, heads, h, w]``; void 255.
        """
        if self.stored_features:
            size = target.shape[-2], target.shape[-1]
            scores: Scores | HeadScores = cast(DilatedNet, self.model).refine(images, size)
        else:
            scores = self.model.scores(images)
        return scores.cross_entropy(
            target,
            cast("torch.Tensor | None", self.weight),
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def target_weight(self, target: torch.Tensor) -> torch.Tensor:
        """What a mean divides by: the summed class weights of the labelled pixels, float64."""
        tables = cast(torch.Tensor, self.label_weight)
        maps = target.unbind(1) if self.model.heads else [target]
        weights = [
            table[labels.long()].sum(dtype=torch.float64)
            for table, labels in zip(tables, maps, strict=True)
        ]
        return torch.stack(weights).sum()


class _Run:
    """The state of one training: everything a checkpoint holds, and the files it writes."""

    def __init__(self, config: TrainConfig, group: Processes) -> None:
        self.config, self.group = config, group
        # A CPU computes for seconds on what it reads in milliseconds; a GPU must not wait.
        default_workers = GPU_WORKERS if group.device.type == "cuda" else 0
        self.workers = default_workers if config.workers is None else config.workers
        self.folder = Path(config.out)
        self.step = 0
        self.evaluations: list[dict[str, Any]] = []
        self.best = -math.inf
        self.first_loss: float | None = None
        self.sessions: list[dict[str, Any]] = []
        self.log: LossLog | None = None
        self._drawn = -math.inf
        self._pending: list[tuple[float, torch.Tensor]] = []

        train_set: SegmentationDataset = open_dataset(config.data, config.root, config.train_split)
        self.train_set = Part(train_set, config.limit) if config.limit else train_set
        self.eval_set: SegmentationDataset | None = None
        if config.eval_every != 0:
            eval_set = open_dataset(config.data, config.root, config.eval_split)
            self.eval_set = Part(eval_set, config.eval_limit) if config.eval_limit else eval_set

        if config.cache is not None:
            self._keep_in_memory(int(config.cache * 2**30))

        torch.manual_seed(config.seed)  # the same fresh weights on every process
        options = config.model_options() | input_options(config, train_set)
        self.model_spec = ModelSpec(config.model, train_set.num_classes, options)
        self.model = self.model_spec.build()
        # Layers that start from scratch beside loaded ones; with nothing loaded there are none.
        self.fresh: frozenset[str] = frozenset()

    def _keep_in_memory(self, budget: int) -> None:
        """Decodes images once, the training's first."""
        started = time.monotonic()
        train_set = self.train_set = Cached(self.train_set, budget)
        kept, size = train_set.kept, train_set.size
        if self.eval_set is not None:
            eval_set = self.eval_set = Cached(self.eval_set, budget - size)
            kept, size = kept + eval_set.kept, size + eval_set.size
        self.say(
            f"{kept} images decoded into {size / 2**30:.2f} GiB of memory "
            f"in {time.monotonic() - started:.1f} s"
        )

    def load_start_weights(self) -> None:
        """Applies --weights or --init."""
        config = self.config
        if config.weights is not None:
            report = load_backbone(self.model, config.weights)
        elif config.init is not None and config.init_hha is not None:
            late = cast(LateFusionFCN, self.model)
            normalizations = []
            for stream, path in ((late.color, config.init), (late.hha, config.init_hha)):
                _, data_spec = specs(load_checkpoint(path, lazy=True))
                normalizations.append(Normalization(data_spec.mean, data_spec.std))
                report = load_stage(stream, path)
                self.say(str(report))
            self.model.normalization = normalizations[0] + normalizations[1]
            return
        elif config.init is not None:
            _, data_spec = specs(load_checkpoint(config.init, lazy=True))
            report = load_stage(self.model, config.init)
            self.model.normalization = Normalization(data_spec.mean, data_spec.std)
        else:
            return
        self.fresh = frozenset(report.fresh)
        self.say(str(report))

    def prepare(self) -> None:
        """Moves everything to the device, freezes what does not train, makes the optimiser."""
        config, group = self.config, self.group
        if config.stage == "context":
            cast(DilatedNet, self.model).front_end.requires_grad_(False)
        self.model.to(group.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        normalization = self.model.normalization
        self.data_spec = DataSpec(
            name=config.data,
            classes=tuple(self.train_set.classes),
            palette=tuple((int(r), int(g), int(b)) for r, g, b in self.train_set.palette.tolist()),
            mean=normalization.mean,
            std=normalization.std,
        )
        weight = None if config.class_weights == "none" else class_weights(self.train_set)
        self.loss = SegmentationLoss(
            self.model, weight, config.label_smoothing, stored_features=config.store_features
        ).to(group.device)
        self.optimizer = make_optimizer(self.model, self.fresh, config)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=config.amp == "fp16")
        self.samples = self._augmented()
        self.stream = TrainingStream(self.samples, config, group, workers=self.workers)
        per_epoch = self.stream.steps_per_epoch
        self.steps = config.steps or cast(int, config.epochs) * per_epoch
        every = 100 if group.device.type == "cpu" else 500
        self.save_every = config.save_every or min(per_epoch, every)
        self.eval_every = per_epoch if config.eval_every is None else config.eval_every
        # Dropout differs between processes: each has its own images, too.
        torch.manual_seed(config.seed + 1_000_003 * group.rank)

    def _augmented(self) -> Augmented:
        """The training images as the network takes them."""
        config = self.config
        transform = training_transform(config, self.data_spec.mean, self.model.output_stride)
        convention = {"mean": self.data_spec.mean, "std": self.data_spec.std}
        if not config.store_features:
            return Augmented(self.train_set, transform, seed=config.seed, **convention)
        return StoredFeatures(
            self.train_set,
            transform,
            self.folder,
            seed=config.seed,
            amp=config.amp,
            channels_last=config.channels_last,
            **convention,
        )

    def wrap(self) -> nn.Module:
        """The module to call: the loss, or its DistributedDataParallel."""
        if self.group.count == 1:
            return self.loss
        ids = [self.group.device.index] if self.group.device.type == "cuda" else None
        # The only buffers are constants, equal everywhere: nothing to broadcast.
        return DistributedDataParallel(self.loss, device_ids=ids, broadcast_buffers=False)

    def say(self, text: str) -> None:
        """Prints on the first process."""
        say(text, quiet=not self.group.is_first)

    # Files -------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes checkpoint.pt; on every process, since each contributes its random state."""
        states = self.group.gather(random_state(self.group.device))
        if not self.group.is_first:
            return
        rows = cast(LossLog, self.log).rows
        save_checkpoint(
            self.folder / CHECKPOINT,
            model=self.model,
            model_spec=self.model_spec,
            data_spec=self.data_spec,
            step=self.step,
            arguments=self.config.as_dict(),
            metrics=self.evaluations[-1] if self.evaluations else None,
            training={
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": states,
                "steps": self.steps,
                "images": len(self.train_set),
                "rows": torch.tensor(rows, dtype=torch.float64).reshape(-1, 4),
                "evaluations": self.evaluations,
                "best": self.best,
                "fresh": sorted(self.fresh),
                "sessions": self.sessions,
            },
        )

    def save_best(self) -> None:
        """Writes best.pt: weights and what is needed to use them, no optimiser."""
        save_checkpoint(
            self.folder / BEST,
            model=self.model,
            model_spec=self.model_spec,
            data_spec=self.data_spec,
            step=self.step,
            arguments=self.config.as_dict(),
            metrics=self.evaluations[-1] if self.evaluations else None,
        )

    def prepare_resume(self, content: Mapping[str, Any]) -> list[Row]:
        """Does for a resumed run what `load_start_weights` and `prepare` do for a new one.

        Returns:
            The rows of the log up to the checkpoint.
        """
        _, data_spec = specs(content)
        self.model.normalization = Normalization(data_spec.mean, data_spec.std)
        self.fresh = frozenset(content["training"]["fresh"])
        self.prepare()
        return self._restore(content)

    def _restore(self, content: Mapping[str, Any]) -> list[Row]:
        training = content["training"]
        if len(training["random"]) != self.group.count:
            raise ValueError(
                f"{self.folder}: was started with {len(training['random'])} processes, but this is "
                f"a resume with {self.group.count}; give torchrun the same number."
            )
        if training["images"] != len(self.train_set):
            raise ValueError(
                f"{self.folder}: was started on {training['images']} training images, but the data "
                f"now has {len(self.train_set)}; an exact resume needs the same ones."
            )
        self.model.load_state_dict(content["state_dict"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.scaler.load_state_dict(training["scaler"])
        self.step = int(content["step"])
        self.evaluations = list(training["evaluations"])
        self.best = float(training["best"])
        self.sessions = list(training["sessions"])
        rows = [(int(s), int(e), lr, loss) for s, e, lr, loss in training["rows"].tolist()]
        self.first_loss = rows[0][3] if rows else None
        restore_random_state(training["random"][self.group.rank], self.group.device)
        return rows

    def write_record(self, status: str) -> None:
        """Writes record.json; and curve.png, unless that was done moments ago."""
        if not self.group.is_first:
            return
        self.sessions[-1].update(end=now(), last_step=self.step)
        rows = cast(LossLog, self.log).rows
        write_json(
            self.folder / RECORD,
            {
                "status": status,
                "arguments": self.config.as_dict(),
                "recipe": self.config.recipe,
                "changed_from_recipe": changed_from_recipe(self.config),
                "model": dataclasses.asdict(self.model_spec),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "trained_parameters": sum(
                    p.numel() for p in self.model.parameters() if p.requires_grad
                ),
                "train_images": len(self.train_set),
                "eval_images": None if self.eval_set is None else len(self.eval_set),
                "processes": self.group.count,
                "steps": self.steps,
                "steps_per_epoch": self.stream.steps_per_epoch,
                "step": self.step,
                "first_loss": rows[0][3] if rows else None,
                "last_loss": rows[-1][3] if rows else None,
                "best_mean_iou": self.best,
                "evaluations": self.evaluations,
                "sessions": self.sessions,
            },
        )
        if status != "running" or time.monotonic() - self._drawn > CURVE_SECONDS:
            draw_curve(self.folder / CURVE, rows, self.evaluations)
            self._drawn = time.monotonic()

    # Steps -------------------------------------------------------------------------------------

    def take_step(
        self, module: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """One optimiser step on this process's share of its batches."""
        config = self.config
        factor = learning_rate_factor(self.step, self.steps, config.schedule, config.warmup)
        set_learning_rate(self.optimizer, config.lr * factor)
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        for images, target in batches:
            last = len(losses) == config.accumulate - 1
            with _memory_advice(images), _synchronised(module, last):
                losses.append(self._add_gradient(module, images, target))
        with _memory_advice(images):  # the first step allocates the optimiser's state
            if config.clip_norm is not None:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(
                    (p for p in self.model.parameters() if p.requires_grad), config.clip_norm
                )
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self._pending.append((config.lr * factor, torch.stack(losses).mean()))
        self.step += 1

    def _add_gradient(
        self, module: nn.Module, images: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Adds one batch's gradient; returns its loss, this process's share of the mean."""
        config, device = self.config, self.group.device
        images = images.to(device, non_blocking=True)
        target = target.to(device, non_blocking=True)
        if self.group.count > 1 and config.crop is None:
            images, target = self._padded_alike(images, target)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        # Averages are over all processes: each divides its sum by the total, not by its own part,
        # so that a step equals that of one process with all the images.
        weight = self.group.sum(self.loss.target_weight(target))
        weight = torch.where(weight > 0, weight, 1.0)  # nothing labelled: loss 0, as Caffe does
        with autocast(device, config.amp):
            total = module(images, target)
        divisor = weight if config.loss == "mean" else float(config.batch_size)
        # DistributedDataParallel averages gradients over the processes: undo that.
        objective = total * self.group.count / (divisor * config.accumulate)
        self.scaler.scale(objective.to(total.dtype)).backward()
        share: torch.Tensor = total.detach() / weight
        return share

    def _padded_alike(
        self, images: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pads this process's share as `collate` would the whole batch.

        What surrounds an image reaches its scores, so a share padded to its own largest image alone
        would train otherwise than the same images in one process. It costs no time: the process of
        the largest image is waited for anyway.
        """
        own = [*images.shape[-2:], *target.shape[-2:]]
        largest = self.group.largest(torch.tensor(own, device=images.device)).tolist()
        h, w, target_h, target_w = (a - b for a, b in zip(largest, own, strict=True))
        if h or w:
            images = F.pad(images, (0, w, 0, h))
        if target_h or target_w:
            target = F.pad(target, (0, target_w, 0, target_h), value=IGNORE)
        return images, target

    def read_losses(self, stop: bool) -> bool:
        """Writes the pending losses to the log; returns whether any process wants to stop.

        Raises:
            DivergedError: A loss is nan or infinite.
        """
        flag = torch.tensor([float(stop)], device=self.group.device, dtype=torch.float64)
        losses = [loss.double().reshape(1) for _, loss in self._pending]
        values = self.group.sum(torch.cat([flag, *losses])).tolist()
        first = self.step - len(self._pending)
        per_epoch = self.stream.steps_per_epoch
        rows: list[Row] = [
            (first + i + 1, (first + i) // per_epoch, lr, loss)
            for i, ((lr, _), loss) in enumerate(zip(self._pending, values[1:], strict=True))
        ]
        self._pending.clear()
        bad = next((row for row in rows if not math.isfinite(row[3])), None)
        good = rows if bad is None else rows[: rows.index(bad)]
        if self.log is not None:
            self.log.append(good)
        if bad is not None:
            raise DivergedError(self._divergence(f"the loss became {bad[3]} at step {bad[0]}"))
        if self.first_loss is None and rows:
            self.first_loss = rows[0][3]
            self._judge_first_loss()
        return bool(values[0] > 0)

    def check_weights(self) -> None:
        """Keeps a checkpoint of nan from taking the place of a good one.

        Raises:
            DivergedError: A weight is nan or infinite: the last step did it, its loss was finite.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise DivergedError(
                self._divergence(f"a weight became nan or infinite at step {self.step}")
            )

    def _divergence(self, what: str) -> str:
        text = f"{what}: lower --lr (now {self.config.lr:g}) or raise --warmup"
        if self.config.loss == "sum":
            text += "; with --loss sum, --lr must be about the pixels of an image times smaller"
        path = self.folder / CHECKPOINT
        kept = load_step(path) if self.group.is_first and path.is_file() else None
        return text + (f"; {path} still holds step {kept}." if kept is not None else ".")

    def _judge_first_loss(self) -> None:
        classes = list(self.model.heads.values()) or [self.model.num_classes]
        guess = sum(map(math.log, classes)) / len(classes)  # the loss is a mean over their pixels
        loss = cast(float, self.first_loss)
        self.say(f"first loss {loss:.4f}; a uniform guess over the classes has {guess:.4f}")
        if loss > INITIAL_LOSS_FACTOR * guess:
            self.say(
                "warning: the first loss is far above that of a guess: the start weights or the "
                "input normalisation do not fit, or the score layers start too large."
            )

    def score(self) -> None:
        """Evaluates, keeps the best weights."""
        if self.eval_set is None:
            return
        matrices = evaluate_heads(
            self.model,
            self.eval_set,
            group=self.group,
            mean=self.data_spec.mean,
            std=self.data_spec.std,
            amp=self.config.amp,
            channels_last=self.config.channels_last,
            workers=self.workers,
            label=f"eval {self.config.eval_split}",
        )
        heads = list(self.model.heads)
        scores = matrices[0].scores()
        for head, matrix in zip(heads[1:], matrices[1:], strict=True):
            scores |= {f"{key}_{head}": value for key, value in matrix.scores().items()}
        epoch = self.step / self.stream.steps_per_epoch
        self.evaluations.append({"step": self.step, "epoch": round(epoch, 4), **scores})
        others = [
            f"; {head}: mean IoU {100 * scores[f'mean_iou_{head}']:.2f} %" for head in heads[1:]
        ]
        self.say(
            f"step {self.step} (epoch {epoch:.2f}): mean IoU {100 * scores['mean_iou']:.2f} %, "
            f"pixel accuracy {100 * scores['pixel_accuracy']:.2f} %{''.join(others)}"
        )
        if scores["mean_iou"] > self.best:
            self.best = scores["mean_iou"]
            if self.group.is_first:
                self.save_best()

    def loop(self) -> str:
        """Runs the steps that are left; returns how it ended: finished or interrupted."""
        module = self.wrap()
        cpu = self.group.device.type == "cpu"
        interval = 1 if cpu else GPU_LOG_INTERVAL
        batches = self.stream.batches(self.step, self.steps)
        quiet = not self.group.is_first
        self._set_mode()
        if isinstance(self.samples, StoredFeatures):
            self.samples.store(cast(DilatedNet, self.model).front_end, self.group)
        with (
            _stop_signals() as stop,
            Progress(self.steps, "train", done=self.step, quiet=quiet) as progress,
        ):
            while self.step < self.steps:
                self.take_step(module, islice(batches, self.config.accumulate))
                last = self.step == self.steps
                due_save = last or self.step % self.save_every == 0
                due_score = bool(self.eval_every) and (last or self.step % self.eval_every == 0)
                due_read = due_save or due_score or self.step % interval == 0
                # Several processes must read together; one alone can stop at once.
                due_read |= self.first_loss is None or (stop.is_set() and self.group.count == 1)
                stopping = due_read and self.read_losses(stop.is_set())
                progress.advance(1, self._note())
                if due_save or due_score:
                    self.check_weights()
                if due_score:
                    self.score()
                if due_save or due_score or stopping:
                    self.save()
                    self.write_record("finished" if last else "running")
                if stopping and not last:
                    return "interrupted"
        return "finished"

    def _note(self) -> str:
        rows = self.log.rows if self.log is not None else []
        return f"loss {rows[-1][3]:.4f}, lr {rows[-1][2]:.3g}" if rows else ""

    def _set_mode(self) -> None:
        self.model.train()
        if self.config.stage == "context":  # A frozen front end answers as it will in use.
            cast(DilatedNet, self.model).front_end.eval()


def input_options(config: TrainConfig, dataset: SegmentationDataset) -> dict[str, Any]:
    """The options of a network that follow from its data: further channels, several heads.

    Raises:
        ValueError: The network cannot take these images or answer these questions.
    """
    options: dict[str, Any] = {}
    late = config.model == "fcn32s-late"
    takes = (6,) if late else (3, 4) if config.model.startswith("fcn") else (3,)
    if dataset.channels not in takes:
        raise ValueError(
            f"--data {config.data}: its images have {dataset.channels} channels, but "
            f"{config.model} takes {' or '.join(map(str, takes))}; six (colour and HHA) are for "
            "fcn32s-late, four (colour and depth) for the other FCNs."
        )
    if dataset.channels == 4:
        options["in_channels"] = 4
    if dataset.heads:
        if late or not config.model.startswith("fcn"):
            raise ValueError(
                f"--data {config.data}: has {len(dataset.heads)} label maps per image, for as many "
                f"heads, which {config.model} has not; use fcn32s, fcn16s or fcn8s."
            )
        options["heads"] = {name: head.num_classes for name, head in dataset.heads.items()}
    return options


def _synchronised(module: nn.Module, yes: bool) -> AbstractContextManager[Any]:
    """Lets a backward pass add up gradients over the processes, or only on this one."""
    if yes or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[Any], module.no_sync())


@contextmanager
def _memory_advice(images: torch.Tensor) -> Iterator[None]:
    """Says what to do about too little GPU memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        n, _, h, w = images.shape
        raise RuntimeError(
            f"not enough GPU memory for a step on {n} images of {h} x {w} pixels: lower "
            "--batch-size, or give --crop or --amp bf16."
        ) from error


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turns the first SIGINT or SIGTERM into an event; a second one acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for which, handler in previous.items():
            signal.signal(which, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield event
    finally:
        restore()


def load_step(path: Path) -> int:
    """The step a checkpoint was written at."""
    return int(load_checkpoint(path, lazy=True)["step"])


def _tuples(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Pairs of numbers come from the command line and from JSON as lists."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
    }


def resume_config(out: str | Path, **given: object) -> TrainConfig:
    """The configuration of the run in `out`, with the arguments that may change on resuming.

    Args:
        out: The run folder.
        given: Arguments given now; None stands for "not given".

    Raises:
        FileNotFoundError: There is no checkpoint in the folder.
        ValueError: An argument differs from the run's; the message names it and both values.
        FinishedError: The run is finished.
    """
    path = Path(out) / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no checkpoint to resume from; start without --resume."
        )
    content = load_checkpoint(path, lazy=True)
    if "training" not in content:
        raise ValueError(f"{path}: holds weights only and cannot be resumed.")
    arguments = _tuples(content["arguments"])
    stored = TrainConfig(**arguments)
    changes: dict[str, Any] = {"out": str(out)}
    for name, value in _tuples(given).items():
        if value is None or value == arguments.get(name):
            continue
        lengthens = name in ("epochs", "steps") and stored.schedule == "constant"
        if name not in MAY_CHANGE_ON_RESUME and not lengthens:
            raise ValueError(
                f"{option(name)} {value}: the run in {out} has {arguments.get(name)}; leave the "
                "option out to resume it, or start another run with another --out."
            )
        changes[name] = value
    if "epochs" in changes:
        changes["steps"] = None
    elif "steps" in changes:
        changes["epochs"] = None
    # A run goes on with the values it has, whatever its recipe says by now.
    config = configure(**{**arguments, **changes, "recipe": None})
    config = dataclasses.replace(config, recipe=stored.recipe)
    steps = int(content["training"]["steps"])
    if int(content["step"]) >= steps and not {"epochs", "steps"} & set(changes):
        raise FinishedError(
            f"{out}: this run is finished (step {steps} of {steps}), there is nothing to resume."
        )
    return config


def _refuse_old_run(folder: Path) -> None:
    old = [name for name in (CHECKPOINT, BEST) if (folder / name).exists()]
    if old:
        raise ValueError(
            f"{folder}: already holds a run ({old[0]}); give --resume to go on with it, "
            "--overwrite to replace it, or another --out."
        )


def _clear(folder: Path) -> None:
    """Takes away what an earlier run left, so that no file of it passes for one of the new run."""
    folder.mkdir(parents=True, exist_ok=True)
    stale = [folder / name for name in (CHECKPOINT, BEST, LOG, RECORD, CURVE)]
    for path in (*stale, *folder.glob("eval-*.json")):
        path.unlink(missing_ok=True)
    for features in folder.glob("features-*"):
        shutil.rmtree(features)


def _set_determinism(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cudnn.deterministic = config.deterministic


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Trains a network and leaves checkpoint.pt, best.pt, log.csv, record.json and curve.png.

    The same call serves one process and several under torchrun. Killed at any moment, it resumes
    from ``checkpoint.pt`` and continues with the same losses, bit for bit on the same machine.

    Args:
        config: From `configure`, or from `resume_config` to go on with a run.
        resume: Go on from ``checkpoint.pt``.
        overwrite: Replace the run that is in the folder.

    Returns:
        ``status`` (finished or interrupted), ``step``, ``steps``, ``evaluations``, ``best``.

    Raises:
        ValueError: Arguments that do not fit data, model or folder, or a folder in which another
            process trains.
        FileNotFoundError: A missing data, weights or checkpoint file.
        DivergedError: The loss became nan or infinite; the last checkpoint is kept.
        ImportError: A package of the `commands` extra is missing.
    """
    # Before the run folder is touched and hours of work begin, not after them.
    require("matplotlib.figure", "the loss curve")
    if sys.stderr.isatty():
        require("tqdm", "the progress bar")
    _set_determinism(config)
    with processes(config.device) as group, ExitStack() as claimed:
        folder = Path(config.out)
        problem: Exception | None = None
        if group.is_first:
            try:
                claimed.enter_context(claim(folder))
                if not (resume or overwrite):
                    _refuse_old_run(folder)
            except (ValueError, OSError) as error:
                problem = error
        group.agree(problem)
        return _train(config, group, resume)


def _train(config: TrainConfig, group: Processes, resume: bool) -> dict[str, Any]:
    run = _Run(config, group)
    if not resume:
        run.load_start_weights()
        run.prepare()
        rows: list[Row] = []
    else:
        content = load_checkpoint(run.folder / CHECKPOINT)
        rows = run.prepare_resume(content)
    if run.step >= run.steps:
        raise ValueError(f"{run.folder}: has done step {run.step} of {run.steps} already.")
    if group.is_first:
        if not resume:
            _clear(run.folder)  # only now, when data, weights and arguments have proved good
        run.log = LossLog(run.folder / LOG, rows)
        run.sessions.append(
            {
                "start": now(),
                "first_step": run.step,
                "process_id": os.getpid(),
                "environment": environment(group.device),
            }
        )
        run.write_record("running")
    if not resume:
        run.save()  # from here on a kill at any moment leaves something to resume
    run.say(
        f"{config.model} ({config.backbone}) on {config.data}: {len(run.train_set)} images, "
        f"{run.steps} steps of {config.batch_size * config.accumulate}, "
        f"{sum(p.numel() for p in run.model.parameters() if p.requires_grad):,} parameters, "
        f"{group.device.type} x {group.count}; run folder {run.folder}"
        + (f"; resumed at step {run.step}" if resume else "")
    )
    try:
        status = run.loop()
        if group.is_first:
            if status == "finished" and not (run.folder / BEST).exists():
                run.save_best()  # nothing was evaluated: the last weights are all there is
            run.write_record(status)
    except Exception as error:
        if group.is_first:
            run.write_record(f"stopped: {error}")
        raise
    finally:
        if run.log is not None:
            run.log.close()
    if status == "interrupted":
        run.say(f"stopped at step {run.step}; go on with: dilseg train --resume --out {run.folder}")
    return {
        "status": status,
        "step": run.step,
        "steps": run.steps,
        "evaluations": run.evaluations,
        "best": None if math.isinf(run.best) else run.best,
    }
