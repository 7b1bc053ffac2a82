# SPDX-License-Identifier: Apache-2.0
import os
import sys

import pytest

pytest.importorskip("benchmarks.peak_memory", reason="needs a source checkout")

from benchmarks import peak_memory

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)


def test_a_peak_is_seen_after_its_memory_is_gone():
    held = bytearray(64 << 20)
    assert peak_memory.peak_of(lambda: None) < 8 << 20
    assert 60 << 20 < peak_memory.peak_of(lambda: bytearray(os.urandom(1)) * (64 << 20)) < 80 << 20
    assert len(held) == 64 << 20


def test_the_fused_loss_needs_least_and_all_ways_agree(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    arguments = (
        "--backbone demo --fc-channels 8 --classes 11 --size 352 --batch 1 --threads 1 --runs 1"
    )
    assert peak_memory.main(arguments.split()) == 0
    text = capsys.readouterr().out
    rows = [line.split("|")[1:4] for line in text.splitlines() if "MiB" in line]
    peaks = {way.strip(): float(loss.split()[0]) for way, loss, _ in rows}
    assert list(peaks) == ["fused", "two ops", "torch"]
    logits = 11 * 352 * 352 * 4 / 2**20
    assert peaks["fused"] < logits < peaks["two ops"] <= peaks["torch"]
    losses = [float(word) for word in text.split("losses: ")[1].split(",")]
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-6)
