# SPDX-License-Identifier: Apache-2.0
"""Whole networks in the benchmarks: on torch's operators, as cases, and in training."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.camvid import make_camvid
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cases, providers, training
from benchmarks.cases import ModelCase
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


# --- cases ---------------------------------------------------------------------------------------

(SMOKE,) = cases.select(ModelCase.op, "smoke")
DILATED = dataclasses.replace(SMOKE, name="dilated", model="dilatednet", n=1)


@pytest.mark.parametrize("set_name", ["cpu", "gpu", "first"])
def test_every_family_of_networks_is_measured(set_name: str) -> None:
    families = {build.__module__ for build in models.MODELS.values()}
    assert len(families) == 2
    chosen = cases.select(ModelCase.op, set_name)
    assert {models.MODELS[case.model].__module__ for case in chosen} == families


@pytest.mark.parametrize(
    ("name", "gmac"), [("fcn8s", 139), ("frontend", 527)]
)  # of docs/training.md: 480 x 360
def test_published_networks_have_the_published_cost(name: str, gmac: float) -> None:
    case = dataclasses.replace(
        cases.MODEL_CASES[0], model=name, num_classes=11, h=360, w=480, options=()
    )
    assert case.flops("forward") / 2e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize("case", [SMOKE, DILATED], ids=["fcn8s", "dilatednet"])
def test_network_cost_equals_a_naive_count(case: ModelCase) -> None:
    flops: list[int] = []

    def count(conv: nn.Conv2d, _: Any, output: torch.Tensor) -> None:
        flops.append(2 * output.numel() * conv.weight[0].numel())

    model = case.build()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    images = torch.empty(case.shapes()["input"], device="meta")
    output = model.segment(images)
    assert (case.n, *output.shape[2:]) == case.shapes()["output"]
    assert case.flops("forward") == sum(flops)
    assert case.flops("step") == 3 * sum(flops) - flops[0]  # no gradient of the images
    parameters = sum(p.numel() for p in model.parameters())
    labels = 8 * case.n * case.h * case.w
    assert case.bytes("forward", 4) == 4 * (images.numel() + parameters) + labels
    assert case.bytes("step", 2) == 2 * (images.numel() + 2 * parameters) + labels


def test_a_narrow_network_has_every_layer_narrow() -> None:
    narrow = next(case for case in cases.MODEL_CASES if case.narrowing == 4).parameters()
    assert narrow["conv1_1.weight"] == (16, 3, 3, 3)
    assert narrow["conv5_3.weight"] == (128, 128, 3, 3)
    assert narrow["fc7.weight"] == (1024, 1024, 1, 1)


# --- providers -----------------------------------------------------------------------------------


def _job(case: ModelCase, mode: str, provider: str = "dilseg") -> providers.Job:
    return providers.Job(case, mode, providers.PROVIDERS[provider], "float32", "nchw", "cpu")


@pytest.mark.parametrize("case", [SMOKE, DILATED], ids=["fcn8s", "dilatednet"])
@pytest.mark.parametrize("mode", ModelCase.modes)
def test_a_network_is_measured_on_our_operators_and_on_torchs(case: ModelCase, mode: str) -> None:
    job = _job(case, mode)
    tensors = providers.make_inputs(job)
    assert ("target" in tensors) == (mode == "step")
    results = providers.prepare(job, tensors)()
    providers.verify(job, tensors, results)
    rival = _job(case, mode, "torch")
    with NoOperatorOfOurs():
        providers.verify(rival, tensors, providers.prepare(rival, tensors)())
    if mode == "forward":
        (labels,) = results
        assert labels.dtype == torch.int64
    else:
        assert [tuple(g.shape) for g in results] == list(case.parameters().values())
        assert all(gradient.abs().max() > 0 for gradient in results)


def test_wrong_labels_of_a_network_are_refused() -> None:
    job = _job(SMOKE, "forward")
    tensors = providers.make_inputs(job)
    (labels,) = providers.prepare(job, tensors)()
    for wrong in (labels.roll(1, 2), torch.full_like(labels, 3)):
        with pytest.raises(ValueError, match="a wrong answer is not timed"):
            providers.verify(job, tensors, (wrong,))


def test_a_wrong_gradient_of_a_network_is_refused() -> None:
    job = _job(SMOKE, "step")
    tensors = providers.make_inputs(job)
    gradients = providers.prepare(job, tensors)()
    for index in (0, 5, len(gradients) - 1):
        for wrong in (gradients[index] * 1.02, torch.full_like(gradients[index], math.nan)):
            results = (*gradients[:index], wrong, *gradients[index + 1 :])
            with pytest.raises(ValueError, match=r"a gradient of dilseg is off by .* not timed"):
                providers.verify(job, tensors, results)


def test_a_network_is_measured_in_tf32_too() -> None:
    jobs = providers.make_jobs(
        [SMOKE], "cuda", providers=("dilseg", "torch"), precisions=("tf32",), layouts=("nchw",)
    )
    assert [job.id for job in jobs] == [
        f"smoke_model-{mode}-tf32-nchw-{provider}"
        for mode in ("forward", "step")
        for provider in ("dilseg", "torch")
    ]


# --- training ------------------------------------------------------------------------------------

TINY = {
    "device": "cpu", "backbone": "demo", "fc_channels": 16, "steps": training.LEAST_STEPS,
    "channels_last": True, "batch_size": 2, "crop": (24, 32), "limit": 4, "eval_limit": 2,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of a second, in this process."""
    pytest.importorskip("matplotlib", reason="the trainer draws its curve with matplotlib")
    monkeypatch.setitem(training.SIZES, "cpu", (TINY, {}))
    monkeypatch.setattr(training, "run_apart", training.run)


def _row(model: str, ops: str, **changes: Any) -> dict[str, Any]:
    row = {
        "model": model, "ops": ops, "layout": "nchw", "mean_iou": 0.5, "images_per_s": 8.0,
        "step_s": {"p20": 0.1, "p50": 0.25, "p80": 0.5, "samples": 3}, "peak_bytes": 3 * 2**20,
        "losses": [2.0, 1.0], "weights_sha256": "aa",
    }  # fmt: skip
    return row | changes


def test_two_networks_are_trained_on_both_operators_and_told_about_in_one_file(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "somewhere" / "camvid", tmp_path / "new" / "training.json"
    root.mkdir(parents=True)
    make_camvid(root)
    assert training.main(["--root", str(root), "--size", "cpu", "--out", str(out)]) == 0
    printed, text = capsys.readouterr().out, out.read_text(encoding="utf-8")
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert str(tmp_path) not in text
    record = training.validate(json.loads(text))
    assert record["status"] == "complete"
    assert record["command"][3:] == ["--data", "camvid", "--root", "camvid", "--size", "cpu"]
    assert record["machine"]["load_average"]
    assert printed.endswith(f"{training.render(record)}\n")
    assert [(row["model"], row["ops"], row["layout"]) for row in record["rows"]] == [
        (model, ops, layout)
        for model in ("fcn8s", "dilatednet")
        for ops, layout in (
            ("torch", "channels_last"),
            ("dilseg", "channels_last"),
            ("dilseg", "channels_last"),
            ("torch", "nchw"),
        )
    ]
    for row in record["rows"]:
        assert len(row["losses"]) == training.LEAST_STEPS
        assert len(set(row["losses"])) > 1
        assert row["step_s"]["samples"] == training.LEAST_STEPS - training.WARMUP
        assert row["images_per_s"] == pytest.approx(2 / row["step_s"]["p50"])
        assert 0.0 <= row["mean_iou"] <= 1.0
    for model, said in zip(("fcn8s", "dilatednet"), record["comparisons"], strict=True):
        theirs, ours, again, _ = (row for row in record["rows"] if row["model"] == model)
        assert said["bitwise_equal"]
        assert ours["weights_sha256"] == again["weights_sha256"] != theirs["weights_sha256"]
        assert max(said["loss_difference"], said["torch_loss_difference"]) < 1e-3
        bound = 1.001 * said["loss_difference"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=bound)


def test_steps_on_a_gpu_are_timed_by_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Steps of 100 ms, 200 ms, ..., as a GPU's events tell them."""

        count = 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.count += 1
            self.time = 50.0 * Event.count * (Event.count + 1)

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 * Event.count)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(Event.count))
    clock = training.StepClock("cuda")
    for _ in range(training.WARMUP + 3):
        clock(None, (), {})
    assert clock.seconds() == pytest.approx([0.6, 0.7, 0.8])
    assert waited == [8]
    assert clock.peak_bytes == 800


def test_a_training_on_torchs_operators_runs_none_of_ours(tiny: None) -> None:
    arguments = {**TINY, "data": "shapes", "model": "dilatednet"}
    with NoOperatorOfOurs() as mode:
        training.run("torch", arguments)
    assert mode.passed > 1000
    with NoOperatorOfOurs(), pytest.raises(AssertionError, match="dilseg::"):
        training.run("dilseg", arguments)


def test_a_training_in_a_process_of_its_own_counts_its_memory() -> None:
    pytest.importorskip("matplotlib", reason="the trainer draws its curve with matplotlib")
    row = training.run_apart("dilseg", {**TINY, "data": "shapes", "model": "fcn8s"})
    if Path("/proc/self/status").exists():
        assert 2**20 < row["peak_bytes"] < 2**30


def test_a_repetition_that_ends_in_other_weights_is_told_and_ends_in_code_1(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = iter(range(8))

    def once(ops: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return _row(arguments["model"], ops, weights_sha256="ab"[next(count) == 6])

    monkeypatch.setattr(training, "run_apart", once)
    assert training.main(["--data", "shapes", "--size", "cpu"]) == 1
    printed = capsys.readouterr().out
    first, second = (line for line in printed.splitlines() if "Two trainings" in line)
    assert "is at most 0 away from that on torch's" in first
    assert "the same weights, bit for bit" in first
    assert "ended in other weights" in second
    assert "| dilatednet | dilseg | nchw | 50.00 % | 8 | 250 ms | 3 MiB | 1.0000 |" in printed


def test_a_stopped_comparison_keeps_what_was_trained(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = iter([_row("fcn8s", "torch")])

    def once(ops: str, arguments: dict[str, Any]) -> dict[str, Any]:
        for row in rows:
            return row
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run_apart", once)
    out = tmp_path / "t.json"
    assert training.main(["--data", "shapes", "--size", "cpu", "--out", str(out)]) == 130
    assert capsys.readouterr().err == "benchmarks.training: stopped\n"
    record = training.validate(json.loads(out.read_text(encoding="utf-8")))
    assert (record["status"], len(record["rows"])) == ("partial", 1)


def test_loss_curves_are_compared_where_they_differ_most() -> None:
    ours = _row("a", "dilseg", losses=[2.1, 1.02])
    rows = [_row("a", "torch"), ours, ours, _row("b", "torch")]
    assert training.compare(rows) == []  # the last of each is yet to come
    (said,) = training.compare([*rows, _row("a", "torch", losses=[2.0, 0.75])])
    assert said["loss_difference"] == pytest.approx(0.05)
    assert said["torch_loss_difference"] == pytest.approx(0.25)
    assert said["bitwise_equal"]
    rows[2] = _row("a", "dilseg", losses=[2.1, 1.03])
    (said,) = training.compare([*rows, _row("a", "torch")])
    assert not said["bitwise_equal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--root: give the folder of camvid"),
        (["--root", "/nowhere"], "/nowhere"),
        (["--data", "shapes", "--root", "x"], "--root: shapes are generated"),
        (["--data", "shapes", "--weights", "x.pth"], "--weights: VGG-16 weights fit"),
        (["--data", "shapes", "--threads", "0"], "--threads: expected a number >= 1"),
    ],
)
def test_a_mistake_ends_in_one_sentence_before_anything_trains(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main([*arguments, "--size", "cpu"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        training.main(["--data", "shapes", "--steps", "7"])
    assert error.value.code == 2
    assert "at least 8, of which 5 are not timed, but got '7'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_size_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--data", "shapes", "--size", "gpu"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "dilseg-results"}, r"training\.format: expected 'dilseg-training'"),
        ({"version": 2}, r"training\.version: expected 1, but got '2'"),
        ({"machine": {}}, r"training\.machine\.name: expected a device name"),
        ({"data": None}, r"training\.data: expected a text"),
        ({"comparisons": None}, r"training\.comparisons: expected a list"),
        ({"rows": [3]}, r"training\.rows\[0\]: expected an object, but got '3'"),
        ({"rows": [_row("a", "torch", losses=None)]}, r"rows\[0\]\.losses: expected list"),
        (
            {"rows": [_row("a", "torch", step_s={"p50": math.nan})]},
            r"rows\[0\]\.step_s\.p50: expected a positive number of seconds",
        ),
    ],
)
def test_a_malformed_record_is_refused(changes: dict[str, Any], message: str) -> None:
    record = {
        "format": "dilseg-training", "version": 1, "status": "complete", "started": "2030-01-02",
        "written": "2030-01-02", "machine": {"name": "Test GPU"}, "data": "camvid", "size": "gpu",
        "rows": [], "comparisons": [],
    }  # fmt: skip
    training.validate(record)
    with pytest.raises(ValueError, match=message):
        training.render(record | changes)
