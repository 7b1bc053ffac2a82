# SPDX-License-Identifier: Apache-2.0
"""Random damage to every kind of file: it is read, or refused in one sentence that names it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("seed", [0])
def test_damaged_files_are_read_or_refused_within_little_memory(tmp_path, seed):
    for library in ("PIL", "scipy", "h5py"):
        pytest.importorskip(library, reason=f"needs {library}")
    done = subprocess.run(
        [sys.executable, "-m", "helpers.fuzzing", str(tmp_path), str(seed), "40"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 15
    # Each kind of file was both hurt and, by changes that do no harm, still read.
    for name, counts in results.items():
        assert counts["read"] + counts["refused"] == 40
        assert counts["refused"] > 0, name
    assert sum(counts["read"] for counts in results.values()) > 100
