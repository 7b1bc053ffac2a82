# SPDX-License-Identifier: Apache-2.0
"""The whole CamVid experiment, on six made-up photographs a split and tiny networks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.camvid import make_camvid

from dilseg import cli
from dilseg.data import CamVid
from dilseg.engine import REPRODUCTIONS, reproduce
from dilseg.engine.train import _Run

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("PIL", reason="needs Pillow")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("camvid")
    make_camvid(folder)
    return folder


def words(root, out, *more):
    return [
        "reproduce", "camvid", "--root", str(root), "--out", str(out), "--backbone", "demo",
        "--fc-channels", "16", "--batch-size", "2", "--limit", "4", "--eval-limit", "3",
        "--eval-every", "1", "--device", "cpu", "--amp", "off", "--stage-steps", "2", "2", "1",
        *more,
    ]  # fmt: skip


def test_published_values_belong_to_the_classes():
    camvid = REPRODUCTIONS["camvid"]
    assert set(camvid.published) == set(CamVid.classes)
    assert np.mean(list(camvid.published.values())) == pytest.approx(camvid.mean_iou, abs=0.05)


def test_camvid_from_one_command(root, tmp_path, capsys):
    """In two processes, which share one group for all stages and the features to store."""
    out = tmp_path / "camvid"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "dilseg", *words(root, out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "reproduction.json").read_text())
    assert record["published"]["mean_iou"] == 65.3
    assert list(record["stages"]) == ["frontend", "context", "fcn8s"]
    for name, steps in (("frontend", 2), ("context", 2), ("fcn8s", 1)):
        stage = record["stages"][name]
        assert (stage["steps"], stage["images"]) == (steps, 3)
        assert json.loads((out / name / "eval-test.json").read_text())["scores"] == stage["scores"]
    assert record["stages"]["context"]["arguments"]["init"] == str(out / "frontend" / "best.pt")
    assert len(list(out.glob("context/features-*/*.npy"))) == 4
    table = (out / "reproduction.md").read_text()
    assert "| bicyclist | 55.5 | " in table
    assert done.stdout.count(table) == 1
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 11 + 2
    assert {row.count("|") for row in rows} == {6}

    # Again: nothing is trained or scored a second time.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    scores = {path: path.stat().st_mtime_ns for path in out.rglob("eval-*.json")}
    (out / "reproduction.md").unlink()
    assert cli.main(words(root, out)) == 0
    for path, moment in (before | scores).items():
        assert path.stat().st_mtime_ns == moment, path
    assert (out / "reproduction.md").read_text() == table
    assert "frontend: finished, kept" in capsys.readouterr().out

    # Other arguments are another experiment.
    assert cli.main(words(root, out, "--seed", "1")) == 2
    assert "--seed 1: the run in" in capsys.readouterr().err


def test_a_stopped_experiment_goes_on(root, tmp_path, monkeypatch):
    out, step = tmp_path / "camvid", _Run.take_step

    def broken(run, module, batches):
        if run.config.stage == "context" and run.step == 1:
            raise KeyboardInterrupt
        step(run, module, batches)

    arguments = {
        "root": str(root), "out": str(out), "steps": (1, 2, 1), "backbone": "demo",
        "fc_channels": 16, "batch_size": 2, "limit": 4, "eval_limit": 1, "save_every": 1,
        "device": "cpu",
    }  # fmt: skip
    monkeypatch.setattr(_Run, "take_step", broken)
    with pytest.raises(KeyboardInterrupt):
        reproduce("camvid", **arguments)
    assert not (out / "fcn8s").exists()
    monkeypatch.undo()
    record = reproduce("camvid", **arguments)
    sessions = json.loads((out / "context" / "record.json").read_text())["sessions"]
    assert [session["first_step"] for session in sessions] == [0, 1]
    assert record["stages"]["context"]["steps"] == 2


def test_mistakes_come_before_any_training(root, tmp_path):
    given = {"root": str(root), "out": str(tmp_path / "x")}
    with pytest.raises(ValueError, match="expected one of camvid, but got 'voc'"):
        reproduce("voc", **given)
    with pytest.raises(ValueError, match="--weights: give torchvision's VGG-16 weights"):
        reproduce("camvid", **given)
    with pytest.raises(ValueError, match=r"--stage-steps: expected 3 numbers.*but got 2"):
        reproduce("camvid", steps=(1, 2), backbone="demo", **given)
    with pytest.raises(ValueError, match="--steps: expected a number >= 1"):
        reproduce("camvid", steps=(1, 2, 0), backbone="demo", **given)
    assert not Path(given["out"]).exists()
