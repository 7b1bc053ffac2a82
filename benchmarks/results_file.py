# SPDX-License-Identifier: Apache-2.0
"""Results files: what makes one valid, how one is written and read.

`results/README.md` says what the keys mean.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FORMAT = "dilseg-results"
VERSION = 1

_ROW_KEYS: dict[str, tuple[type, ...]] = {
    "op": (str,),
    "case": (str,),
    "source": (str,),
    "mode": (str,),
    "provider": (str,),
    "precision": (str,),
    "layout": (str,),
    "hot": (dict,),
    "cold": (dict, type(None)),
    "gflop_per_s": (float, int),
    "gb_per_s": (float, int),
    "peak_bytes": (int, type(None)),
}


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def make_results(
    *,
    machine: dict[str, Any],
    started: str,
    status: str = "complete",
    benchmarks: dict[str, Any] | None = None,
    steps: list[dict[str, Any]] | None = None,
    tests: dict[str, Any] | None = None,
    sanitizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A results dictionary with every section; one that was not run is None (steps: empty)."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "status": status,
        "started": started,
        "written": now(),
        "machine": machine,
        "steps": steps or [],
        "tests": tests,
        "sanitizer": sanitizer,
        "benchmarks": benchmarks,
    }


def _expect(condition: bool, where: str, wanted: str, got: object) -> None:
    if not condition:
        shown = repr(got)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(f"{where}: expected {wanted}, but got {shown}")


def _validate_quantiles(where: str, times: dict[str, Any]) -> None:
    for key in ("p20", "p50", "p80"):
        value = times.get(key)
        _expect(
            isinstance(value, (int, float)) and math.isfinite(value) and value > 0,
            f"{where}.{key}", "a positive number of seconds", value,
        )  # fmt: skip
    for key in ("p25", "p75"):  # files of before lack them
        value = times.get(key, 1.0)
        _expect(
            isinstance(value, (int, float)) and math.isfinite(value) and value > 0,
            f"{where}.{key}", "a positive number of seconds", value,
        )  # fmt: skip
    _expect(
        isinstance(times.get("samples"), int), f"{where}.samples", "a count", times.get("samples")
    )


def validate(results: object, name: str = "results") -> dict[str, Any]:
    """Returns `results` when it is a results dictionary of this version.

    Raises:
        ValueError: it is not; the message names the place, what belongs there, what stands there.
    """
    _expect(isinstance(results, dict), name, "a JSON object", results)
    assert isinstance(results, dict)
    _expect(results.get("format") == FORMAT, f"{name}.format", repr(FORMAT), results.get("format"))
    version = results.get("version")
    _expect(version == VERSION, f"{name}.version", f"{VERSION}, which this report reads", version)
    status = results.get("status")
    _expect(status in ("complete", "partial"), f"{name}.status", "complete or partial", status)
    for key in ("started", "written"):
        _expect(isinstance(results.get(key), str), f"{name}.{key}", "a time", results.get(key))
    machine = results.get("machine")
    _expect(isinstance(machine, dict), f"{name}.machine", "an object", machine)
    assert isinstance(machine, dict)
    _expect(
        isinstance(machine.get("name"), str),
        f"{name}.machine.name",
        "a device name",
        machine.get("name"),
    )
    copy = machine.get("copy")
    if copy is not None:
        _expect(isinstance(copy, dict), f"{name}.machine.copy", "an object", copy)
        speed = copy.get("gb_per_s")
        _expect(
            isinstance(speed, (int, float)) and math.isfinite(speed) and speed > 0,
            f"{name}.machine.copy.gb_per_s", "a positive number", speed,
        )  # fmt: skip
    steps = results.get("steps")
    _expect(isinstance(steps, list), f"{name}.steps", "a list", steps)
    assert isinstance(steps, list)
    for index, step in enumerate(steps):
        where = f"{name}.steps[{index}]"
        _expect(isinstance(step, dict), where, "an object", step)
        for key in ("name", "status", "reason"):
            _expect(isinstance(step.get(key), str), f"{where}.{key}", "a text", step.get(key))
    for key in ("tests", "sanitizer", "benchmarks"):
        _expect(key in results, f"{name}.{key}", "the section (null where it was not run)", None)
        section = results[key]
        _expect(
            section is None or isinstance(section, dict),
            f"{name}.{key}",
            "an object or null",
            section,
        )
    if results["benchmarks"] is not None:
        _validate_benchmarks(f"{name}.benchmarks", results["benchmarks"])
    return results


def _validate_benchmarks(where: str, benchmarks: dict[str, Any]) -> None:
    for key in ("rows", "skipped"):
        _expect(
            isinstance(benchmarks.get(key), list), f"{where}.{key}", "a list", benchmarks.get(key)
        )
    for index, row in enumerate(benchmarks["rows"]):
        place = f"{where}.rows[{index}]"
        _expect(isinstance(row, dict), place, "an object", row)
        for key, types in _ROW_KEYS.items():
            wanted = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            _expect(key in row, f"{place}.{key}", wanted, "no such key")
            _expect(isinstance(row[key], types), f"{place}.{key}", wanted, row[key])
        _validate_quantiles(f"{place}.hot", row["hot"])
        if row["cold"] is not None:
            _validate_quantiles(f"{place}.cold", row["cold"])


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a kill, never sees half of one; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's private mode is not meant for a file to be shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def save(results: dict[str, Any], path: Path) -> None:
    """Writes a results file, whole and valid."""
    write_text(path, json.dumps(validate(results), indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object, of whatever format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such results file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    _expect(isinstance(content, dict), path.name, "a JSON object", content)
    assert isinstance(content, dict)
    return content


def load(path: Path) -> dict[str, Any]:
    """Reads and validates a results file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not a results file of this version.
    """
    return validate(read_json(path), path.name)
