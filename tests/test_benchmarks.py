# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: cost models, clocks, reports that refuse nonsense, the GPU job."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.results import results as _results
from helpers.results import row as _row
from helpers.results import times as _times

import dilseg
from benchmarks import (
    cases,
    comparison,
    goals,
    gpu_job,
    machine,
    markdown,
    providers,
    report,
    results_file,
    timing,
)
from benchmarks.cases import (
    ConvCase,
    CrossEntropyCase,
    UpsampleAddCase,
    UpsampleArgmaxCase,
    UpsampleCrossEntropyCase,
)

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# --- cases ---------------------------------------------------------------------------------------


def test_every_case_is_named_once_and_has_a_source() -> None:
    names = [(case.op, case.name) for case in cases.CASES]
    assert len(names) == len(set(names))
    for case in cases.CASES:
        assert len(case.source) > 10, case.name
        assert case.sets, case.name
        assert case.sets <= set(cases.SETS), case.name


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("set_name", cases.SETS)
def test_every_set_covers_every_op(op: str, set_name: str) -> None:
    chosen = goals.SETS[set_name].goals if set_name in goals.SETS else ()
    goals_speak_of_it = op in {goal.op for goal in chosen}
    assert bool(cases.select(op, set_name)) == (set_name not in goals.SETS or goals_speak_of_it)


def test_every_op_has_a_benchmark_file() -> None:
    files = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert files == set(cases.OPS)


# What a module of operators offers beside them: how a convolution would be run, and its dataclass.
NOT_OPS = {"DilatedConv2dPlan", "dilated_conv2d_plan"}


def test_every_public_op_is_measured_in_every_mode_against_torch() -> None:
    ops = set(dilseg.functional.__all__)
    assert ops >= NOT_OPS
    assert ops - NOT_OPS == set(cases.OPS) - {cases.ModelCase.op}
    for op in cases.OPS:
        for device, set_name in (("cpu", "quick"), ("cuda", "gpu")):
            jobs = providers.make_jobs(
                cases.select(op, set_name),
                device,
                providers=("dilseg", "torch"),
                precisions=("float32",),
                layouts=("nchw",),
            )
            measured = {(job.mode, job.provider.name) for job in jobs}
            modes = next(case for case in cases.CASES if case.op == op).modes
            assert measured == set(itertools.product(modes, ("dilseg", "torch"))), op


@pytest.mark.parametrize(("op", "set_name"), [("matmul", "cpu"), ("cross_entropy", "huge")])
def test_unknown_selection_names_the_known_ones(op: str, set_name: str) -> None:
    with pytest.raises(ValueError, match=r"matmul.*dilated_conv2d|huge.*smoke"):
        cases.select(op, set_name)


@pytest.mark.parametrize("case", cases.CONV_CASES, ids=lambda case: case.name)
def test_convolution_cases_are_valid_convolutions(case: ConvCase) -> None:
    assert case.c_in % case.groups == 0
    assert case.c_out % case.groups == 0
    shapes = case.shapes()
    with torch.device("meta"):
        output = torch.nn.functional.conv2d(
            torch.empty(shapes["input"]),
            torch.empty(shapes["weight"]),
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
        )
    assert tuple(output.shape) == shapes["output"]


def test_published_layers_have_the_published_cost() -> None:
    by_name = {case.name: case for case in cases.CASES}
    gflop = {
        "vgg_conv5_d2": 19.33,
        "fc6_7x7_d4": 841.8,
        "fc7_1x1": 137.4,
        "aspp_d12_33": 10.28,
        "aspp_d12_65": 39.87,
        "resnet_l4_d4_65": 19.94,
        "context_large_l6_d16": 16.65,
        "depthwise960_d2_65": 0.07,
    }
    for name, expected in gflop.items():
        assert by_name[name].flops("forward") / 1e9 == pytest.approx(expected, rel=0.05), name


def test_convolution_flops_equal_a_naive_count() -> None:
    case = next(case for case in cases.CONV_CASES if case.name == "smoke_conv")
    h_out, w_out = case.output_size
    count = 0
    for _ in itertools.product(range(case.n), range(case.c_out), range(h_out), range(w_out)):
        for _ in itertools.product(
            range(case.c_in // case.groups), range(case.kernel), range(case.kernel)
        ):
            count += 2  # one multiply, one add; a padding tap counts
    assert case.flops("forward") == case.flops("grad_input") == case.flops("grad_weight") == count
    assert case.flops("step") == 3 * count


def test_convolution_bytes_equal_the_tensors() -> None:
    case = next(case for case in cases.CONV_CASES if case.name == "smoke_conv")
    tensors = {name: torch.empty(shape) for name, shape in case.shapes().items()}
    size = {name: tensor.numel() * 4 for name, tensor in tensors.items()}
    forward = size["input"] + size["weight"] + size["bias"] + size["output"]
    assert case.bytes("forward", 4) == forward
    assert case.bytes("grad_input", 4) == forward - size["bias"]
    assert case.bytes("grad_weight", 4) == forward
    assert case.bytes("step", 4) == 3 * forward - size["bias"]


def test_upsample_cost_equals_a_naive_count() -> None:
    case = UpsampleAddCase(
        name="tiny", source="a test", sets=frozenset(), n=1, c=2, h_in=2, w_in=3, scale=2
    )
    flops = 0
    for _ in range(1 * 2 * 4 * 6):
        flops += 6 + 3 + 1  # h0*(w0*a + w1*b) + h1*(w0*c + w1*d), then + skip
    assert case.flops("forward") == flops
    values_in, values_out = 2 * 2 * 3, 2 * 4 * 6
    assert case.bytes("forward", 2) == 2 * (values_in + 2 * values_out)
    assert case.bytes("grad_input", 2) == 2 * (values_in + values_out)
    plain = UpsampleAddCase(
        name="tiny",
        source="a test",
        sets=frozenset(),
        n=1,
        c=2,
        h_in=2,
        w_in=3,
        scale=2,
        skip=False,
    )
    assert plain.flops("forward") == flops - values_out
    assert plain.bytes("forward", 2) == plain.bytes("grad_input", 2)


def test_loss_bytes_are_twelve_per_logit_in_fp32_beside_the_labels() -> None:
    case = CrossEntropyCase(name="tiny", source="a test", sets=frozenset(), n=1, c=3, h=4, w=5)
    assert case.bytes("step", 4) == 12 * 60 + 2 * 20 * (8 + 4)
    assert case.flops("step") == 2 * case.flops("forward") == 2 * 4 * 60


def test_upsampled_loss_cost_is_that_of_both_ops_without_the_map_between() -> None:
    sizes = {"n": 2, "c": 3, "h_in": 4, "w_in": 5}
    fused = UpsampleCrossEntropyCase(
        name="tiny", source="a test", sets=frozenset(), scale=2, **sizes
    )
    upsample = UpsampleAddCase(
        name="tiny", source="a test", sets=frozenset(), scale=2, skip=False, **sizes
    )
    loss = CrossEntropyCase(name="tiny", source="a test", sets=frozenset(), n=2, c=3, h=8, w=10)
    assert fused.shapes() == {"input": (2, 3, 4, 5), "target": (2, 8, 10)}
    for mode in fused.modes:
        assert fused.flops(mode) == upsample.flops(mode) + loss.flops(mode)
    scores, labels = 4 * 2 * 3 * 4 * 5, 8 * 2 * 8 * 10
    assert fused.bytes("forward", 4) == scores + labels
    assert fused.bytes("step", 4) == scores + labels + scores
    assert fused.bytes("step", 4) < loss.bytes("step", 4)


def test_upsampled_argmax_cost_equals_a_naive_count() -> None:
    case = UpsampleArgmaxCase(
        name="tiny", source="a test", sets=frozenset(), n=2, c=3, h_in=4, w_in=5, scale=2
    )
    assert case.flops("forward") == 2 * 3 * 8 * 10 * (6 + 3 + 1)
    assert case.bytes("forward", 2) == 2 * (2 * 3 * 4 * 5) + 8 * (2 * 8 * 10)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="no mode 'backward'; its modes are forward"):
        cases.CASES[0].flops("backward")


# --- timing --------------------------------------------------------------------------------------


def test_quantiles_and_summary() -> None:
    readings = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert timing.quantile(readings, 0.5) == 3.0
    assert timing.quantile(readings, 0.125) == pytest.approx(1.5)
    summary = timing.summarise(readings)
    assert summary.as_dict() == pytest.approx(
        {"p20": 1.8, "p25": 2.0, "p50": 3.0, "p75": 4.0, "p80": 4.2, "samples": 5}
    )
    assert timing.summarise([*readings, 1e6]).p50 == pytest.approx(
        3.5
    )  # an outlier hardly moves it
    with pytest.raises(ValueError, match="no readings"):
        timing.quantile([], 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        timing.quantile(readings, 1.5)


@pytest.mark.parametrize("launch_s", [1e-6, 1e-4, 3e-3, 0.5, 20.0])
def test_plan_keeps_to_its_limits(launch_s: float) -> None:
    (plan,) = timing.make_plans([launch_s], limit_s=1.0)
    assert timing.MIN_SAMPLES <= plan.samples <= timing.MAX_SAMPLES
    assert 1 <= plan.launches <= timing.MAX_LAUNCHES
    if plan.samples > timing.MIN_SAMPLES:
        assert plan.samples * plan.launches * launch_s <= 1.0
    if launch_s <= timing.SAMPLE_SECONDS:
        full = plan.launches * launch_s >= timing.SAMPLE_SECONDS
        assert full or plan.launches == timing.MAX_LAUNCHES


def test_plans_of_a_group_share_its_time_and_the_number_of_readings() -> None:
    seconds = [1e-4, 0.05, 0.1]
    plans = timing.make_plans(seconds, limit_s=1.0)
    assert [plan.launches for plan in plans] == [100, 1, 1]
    assert {plan.samples for plan in plans} == {18}  # of 3 s, where one round takes 0.16 s


def test_plan_refuses_a_time_that_is_none() -> None:
    with pytest.raises(ValueError, match="positive time"):
        timing.make_plans([math.nan], 1.0)


def test_hot_readings_measure_a_known_sleep_per_launch() -> None:
    calls = []

    def launch() -> tuple[torch.Tensor, ...]:
        calls.append(None)
        time.sleep(0.004)
        return ()

    readings = [timing.measure_hot(launch, CPU, launches=3) for _ in range(5)]
    assert len(calls) == 15
    assert all(reading >= 0.004 for reading in readings)
    assert timing.summarise(readings).p50 < 0.04


def test_turns_alternate_in_direction_and_keep_readings_apart() -> None:
    order: list[int] = []

    def reader(index: int) -> list[float]:
        order.append(index)
        return [float(index), len(order) / 100]

    readings = timing.take_turns([lambda i=i: reader(i) for i in range(3)], rounds=3)  # type: ignore[misc]
    assert order == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert readings[1] == [1.0, 0.02, 1.0, 0.05, 1.0, 0.08]
    assert [one[::2] for one in readings] == [[index] * 3 for index in (0.0, 1.0, 2.0)]


def test_one_slow_reading_does_not_move_the_median_in_turns() -> None:
    waits = iter([0.002] * 4 + [0.2] + [0.002] * 4)

    def launch() -> tuple[torch.Tensor, ...]:
        time.sleep(next(waits))
        return ()

    (readings,) = timing.take_turns([lambda: [timing.measure_hot(launch, CPU, 1)]], rounds=9)
    assert max(readings) >= 0.2
    assert 0.002 <= timing.summarise(readings).p50 < 0.1


def test_hot_readings_keep_the_order_of_fast_and_slow() -> None:
    def read(matrix: torch.Tensor) -> list[float]:
        return [timing.measure_hot(lambda: (matrix @ matrix,), CPU, launches=20)]

    small, large = torch.randn(8, 8), torch.randn(256, 256)
    fast, slow = timing.take_turns([lambda: read(small), lambda: read(large)], rounds=5)
    assert timing.summarise(fast).p50 < timing.summarise(slow).p50


def test_a_cpu_has_no_cold_mode() -> None:
    with pytest.raises(ValueError, match="CUDA device, but got cpu"):
        timing.measure_cold(lambda: (), CPU, 3)


MIB = 2**20
CLEAR_REFS = Path("/proc/self/clear_refs")


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the kernel does not reset the peak here")
def test_peak_memory_on_a_cpu_counts_the_result_and_what_was_freed_in_between() -> None:
    def launch() -> tuple[torch.Tensor, ...]:
        between = [torch.ones(MIB) for _ in range(16)]  # 4 MiB each, 64 in all
        return (torch.stack(between).sum(0),)  # and their copy, 64 more, and the result

    for _ in range(3):  # memory that was freed before is counted again
        launch()
        peak = timing.peak_memory(launch, CPU)
        assert peak is not None
        assert 126 * MIB <= peak <= 140 * MIB
    existing = torch.ones(16 * MIB)
    idle = timing.peak_memory(lambda: (existing,), CPU)
    assert idle is not None
    assert idle <= 2 * MIB


def test_peak_memory_is_unknown_where_the_kernel_keeps_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    assert timing.peak_memory(lambda: (), CPU) is None


def test_proc_files_are_read_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "status"
    path.write_text("Name:\tx\nVmHWM:\t   12 kB\nVmRSS:\t 3 kB\n", encoding="ascii")
    assert timing.proc_bytes(path, "VmRSS") == 3 * 1024
    with pytest.raises(ValueError, match="has no VmPin"):
        timing.proc_bytes(path, "VmPin")


def test_copy_speed_is_plausible_and_counts_both_directions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr(machine, "_COPY_BYTES", 4 * MIB)
    copy = machine.measure_copy("cpu")
    assert copy["bytes"] == 4 * MIB
    assert copy["threads"] == torch.get_num_threads()
    assert copy["seconds"]["samples"] >= 9
    assert copy["gb_per_s"] == pytest.approx(2 * 4 * MIB / copy["seconds"]["p50"] * 1e-9)
    assert 0.01 < copy["gb_per_s"] < 1e4


def test_copy_goes_well_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._last_level_cache_bytes() < 2**33
    monkeypatch.setattr(machine, "_last_level_cache_bytes", lambda: 8 * MIB)
    monkeypatch.setattr(machine, "_COPY_BYTES", MIB)
    assert machine.measure_copy("cpu")["bytes"] == 32 * MIB


# --- providers -----------------------------------------------------------------------------------


def _job(op: str, provider: str = "torch", mode: str = "forward") -> providers.Job:
    (case,) = cases.select(op, "smoke")
    return providers.Job(case, mode, providers.PROVIDERS[provider], "float32", "nchw", "cpu")


def test_labels_are_judged_by_the_scores_of_the_classes_they_name() -> None:
    job = _job("upsample_argmax")
    tensors = providers.make_inputs(job)
    tensors["input"][:, 3] = tensors["input"][:, 1]  # equally good: either may be named
    (labels,) = providers.prepare(job, tensors)()
    providers._reference_cache.clear()
    providers.verify(job, tensors, (labels,))
    swapped = torch.where(labels == 1, 3, labels)
    assert not torch.equal(swapped, labels)
    assert providers.verify(job, tensors, (swapped,)).max_error == 0.0
    wrong = labels.clone()
    wrong[0, 0, 0] = (wrong[0, 0, 0] + 1) % 5
    for broken, message in (
        (wrong, "a wrong answer is not timed"),
        (labels.int(), "expected int64 labels"),
        (labels[:, :1], r"expected int64 labels of shape \[2, 12, 9\]"),
        (labels + 4, r"expected labels in \[0, 5\)"),
        (labels - 5, r"expected labels in \[0, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            providers.verify(job, tensors, (broken,))
    providers._reference_cache.clear()  # the inputs were changed


@pytest.mark.parametrize("op", ["cross_entropy", "upsample_cross_entropy"])
def test_a_wrong_loss_is_refused(op: str) -> None:
    job = _job(op, mode="step")
    tensors = providers.make_inputs(job)
    (gradient,) = providers.prepare(job, tensors)()
    assert gradient.shape == tensors["input"].shape
    providers.verify(job, tensors, (gradient,))
    for wrong in (gradient * 1.001, torch.full_like(gradient, math.nan)):
        with pytest.raises(ValueError, match="a wrong answer is not timed"):
            providers.verify(job, tensors, (wrong,))


def test_torch_compile_never_turns_into_eager_behind_the_rows_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=backend, **options))
    providers._compiled.cache_clear()
    try:
        # More rows than torch compiles variants of one function.
        for index in range(12):
            case = CrossEntropyCase(
                name="tiny", source="a test", sets=frozenset(), n=1, c=3, h=2, w=2 + index
            )
            job = providers.Job(
                case, "forward", providers.PROVIDERS["torch_compile"], "float32", "nchw", "cpu"
            )
            tensors = providers.make_inputs(job)
            providers.verify(job, tensors, providers.prepare(job, tensors)())
            assert len(compiled) == index + 1
    finally:
        providers._compiled.cache_clear()
        torch.compiler.reset()


# --- report --------------------------------------------------------------------------------------


def test_report_shows_wins_ties_and_losses() -> None:
    text = markdown.render(
        _results(
            _row("dilseg", 1e-3),
            _row("torch", 2e-3),
            _row("torch_heuristic", 3e-3),
            _row("dilseg", 1e-3, mode="grad_input"),
            _row("torch", 1.01e-3, mode="grad_input"),
            _row("dilseg", 8e-3, mode="grad_weight"),
            _row("torch", 1e-3, mode="grad_weight"),
        )
    )
    lines = text.splitlines()
    assert "Test GPU" in lines[0]
    for part in ("driver 1.2.3", "torch 2.13.0", "commit 0123456789ab", "2030-01-02"):
        assert part in lines[0]
    (forward,) = (line for line in lines if "| forward |" in line)
    assert "| 1 ms | 2 ms (torch) | **2.00x** |" in forward
    (tie,) = (line for line in lines if "| grad_input |" in line)
    assert "1.01x (tie)" in tie
    (loss,) = (line for line in lines if "| grad_weight |" in line)
    assert "0.12x (loss)" in loss
    mean = (2.0 * 1.01 * 0.125) ** (1 / 3)
    assert f"Geometric mean {mean:.2f}x" in text
    assert "1 wins, 1 ties, 1 losses" in text


def test_report_compares_within_one_layout_and_by_cold_times() -> None:
    text = markdown.render(
        _results(
            _row("dilseg", 1e-3, cold=4e-3),
            _row("torch", 9e-3, cold=2e-3),
            _row("torch", 1e-9, layout="channels_last"),
        )
    )
    assert "| 4 ms | 2 ms (torch) | 0.50x (loss) |" in text
    assert "channels_last" not in text  # no row of ours there, so nothing is compared


def test_replayed_graphs_are_compared_with_each_other_only() -> None:
    text = markdown.render(
        _results(
            _row("dilseg", 4e-3),
            _row("torch", 8e-3),
            _row("dilseg_graph", 1e-3),
            _row("torch_graph", 5e-3),
        )
    )
    assert "| forward | bfloat16 | nchw | 4 ms | 8 ms (torch) | **2.00x** |" in text
    assert "| forward (graph) | bfloat16 | nchw | 1 ms | 5 ms (torch_graph) | **5.00x** |" in text


def test_report_gives_the_workspace_where_it_was_counted() -> None:
    rows = [_row("dilseg", 1e-3), _row("torch", 1e-3)]
    assert "workspace" not in markdown.render(_results(*rows))
    rows = [row | {"workspace_bytes": 2**20} for row in rows]
    text = markdown.render(_results(*rows))
    assert "| peak MiB, ours / rival | workspace MiB, ours / rival |" in text
    assert "| 3.0 / 3.0 | 1.0 / 1.0 |" in text
    rows[0]["workspace_bytes"] = None
    assert "| 3.0 / 3.0 | - / 1.0 |" in markdown.render(_results(*rows))


def test_report_gives_the_share_of_the_roof_where_products_were_measured() -> None:
    work = {"flops": 10**12, "bytes": 10**9, "precision": "bfloat16"}
    results = _results(_row("dilseg", 4e-2, **work), _row("torch", 8e-2, **work))
    assert "% of roof" not in markdown.render(results)
    results["machine"]["copy"] = {"gb_per_s": 1000.0}  # 1 ms for the bytes
    results["machine"]["matmul"] = {"bfloat16": {"tflop_per_s": 100.0}}  # 10 ms for the products
    text = markdown.render(results)
    assert "| % of roof |" in text
    assert text.count("| 25 |") == 1
    assert "bfloat16 matmul 100 TFLOP/s" in text.splitlines()[0]
    results["machine"]["matmul"] = {"float32": {"tflop_per_s": 100.0}}
    assert "| 3.0 / 3.0 | - |" in markdown.render(results)


def test_report_gives_the_share_of_a_copy_where_the_copy_was_measured() -> None:
    results = _results(_row("dilseg", 1e-3, gb_per_s=5.0), _row("torch", 2e-3))
    assert "| 5 | - |" in markdown.render(results)
    results["machine"]["copy"] = {"gb_per_s": 20.0}
    text = markdown.render(results)
    assert "| 5 | 25 |" in text
    assert "copy 20 GB/s" in text.splitlines()[0]
    results["machine"]["copy"] = {"gb_per_s": 0.0}
    with pytest.raises(ValueError, match=r"machine\.copy\.gb_per_s: expected a positive number"):
        markdown.render(results)


def test_report_tells_a_row_without_rival_what_was_skipped_and_a_partial_run() -> None:
    results = _results(_row("dilseg", 5e-6), status="partial")
    results["benchmarks"]["skipped"] = [
        {"group": "g", "provider": "torch", "reason": "no time"},
        {"group": "h", "provider": "torch", "reason": "no time"},
    ]
    text = markdown.render(results)
    assert "| 5 us | not measured | - |" in text
    assert "Not measured: 2 rows, no time." in text
    assert "partial run" in text


def _without(key: str) -> dict[str, Any]:
    return {k: v for k, v in _results().items() if k != key}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], r"results: expected a JSON object, but got \[\]"),
        (_without("format"), r"results\.format: expected 'dilseg-results', but got None"),
        (_results(version=99), r"results\.version: expected 1, .* but got 99"),
        (_results(status="fine"), r"results\.status: expected complete or partial"),
        (_results(machine={}), r"results\.machine\.name: expected a device name"),
        (_without("tests"), r"results\.tests: expected the section"),
        (_results(steps=[{"name": "build"}]), r"results\.steps\[0\]\.status: expected a text"),
        (_results(benchmarks={"rows": 3}), r"results\.benchmarks\.rows: expected a list"),
        (
            _results({"op": "x"}),
            r"rows\[0\]\.case: expected str, .*no such key",
        ),
        (_results(_row("dilseg", 1.0, op=3)), r"rows\[0\]\.op: expected str, but got 3"),
        (_results(_row("dilseg", -1.0)), r"rows\[0\]\.hot\.p20: expected a positive number"),
        (_results(_row("dilseg", math.nan)), r"rows\[0\]\.hot\.p20: expected a positive number"),
    ],
)
def test_report_refuses_malformed_results(broken: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        markdown.render(broken)


def test_save_and_load_keep_everything_and_leave_no_temporary_file(tmp_path: Path) -> None:
    results = _results(_row("dilseg", 1e-3))
    path = tmp_path / "new" / "file.json"
    results_file.save(results, path)
    assert results_file.load(path) == results
    with pytest.raises(ValueError, match="expected complete or partial"):
        results_file.save(results | {"status": "?"}, path)
    assert results_file.load(path) == results
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_report_command_names_a_bad_file_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{", encoding="utf-8")
    for path in (bad, tmp_path / "absent.json"):
        assert report.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert error.count("\n") == 1


def test_report_command_writes_between_the_markers(tmp_path: Path) -> None:
    results, document = tmp_path / "r.json", tmp_path / "README.md"
    results_file.save(_results(_row("dilseg", 1e-3)), results)
    document.write_text(
        f"a\n{markdown.BEGIN_MARKER}\nold\n{markdown.END_MARKER}\nb\n", encoding="utf-8"
    )
    for _ in range(2):  # the second time over its own output
        assert report.main([str(results), "--insert", str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"a\n{markdown.BEGIN_MARKER}\n\nMeasured on Test GPU")
    assert text.endswith(f"\n{markdown.END_MARKER}\nb\n")
    assert "old" not in text
    document.write_text("no markers", encoding="utf-8")
    assert report.main([str(results), "--insert", str(document)]) == 2


# --- goals ---------------------------------------------------------------------------------------


def test_goals_speak_of_the_cases_of_their_set_and_of_the_sizes_in_their_sentence() -> None:
    known = {(case.op, case.name): case for case in cases.CASES}
    named = {(goal.op, goal.case) for goal in goals.GOALS}
    assert named == {key for key, case in known.items() if "fused" in case.sets}
    assert len(set(goals.GOALS)) == len(goals.GOALS)
    for goal in goals.GOALS:
        assert goal.mode in known[goal.op, goal.case].modes
        assert goal.rival in goals.PROVIDERS
    sizes = {"voc_512_b2": (2, 21, 512, 512), "voc_8x_b2": (2, 21, 512, 512),
             "fcn_skip3_2x_b2": (2, 21, 128, 128), "cityscapes_8x": (1, 19, 1024, 2048),
             "cityscapes_b1": (1, 19, 1024, 2048)}  # fmt: skip
    for key in named:
        case: Any = known[key]
        if isinstance(case, CrossEntropyCase):
            size = (case.n, case.c, case.h, case.w)
        else:
            size = (case.n, case.c, case.h_in * case.scale, case.w_in * case.scale)
            assert f"x{case.scale}" in goals.SOURCE
        assert size == sizes[case.name]
        assert "x".join(map(str, size[-2:])) in goals.SOURCE


def test_hopper_goals_speak_of_the_cases_of_their_set() -> None:
    wanted = goals.HOPPER.goals
    known = {case.name: case for case in cases.CONV_CASES}
    assert {goal.case for goal in wanted} == {
        name for name, case in known.items() if "hopper" in case.sets
    }
    assert len(set(wanted)) == len(wanted)
    for goal in wanted:
        assert goal.mode in known[goal.case].modes
        assert goal.rival == ("none" if goal.kind == "rate" else goals.EAGER)
        assert known[goal.case].n == (8 if goal.case.endswith("_b8") else 1)
    assert {(goal.case, goal.ratio) for goal in wanted if goal.kind == "rate"} == {
        ("vgg_conv5_d2_b8", 600), ("fc6_7x7_d4_b8", 600),
    }  # fmt: skip


def test_goals_on_a_gpu_speak_of_rows_that_it_measures() -> None:
    known = {(case.op, case.name): case for case in cases.CASES}
    for name in ("conv_gpu", "fused_gpu"):
        for goal in goals.SETS[name].goals:
            case = known[goal.op, goal.case]
            assert "gpu" in case.sets
            assert goal.mode in case.modes
            assert goal.rival in providers.PROVIDERS
            assert goal.precision in providers.PRECISIONS


@pytest.mark.parametrize(("seconds", "met"), [(256e-6, True), (259e-6, False)])
def test_a_rate_is_judged_by_itself(seconds: float, met: bool) -> None:
    """conv5 of eight images is 154.6 GFLOP: 600 TFLOP/s take 257.7 us."""
    case = next(case for case in cases.CONV_CASES if case.name == "vgg_conv5_d2_b8")
    row = _row(
        "dilseg", seconds, case=case.name, layout="channels_last",
        gflop_per_s=case.flops("forward") / seconds * 1e-9,
    )  # fmt: skip
    judged = comparison.judge(goals.HOPPER, _results(row))
    (one,) = [one for one in judged if one.goal.kind == "rate" and one.measured]
    assert one.met is met
    assert one.wanted == "600 TFLOP/s"
    assert one.value == f"{case.flops('forward') / seconds * 1e-12:.0f} TFLOP/s"


def test_hopper_set_is_the_rows_of_the_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    done = _pytest_benchmarks("--set", "hopper", "--collect-only")
    assert done.returncode == 0, done.stdout
    rows = {line.split("[", 1)[1].rstrip("]") for line in done.stdout.splitlines() if "[" in line}
    assert {row for row in rows if row != "NOTSET"} == {
        f"{goal.case}-{goal.mode}-{goal.precision}-{goal.layout}-{provider}"
        for goal in goals.HOPPER.goals
        for provider in ("dilseg", "torch")
    }


def test_conv_goals_speak_of_the_cases_of_their_set_and_of_the_sizes_in_their_sentence() -> None:
    named = {goal.case for goal in goals.CONV_GOALS}
    known = {case.name: case for case in cases.CONV_CASES}
    assert named == {name for name, case in known.items() if "conv" in case.sets}
    assert len(set(goals.CONV_GOALS)) == len(goals.CONV_GOALS)
    for goal in goals.CONV_GOALS:
        assert (goal.op, goal.rival) == ("dilated_conv2d", goals.EAGER)
        assert f"{goal.ratio:g}x" in goals.CONV_SOURCE
        if goal.ratio > 1:
            case = known[goal.case]
            size = f"{case.c_in} channels d={case.dilation} at {case.h_in}x{case.w_in}"
            assert size in goals.CONV_SOURCE


def test_goals_of_the_convolution_are_judged_by_name() -> None:
    judged = markdown.render_goals(_cpu_results([]), "conv")
    assert not judged.met
    assert goals.CONV_SOURCE in judged.text
    assert judged.text.count("**not measured**") == len(goals.CONV_GOALS)


def _goal_rows(
    factor: float = 1.0, wanted: tuple[goals.Goal, ...] = goals.GOALS
) -> list[dict[str, Any]]:
    """Rows that meet every goal `factor` times over."""
    ours: dict[tuple[str, ...], dict[str, Any]] = {}
    theirs: dict[tuple[str, ...], dict[str, Any]] = {}
    for goal in wanted:
        place = {"op": goal.op, "case": goal.case, "mode": goal.mode}
        place |= {"precision": goal.precision, "layout": goal.layout}
        key = (goal.op, goal.case, goal.mode, goal.precision, goal.layout)
        ours.setdefault(key, _row("dilseg", 1e-3, **place))
        row = theirs.setdefault((*key, goal.rival), _row(goal.rival, 1e-9, **place))
        if goal.kind == "memory":
            row["peak_bytes"] = round(goal.ratio * factor * 3 * 2**20)
        else:
            row["hot"] = _times(goal.ratio * factor * 1e-3)
    return [*ours.values(), *theirs.values()]


def _cpu_results(rows: list[dict[str, Any]], threads: int = 2) -> dict[str, Any]:
    results = _results(*rows)
    results["machine"] |= {"device": "cpu", "threads": threads, "copy": {"gb_per_s": 111.0}}
    return results


def test_goals_that_are_met_are_shown_with_the_sentence_they_come_from() -> None:
    judged = markdown.render_goals(_cpu_results(_goal_rows(1.001)))
    assert judged.met
    assert goals.SOURCE in judged.text
    assert f"{len(goals.GOALS)} of {len(goals.GOALS)} goals met." in judged.text
    assert "**no" not in judged.text
    assert (
        "| upsample_cross_entropy | voc_8x_b2 | step | float32 | nchw | time | 1 ms "
        "| 8.01 ms (torch) | 8x | 8.01x | yes | 50 |"
    ) in judged.text
    assert "| memory | 3.0 MiB | 60.1 MiB (torch) | 1/20 | 1/20 | yes | - |" in judged.text


def test_a_missed_goal_stays_visible() -> None:
    judged = markdown.render_goals(_cpu_results(_goal_rows(0.99)))
    assert not judged.met
    assert f"0 of {len(goals.GOALS)} goals met." in judged.text
    assert "| 8x | 7.92x | **no** |" in judged.text
    assert "| 1/20 | 1/19.8 | **no** |" in judged.text


@pytest.mark.parametrize(
    "change", [{"precision": "bfloat16"}, {"layout": "channels_last"}, {"mode": "grad_weight"}]
)
def test_rows_under_other_conditions_do_not_count(change: dict[str, str]) -> None:
    judged = markdown.render_goals(_cpu_results([row | change for row in _goal_rows(9.0)]))
    assert not judged.met
    assert judged.text.count("**not measured**") == len(goals.GOALS)


def test_goals_without_a_memory_count_or_with_none_used() -> None:
    rows = _goal_rows(2.0)
    for row in rows:
        if row["provider"] == "dilseg":
            row["peak_bytes"] = 0
    assert markdown.render_goals(_cpu_results(rows)).met
    for row in rows:
        row["peak_bytes"] = None
    judged = markdown.render_goals(_cpu_results(rows))
    assert not judged.met
    assert judged.text.count("**not measured**") == 2


def test_goals_refuse_another_device_and_do_not_count_with_other_threads() -> None:
    judged = markdown.render_goals(_cpu_results(_goal_rows(2.0), threads=8))
    assert not judged.met
    assert "set for 2 threads, but this was measured with 8" in judged.text
    with pytest.raises(ValueError, match=r"machine\.device: expected 'cpu', of which the goals"):
        markdown.render_goals(_results())


def test_goals_of_a_gpu_are_judged_for_a_gpu() -> None:
    wanted = goals.CONVOLUTION_ON_GPU.goals
    known = {(case.op, case.name): case for case in cases.CASES}
    for goal in wanted:
        assert "gpu" in known[goal.op, goal.case].sets
        assert goal.precision in providers.PRECISIONS
        assert goal.layout in providers.LAYOUTS
    for factor in (1.01, 0.99):
        results = _results(*_goal_rows(factor, wanted))
        results["machine"]["device"] = "cuda"
        judged = markdown.render_goals(results, "conv_gpu")
        assert judged.met == (factor > 1)
        assert "Goals of the convolution" in judged.text
        assert "Goals of the fused operators" not in judged.text


@pytest.mark.parametrize(("factor", "code"), [(2.0, 0), (0.5, 1)])
def test_report_command_says_by_its_exit_code_whether_the_goals_are_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, code: int
) -> None:
    path = tmp_path / "r.json"
    results_file.save(_cpu_results(_goal_rows(factor)), path)
    assert report.main([str(path), "--goals"]) == code
    assert "### Goals of" in capsys.readouterr().out
    assert report.main([str(path)]) == 0


# --- the GPU job ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_job_without_a_gpu_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_job", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No GPU here (")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def _step(name: str, run: Any, **changes: Any) -> gpu_job.Step:
    return gpu_job.Step(name, run, **({"share": 0.5} | changes))


def _run(
    steps: list[gpu_job.Step], path: Path, budget_s: float = 60.0
) -> tuple[int, dict[str, Any]]:
    code = gpu_job.run_steps(
        steps, path=path, described={"name": "Test GPU"}, capability=(9, 0), budget_s=budget_s
    )
    return code, results_file.load(path)


def _passes(context: gpu_job.Context) -> gpu_job.Outcome:
    return gpu_job.Outcome(gpu_job.PASSED, "done", section={"n": 1})


def _fails(context: gpu_job.Context) -> gpu_job.Outcome:
    return gpu_job.Outcome(gpu_job.FAILED, "no")


def _breaks(context: gpu_job.Context) -> gpu_job.Outcome:
    raise RuntimeError("a defect")


def _lacks_a_tool(context: gpu_job.Context) -> gpu_job.Outcome:
    gpu_job.require_module("no-such-module", "nothing happens")
    raise AssertionError("not reached")


def _hangs(context: gpu_job.Context) -> gpu_job.Outcome:
    script = "import time; print('begun', flush=True); time.sleep(60)"
    done = context.python("-c", script, limit_s=1.5)
    status = gpu_job.TIMED_OUT if done.timed_out else gpu_job.PASSED
    return gpu_job.Outcome(status, "stopped", {"log": done.tail()})


def test_gpu_job_all_steps_pass(tmp_path: Path) -> None:
    code, results = _run(
        [_step("a", _passes), _step("b", _passes, section="tests")], tmp_path / "r"
    )
    assert code == 0
    assert results["status"] == "complete"
    assert [step["status"] for step in results["steps"]] == ["passed", "passed"]
    assert results["tests"] == {"n": 1}


def test_gpu_job_keeps_going_past_failures_and_writes_one_valid_file(tmp_path: Path) -> None:
    start = time.monotonic()
    code, results = _run(
        [
            _step("failing", _fails),
            _step("defective", _breaks),
            _step("hanging", _hangs),
            _step("lacking", _lacks_a_tool),
        ],
        tmp_path / "r.json",
    )
    assert time.monotonic() - start < 20
    assert code == 1
    by_name = {step["name"]: step for step in results["steps"]}
    assert by_name["failing"]["status"] == "failed"
    assert by_name["defective"]["reason"] == "RuntimeError: a defect"
    assert by_name["hanging"]["status"] == "timed out"
    assert by_name["hanging"]["log"][0] == "begun"
    assert by_name["lacking"]["status"] == "skipped"
    assert "pip install no-such-module" in by_name["lacking"]["reason"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert "RuntimeError: a defect" in markdown.render(results)


def test_gpu_job_missing_tool_alone_is_exit_code_3(tmp_path: Path) -> None:
    assert _run([_step("a", _passes), _step("b", _lacks_a_tool)], tmp_path / "r")[0] == 3


def test_gpu_job_broken_build_skips_what_depends_on_it(tmp_path: Path) -> None:
    code, results = _run([_step("build", _fails), _step("test", _passes)], tmp_path / "r")
    assert code == 1
    assert results["steps"][1]["status"] == "skipped"


def test_gpu_job_spent_budget_is_told_and_the_file_is_there(tmp_path: Path) -> None:
    code, results = _run([_step("a", _passes)], tmp_path / "r", budget_s=1.0)
    assert code == 1
    assert results["steps"][0]["status"] == "timed out"
    assert "budget of 1 s" in results["steps"][0]["reason"]


def test_gpu_job_file_is_partial_while_a_step_runs(tmp_path: Path) -> None:
    seen = []

    def looks(context: gpu_job.Context) -> gpu_job.Outcome:
        seen.append(results_file.load(tmp_path / "r"))
        return gpu_job.Outcome(gpu_job.PASSED, "looked")

    _run([_step("a", _passes), _step("b", looks)], tmp_path / "r")
    assert seen[0]["status"] == "partial"
    assert [step["name"] for step in seen[0]["steps"]] == ["a"]


def test_gpu_job_stops_a_command_with_its_children() -> None:
    script = (
        "import subprocess, sys, time, signal\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    done = gpu_job.run_command([sys.executable, "-c", script], limit_s=2.0, grace_s=0.5)
    assert done.timed_out
    assert done.wall_s < 10
    status = Path(f"/proc/{int(done.output)}/status")
    deadline = time.monotonic() + 5
    while (
        time.monotonic() < deadline and status.exists() and "Z (zombie)" not in status.read_text()
    ):
        time.sleep(0.05)
    assert not status.exists() or "Z (zombie)" in status.read_text()


def test_gpu_job_reads_a_junit_file(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(
        """<testsuites><testsuite>
        <testcase classname="t" name="a[cuda-1]" time="0.5"/>
        <testcase classname="t" name="b[cpu]" time="0.25"/>
        <testcase classname="t" name="c[cuda]"><failure message="wrong&#10;long"/></testcase>
        <testcase classname="t" name="test_cuda_build[auto]" time="0"/>
        <testcase classname="t" name="d" time="0"><skipped message="no data"/></testcase>
        <testcase classname="t" name="e" time="0"><error message="boom"/></testcase>
        </testsuite></testsuites>""",
        encoding="utf-8",
    )
    read = gpu_job.read_junit(path)
    assert (read["passed"], read["failed"], read["errors"], read["skipped"]) == (3, 1, 1, 1)
    assert read["on_cuda"] == {"passed": 1, "failed": 1}
    assert read["failures"][0] == {"test": "t::c[cuda]", "message": "wrong"}
    assert read["skip_reasons"] == {"no data": 1}


CLEAN = "sanitizer cases: 7\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("output", "exit_code", "timed_out", "status"),
    [
        (CLEAN, 0, False, "passed"),
        ("sanitizer cases: 7\n= RACECHECK SUMMARY: 0 hazards displayed\n", 0, False, "passed"),
        ("sanitizer cases: 7\n========= ERROR SUMMARY: 2 errors\n", 99, False, "failed"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error)\n", 99, False, "failed"),
        ("========= ERROR SUMMARY: 0 errors\n", 0, False, "failed"),  # the cases never ran
        ("sanitizer cases: 7\n", 0, False, "failed"),  # the tool never reported
        (CLEAN, 1, False, "failed"),
        ("", -9, True, "timed out"),
        ("========= Error: Device not supported\n", 1, False, "skipped"),
    ],
)  # fmt: skip
def test_gpu_job_believes_a_sanitizer_only_when_everything_says_clean(
    output: str, exit_code: int, timed_out: bool, status: str
) -> None:
    done = gpu_job.Finished(exit_code, timed_out, 1.0, output)
    assert gpu_job.read_sanitizer("memcheck", done)["status"] == status


@pytest.mark.parametrize(("bad_tool", "status"), [(None, "passed"), ("racecheck", "failed")])
def test_gpu_job_runs_every_sanitizer_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_tool: str | None, status: str
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        "#!/bin/sh\n"
        "echo allocator: $PYTORCH_NO_CUDA_MEMORY_CACHING\n"
        "echo sanitizer cases: 7\n"
        f'if [ "$2" = "{bad_tool}" ]; then echo "ERROR SUMMARY: 1 error"; exit 99; fi\n'
        'echo "ERROR SUMMARY: 0 errors"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    outcome = gpu_job.sanitizer_step(gpu_job.Context(tmp_path, time.monotonic() + 60, (9, 0)))
    assert outcome.status == status
    assert outcome.section is not None
    assert tuple(outcome.section) == gpu_job.SANITIZER_TOOLS
    for tool, verdict in outcome.section.items():
        assert verdict["status"] == ("failed" if tool == bad_tool else "passed")
    if bad_tool is not None:
        assert outcome.section[bad_tool]["log"][0] == "allocator: 1"


def test_gpu_job_says_where_the_sanitizer_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_job, "find_sanitizer", lambda: None)
    outcome = gpu_job.run_step(
        gpu_job.STEPS["sanitizer"], gpu_job.Context(tmp_path, time.monotonic() + 60, (9, 0))
    )
    assert outcome.status == gpu_job.SKIPPED
    assert "CUDA_HOME" in outcome.reason


def test_gpu_job_architectures_and_file_names(tmp_path: Path) -> None:
    assert gpu_job.architecture((8, 6)) == "8.6"
    assert gpu_job.architecture((9, 0)) == "9.0a"
    first = gpu_job.results_path(tmp_path, "NVIDIA H200", date(2030, 1, 2))
    assert first.name == "nvidia-h200-2030-01-02.json"
    first.touch()
    again = gpu_job.results_path(tmp_path, "NVIDIA H200", date(2030, 1, 2))
    assert again.name == "nvidia-h200-2030-01-02-2.json"


def test_gpu_job_refuses_an_unknown_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_job.main(["--steps", "build,dance"])
    assert error.value.code == 2
    assert "no step 'dance'; the steps are build, test, sanitizer, bench" in capsys.readouterr().err


# --- the suite itself ----------------------------------------------------------------------------


def test_a_resumed_job_repeats_what_did_not_pass_and_keeps_the_rest(tmp_path: Path) -> None:
    def measures(hot: float) -> Any:
        return lambda context: gpu_job.Outcome(
            gpu_job.PASSED,
            "done",
            section={"rows": [_row("dilseg", hot), _row("torch", 2.0)], "skipped": []},
        )

    described = {"name": "Test GPU", "commit": "abc"}
    path = tmp_path / "results.json"
    ran: list[str] = []

    def noted(name: str, run: Any, **options: Any) -> gpu_job.Step:
        def step(context: gpu_job.Context) -> gpu_job.Outcome:
            ran.append(name)
            outcome: gpu_job.Outcome = run(context)
            return outcome

        return _step(name, step, **options)

    options: dict[str, Any] = {
        "path": path, "described": described, "capability": (9, 0), "budget_s": 60.0,
    }  # fmt: skip
    first = noted("first", measures(1.0), section="benchmarks")
    assert gpu_job.run_steps([first, noted("second", _fails)], **options) == 1
    earlier = gpu_job.earlier_results(path, described)
    again = [first, noted("second", _passes), noted("third", measures(3.0), section="benchmarks")]
    assert gpu_job.run_steps(again, **options, earlier=earlier) == 0
    assert ran == ["first", "second", "second", "third"]
    results = results_file.load(path)
    assert [step["name"] for step in results["steps"]] == ["first", "second", "third"]
    assert results["status"] == "complete"
    rows = results["benchmarks"]["rows"]
    assert {row["provider"]: row["hot"]["p50"] for row in rows} == {"dilseg": 3.0, "torch": 2.0}
    for key in described:
        with pytest.raises(ValueError, match=f"is of the {key} .*, but here it is other"):
            gpu_job.earlier_results(path, {**described, key: "other"})


def test_rehearsal_runs_the_commands_of_the_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report's own, and those of the others as far as their text."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    commands: list[list[str]] = []
    real = gpu_job.run_command

    def run(command: Any, limit_s: float, environment: Any = None, **options: Any) -> Any:
        commands.append([str(word) for word in command[1:]])
        if "benchmarks.report" in command:
            return real(command, limit_s, environment, **options)
        return gpu_job.Finished(0, False, 0.1, '{"kind": "cpu"}')

    monkeypatch.setattr(gpu_job, "run_command", run)
    steps = [gpu_job.STEPS[name] for name in ("build", "training", "report")]
    assert gpu_job.rehearse(steps, 120.0) == 0, capsys.readouterr()
    build, _, training, report = commands
    assert build == ["-m", "build_tools"]
    assert training[:6] == ["-m", "benchmarks.training", "--data", "shapes", "--size", "cpu"]
    assert report[:2] == ["-m", "benchmarks.report"]
    assert set(gpu_job.STEPS) == {
        "build", "test", "sanitizer", "bench", "goals", "training", "report",
    }  # fmt: skip


def test_bench_step_measures_every_op_and_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pytest_benchmark", reason="the runner, pytest-benchmark, is not installed")
    # It marks a worker of pytest-xdist, where pytest-benchmark measures nothing, to children too.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    context = gpu_job.Context(
        tmp_path, time.monotonic() + 240, (0, 0), device="cpu", case_set="smoke"
    )
    outcome = gpu_job.bench_step(context)
    assert outcome.status == gpu_job.PASSED, outcome
    assert outcome.section is not None
    rows = outcome.section["rows"]
    assert outcome.reason == f"{len(rows)} rows measured, 0 skipped"
    assert outcome.details["machine"]["device"] == "cpu"
    seen = {(row["op"], row["mode"], row["provider"]) for row in rows}
    for op in cases.OPS:
        (case,) = cases.select(op, "smoke")
        for mode in case.modes:
            assert {(op, mode, "dilseg"), (op, mode, "torch")} <= seen
    assert all(row["flags"]["fp32_precision"] == "ieee" for row in rows)
    for layout in ("nchw", "channels_last"):
        assert any(row["layout"] == layout for row in rows)


def _pytest_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pytest_benchmark", reason="the runner, pytest-benchmark, is not installed")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--device", "cpu",
         "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_run_records_threads_copy_speed_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    path = tmp_path / "r.json"
    done = _pytest_benchmarks(
        "--set", "smoke", "--threads", "1", "--seconds", "0.01", "-k", "argmax and nchw",
        "--results", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    results = results_file.load(path)
    assert results["machine"]["threads"] == results["machine"]["copy"]["threads"] == 1
    assert results["machine"]["thread_settings"]["OMP_WAIT_POLICY"] == "passive"
    matmul = results["machine"]["matmul"]
    assert list(matmul) == ["float32"]
    rate = matmul["float32"]
    assert rate["tflop_per_s"] == pytest.approx(
        2e-12 * rate["n"] ** 3 / rate["seconds"]["p50"], rel=1e-6
    )
    rows = results["benchmarks"]["rows"]
    assert [row["provider"] for row in rows] == ["dilseg", "torch"]
    assert len({row["hot"]["samples"] for row in rows}) == 1  # as many readings, taken in turns
    for row in rows:
        assert row["hot"]["p25"] <= row["hot"]["p50"] <= row["hot"]["p75"]
        assert isinstance(row["peak_bytes"], int) == CLEAR_REFS.exists()
        if CLEAR_REFS.exists():
            assert 0 <= row["workspace_bytes"] <= row["peak_bytes"]
    assert "% of copy" in done.stdout
    assert "### Goals" not in done.stdout


_WRONG_TORCH = """
from dataclasses import replace
from benchmarks import providers
right = providers.PROVIDERS["torch"]
wrong = replace(right, forward=lambda case, tensors: right.forward(case, tensors) + 1)
providers.PROVIDERS["torch"] = wrong
"""


def test_a_wrong_provider_fails_its_own_row_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong_torch.py").write_text(_WRONG_TORCH, encoding="utf-8")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    path = tmp_path / "r.json"
    done = _pytest_benchmarks(
        "-p", "wrong_torch", "--set", "smoke", "--seconds", "0.01",
        "-k", "smoke_loss and forward and nchw", "--results", str(path),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "a wrong answer is not timed" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    assert [row["provider"] for row in results_file.load(path)["benchmarks"]["rows"]] == ["dilseg"]


def test_graphs_are_refused_without_a_gpu_with_one_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    path = tmp_path / "r.json"
    done = _pytest_benchmarks(
        "--set", "smoke", "--providers", "dilseg_graph,torch_graph", "--seconds", "0.01",
        "-k", "argmax and nchw", "--results", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    benchmarks = results_file.load(path)["benchmarks"]
    assert benchmarks["rows"] == []
    assert [skip["provider"] for skip in benchmarks["skipped"]] == ["dilseg_graph", "torch_graph"]
    assert {skip["reason"] for skip in benchmarks["skipped"]} == {
        "CUDA graphs need a GPU, and the device is cpu"
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("op", cases.OPS)
def test_a_replayed_graph_computes_the_same(op: str) -> None:
    jobs = providers.make_jobs(
        cases.select(op, "smoke"),
        "cuda",
        providers=("dilseg_graph", "torch_graph"),
        precisions=("float32",),
        layouts=("nchw",),
    )
    for job in jobs:
        with providers.flags(job):
            tensors = providers.make_inputs(job)
            launch = providers.prepare(job, tensors)
            (first, *_) = launch()
            if job.mode == "forward":
                first.zero_()  # a replay writes it anew
            providers.verify(job, tensors, launch())


def test_fused_set_is_the_rows_of_the_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    done = _pytest_benchmarks("--set", "fused", "--collect-only")
    assert done.returncode == 0, done.stdout
    rows = {line.split("[", 1)[1].rstrip("]") for line in done.stdout.splitlines() if "[" in line}
    assert {row for row in rows if row != "NOTSET"} == {
        f"{goal.case}-{goal.mode}-float32-nchw-{provider}"
        for goal in goals.GOALS
        for provider in goals.PROVIDERS
    }


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_a_thread_count_that_is_none_is_refused(count: str) -> None:
    done = _pytest_benchmarks("--collect-only", f"--threads={count}")
    assert done.returncode != 0
    assert f"expected a count of at least 1, but got '{count}'" in done.stderr


def test_sanitizer_cases_reach_every_family_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan of every convolution that they call, on an A100 and on an H100."""
    from benchmarks import sanitizer_cases

    class SeenError(Exception):
        """The plans are noted; the results are another test's."""

    operations = ("forward", "grad_input", "grad_weight")
    reached: dict[tuple[int, int], set[tuple[str, str]]] = {(8, 0): set(), (9, 0): set()}
    exact_floats: set[tuple[str, str]] = set()

    def note(x: torch.Tensor, w: torch.Tensor, *options: Any) -> None:
        for capability, seen in reached.items():
            for operation in operations:
                plan = dilseg.functional.dilated_conv2d_plan(
                    x, w, *options, operation=operation, compute_capability=capability
                )
                seen.add((plan.kernel, operation))
                if x.dtype == torch.float32 and dilseg.get_float32_conv_precision() == "ieee":
                    exact_floats.add((plan.kernel, operation))
        raise SeenError

    monkeypatch.setattr(dilseg.functional, "dilated_conv2d", note)
    for name, launch in sanitizer_cases.sanitizer_cases():
        if not name.startswith(("upsample", "cross_entropy")):
            with pytest.raises(SeenError):
                launch(torch.device("cpu"))

    def every(*families: str) -> set[tuple[str, str]]:
        return {(family, operation) for family in families for operation in operations}

    assert reached[8, 0] == every("direct", "gemm", "patch", "depthwise")
    assert reached[9, 0] == every("direct", "gemm", "patch", "depthwise", "wgmma")
    # On wgmma, the weight gradient of floats is left to others.
    wanted = every("gemm", "patch", "depthwise", "wgmma") - {("wgmma", "grad_weight")}
    assert wanted <= exact_floats


def test_sanitizer_cases_agree_with_themselves_on_the_cpu() -> None:
    from benchmarks import sanitizer_cases

    assert sanitizer_cases.main(["cpu"]) == 0


def test_sanitizer_comparison_catches_a_wrong_value_and_a_nan() -> None:
    from benchmarks.sanitizer_cases import compare

    right = (torch.ones(3),)
    compare("same", right, right)
    for wrong in (torch.tensor([1.0, 1.0, 1.1]), torch.tensor([1.0, math.nan, 1.0])):
        with pytest.raises(ValueError, match="off by"):
            compare("wrong", (wrong,), right)


def test_results_folder_holds_only_valid_results() -> None:
    folder = ROOT / "benchmarks" / "results"
    assert (folder / "README.md").is_file()
    for path in folder.glob("*.json"):
        assert report.main([str(path)]) == 0
