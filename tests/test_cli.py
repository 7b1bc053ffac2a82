# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dilseg
from dilseg import cli
from dilseg.data import Shapes, save_image

ROOT = Path(__file__).resolve().parents[1]


def call(capsys, *argv):
    """Exit code, stdout and stderr of a command."""
    try:
        code = cli.main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_sentence(result, *texts):
    code, _, err = result
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("dilseg")
    assert "Traceback" not in err
    for text in texts:
        assert str(text) in err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = "train --data shapes --model fcn32s --limit 2 --eval-limit 1 --steps 2 --batch-size 2"
    assert cli.main([*words.split(), "--device", "cpu", "--out", str(folder)]) == 0
    return folder / "best.pt"


def test_train_leaves_a_run(checkpoint):
    record = json.loads((checkpoint.parent / "record.json").read_text())
    assert record["arguments"]["model"] == "fcn32s"
    assert record["status"] == "finished"


def test_eval_and_predict_use_it(checkpoint, tmp_path, capsys):
    code, out, _ = call(capsys, "eval", "--checkpoint", checkpoint, "--limit", 2, "--threads", 1)
    assert code == 0
    assert "mean IoU" in out
    pytest.importorskip("PIL", reason="needs Pillow")
    save_image(tmp_path / "a.png", Shapes("test").load_image(0))
    out = tmp_path / "out"
    result = call(
        capsys, "predict", "--checkpoint", checkpoint, "--input", tmp_path / "a.png", "--out", out
    )
    assert result[0] == 0
    assert (out / "a_overlay.png").is_file()
    assert not (out / "a_confidence.png").exists()
    paths = ("--input", tmp_path / "a.png", "--out", out, "--confidence")
    assert call(capsys, "predict", "--checkpoint", checkpoint, *paths)[0] == 0
    assert (out / "a_confidence.png").is_file()
    words = "--no-overlay --probabilities --batch-size 2 --anchor centre --limit 1 --split test"
    more = tmp_path / "more"
    result = call(capsys, "predict", "--checkpoint", checkpoint, "--out", more, *words.split())
    assert result[0] == 0
    names = ["test_00000.png", "test_00000_probabilities.npz"]
    assert sorted(p.name for p in more.iterdir()) == names
    (tmp_path / "b.png").write_bytes(b"nothing")
    result = call(capsys, "predict", "--checkpoint", checkpoint, "--input", tmp_path, "--out", out)
    assert "dilseg: " in result[2]
    assert str(tmp_path / "b.png") in result[2]
    assert result[0] == 2


def test_info_shows_build_devices_and_operators(capsys):
    code, out, _ = call(capsys, "info")
    assert code == 0
    assert dilseg.__version__ in out
    assert torch.__version__ in out
    for name, value in dilseg.build_info().items():
        assert f"build: {name}" in out
        if value is not None and not isinstance(value, list | tuple):
            assert str(value) in out
    for name in ("dilated_conv2d", "upsample_add", "cross_entropy"):
        assert f"dilseg::{name}(" in out


@pytest.mark.parametrize(
    "command", ["", "info", "train", "recipes", "reproduce", "eval", "predict", "convert", "bench"]
)
def test_help_is_there(capsys, command):
    code, out, _ = call(capsys, *filter(None, [command]), "--help")
    assert code == 0
    assert out.startswith(f"usage: dilseg {command}".strip())
    assert max(map(len, out.splitlines())) <= 120


def test_help_of_train_names_every_argument(capsys):
    import dataclasses

    from dilseg.engine import TrainConfig

    _, out, _ = call(capsys, "train", "--help")
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in out


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
def test_help_names_every_dataset(capsys, monkeypatch, command):
    from dilseg.data import DATASETS

    monkeypatch.setenv("COLUMNS", "500")
    _, out, _ = call(capsys, command, "--help")
    (line,) = (line for line in out.splitlines() if line.strip().startswith("--data NAME"))
    assert set(DATASETS) <= set(line.replace(",", " ").split())


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        ("", ["COMMAND"]),
        ("fly", ["invalid choice", "fly"]),
        ("train --colour red", ["unrecognized arguments", "--colour"]),
        ("train --lr fast", ["--lr", "fast"]),
        ("train --model unet", ["--model", "unet", "fcn8s"]),
        ("train --data camvid --root /nowhere/x", ["/nowhere/x"]),
        ("train --data camvid", ["--root"]),
        ("train --data coco --root x", ["coco"]),
        ("train --resume", ["--out"]),
        ("train --resume --overwrite --out x", ["--resume and --overwrite"]),
        ("train --resume --out /nowhere/run", ["/nowhere/run", "no checkpoint"]),
        ("train --init /nowhere/a.pt --steps 1", ["/nowhere/a.pt"]),
        ("train --limit 4 --batch-size 5 --steps 1", ["--batch-size", "4 training images"]),
        ("eval", ["--checkpoint"]),
        ("eval --checkpoint /nowhere/a.pt", ["/nowhere/a.pt"]),
        ("eval --checkpoint /nowhere/a.pt --threads 0", ["--threads", "0"]),
        ("predict --checkpoint a.pt --input /nowhere/x --out o", ["/nowhere/x"]),
        ("predict --checkpoint /nowhere/a.pt --out o", ["/nowhere/a.pt"]),
        ("predict --checkpoint a.pt --input x --data voc --out o", ["--input", "--data"]),
        ("predict --checkpoint a.pt --anchor left --out o", ["--anchor", "left"]),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, monkeypatch, words, texts):
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(call(capsys, *words.split()), *texts)


def test_wrong_weights_are_named(capsys, tmp_path):
    path = tmp_path / "vgg.pth"
    words = ["train", "--backbone", "vgg16", "--fc-channels", 8, "--steps", 1, "--out", tmp_path]
    assert_one_sentence(call(capsys, *words, "--weights", path), path)
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    assert_one_sentence(call(capsys, *words, "--weights", path), path, "features.0.weight")
    path.write_bytes(b"damaged")
    assert_one_sentence(call(capsys, *words, "--weights", path), path)


def test_label_out_of_range_names_the_file(capsys, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    for kind, shape in (("images", (9, 9, 3)), ("labels", (9, 9))):
        folder = tmp_path / kind / "train"
        folder.mkdir(parents=True)
        array = torch.full(shape, 9, dtype=torch.uint8).numpy()
        image.fromarray(array).save(folder / "a.png")
    (tmp_path / "classes.txt").write_text("x\ny\n")
    words = (
        f"train --data folder --root {tmp_path} --backbone demo --batch-size 1 --steps 1 "
        f"--eval-every 0 --out {tmp_path / 'run'}"
    )
    label = tmp_path / "labels" / "train" / "a.png"
    assert_one_sentence(call(capsys, *words.split()), label, "0 .. 1", "9")


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("DILSEG_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="/nowhere/a"):
        cli.main(["eval", "--checkpoint", "/nowhere/a.pt"])


def test_interrupt_is_no_traceback(capsys, monkeypatch):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", stop)
    code, _, err = call(capsys, "info")
    assert (code, err) == (130, "dilseg: interrupted\n")


def test_bench_runs_pytest_in_the_checkout(monkeypatch):
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("no source checkout")
    calls = []

    def fake(command, **options):
        calls.append((command, options))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", fake)
    assert cli.main(["bench", "-k", "dilated"]) == 3
    assert cli.main(["bench", "--set", "smoke", "--device", "cpu", "--threads", "2"]) == 3
    run = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks")]
    assert [command for command, _ in calls] == [
        [*run, "-k", "dilated", "--set", "quick"],
        [*run, "--set", "smoke", "--device", "cpu", "--threads", "2"],
    ]
    assert all(options["cwd"] == ROOT for _, options in calls)


def test_bench_without_a_checkout_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "dilseg" / "cli.py"))
    assert_one_sentence(call(capsys, "bench", "--set", "quick"), "source checkout")


def test_commands_start_without_heavy_imports():
    code = "import sys, dilseg.cli; print({'matplotlib', 'scipy', 'PIL'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_module_runs_as_the_command_does():
    done = subprocess.run(
        [sys.executable, "-m", "dilseg", "eval", "--checkpoint", "/nowhere/a.pt"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "dilseg: /nowhere/a.pt: there is no such checkpoint file."


def test_a_reader_that_leaves_early_is_no_error():
    words = [sys.executable, "-m", "dilseg", "info"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe) as info:
        info.stdout.close()  # as `dilseg info | head -0`
        assert info.stderr.read() == b""
        assert info.wait() == 141
