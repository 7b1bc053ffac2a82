# SPDX-License-Identifier: Apache-2.0
"""Small results files, as the benchmarks write them."""

from __future__ import annotations

from typing import Any

from benchmarks import results_file


def times(p50: float) -> dict[str, Any]:
    return {"p20": 0.9 * p50, "p50": p50, "p80": 1.2 * p50, "samples": 50}


def row(provider: str, hot: float, *, cold: float | None = None, **changes: Any) -> dict[str, Any]:
    made = {
        "op": "dilated_conv2d",
        "case": "vgg_conv5_d2",
        "source": "a layer",
        "mode": "forward",
        "provider": provider,
        "precision": "bfloat16",
        "layout": "nchw",
        "hot": times(hot),
        "cold": None if cold is None else times(cold),
        "gflop_per_s": 1.0e3,
        "gb_per_s": 55.5,
        "peak_bytes": 3 * 2**20,
    }
    return made | changes


def results(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    made = results_file.make_results(
        machine={
            "name": "Test GPU",
            "capability": "9.0",
            "commit": "0123456789abcdef",
            "modified": False,
            "state": {"driver_version": "1.2.3"},
            "versions": {"torch": "2.13.0", "cuda": "13.0"},
        },
        started="2030-01-02T03:04:05+00:00",
        benchmarks={"rows": list(rows), "skipped": []},
    )
    return made | changes
