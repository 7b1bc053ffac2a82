# SPDX-License-Identifier: Apache-2.0
"""The command line: ``dilseg {info,train,recipes,reproduce,eval,predict,convert,bench}``."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

__all__ = ["main"]

EXPECTED_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError)
"""What a wrong argument, file or machine raises; anything else is a bug and shows its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code: 0, 1 where `bench` found another result, 2 after a wrong argument or file
        (one sentence on stderr), 130 after a training was interrupted and kept, 141 when the reader
        of a pipe left early.
    """
    try:
        parser = _parser()
        args, rest = parser.parse_known_args(argv)
        if args.run is _bench:
            args.pytest_arguments = rest
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("dilseg: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader, such as `head`, has left; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except EXPECTED_ERRORS as error:
        if os.environ.get("DILSEG_DEBUG") == "1":
            raise
        print(f"dilseg: {_sentence(error)}", file=sys.stderr)
        return 2


def _sentence(error: BaseException) -> str:
    """The message on one line; an OSError without one of ours gets its file and reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


# Parsers ---------------------------------------------------------------------------------------


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, as all others."""

    def error(self, message: str) -> NoReturn:
        """Prints the sentence and leaves with code 2."""
        print(f"{self.prog}: {message}; see {self.prog} --help.", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dilseg",
        description="Semantic segmentation with FCN and DilatedNet on hand-written kernels.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _info_parser(commands)
    _train_parser(commands)
    _recipes_parser(commands)
    _reproduce_parser(commands)
    _eval_parser(commands)
    _predict_parser(commands)
    _convert_parser(commands)
    _bench_parser(commands)
    return parser


_AMP = ("off", "bf16", "fp16")
_DATA = (
    "shapes, folder (your own images), voc, voc2011, sbd, nyud, nyud-hha, nyud-rgbd, nyud-rgb-hha, "
    "siftflow, siftflow-geometric, siftflow-both, pascal-context, camvid, camvid-dilatednet, kitti "
    "or cityscapes"
)


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")
    group.add_argument("--amp", choices=_AMP, default="off", help="autocast precision (off)")
    group.add_argument("--channels-last", action="store_true", help="run in channels_last")


def _info_parser(commands: _Commands) -> None:
    info = commands.add_parser("info", help="versions, build, devices and registered operators")
    info.set_defaults(run=_info)


def _train_parser(commands: _Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a network; also under torchrun",
        description="Train a network. Options left out take the defaults of the data and model, "
        "printed in DIR/record.json; docs/training.md explains them.",
        # Only what is given appears in the namespace: defaults are the engine's business, and a
        # resumed run compares what is given with what it was started with.
        argument_default=argparse.SUPPRESS,
    )
    flag = argparse.BooleanOptionalAction
    train.add_argument(
        "--recipe",
        metavar="NAME",
        help="start from a published training's values (`dilseg recipes` lists them); options "
        "given beside it take their place",
    )
    group = train.add_argument_group("data")
    group.add_argument("--data", metavar="NAME", help=f"{_DATA} (shapes)")
    group.add_argument("--root", metavar="DIR", help="folder of the data set")
    group.add_argument("--train-split", metavar="SPLIT", help="split to train on (train)")
    group.add_argument("--eval-split", metavar="SPLIT", help="split to evaluate on (val)")
    group.add_argument("--limit", type=int, metavar="N", help="train on N images, evenly spaced")
    group.add_argument(
        "--eval-limit", type=int, metavar="N", help="evaluate on N images, evenly spaced"
    )
    group.add_argument(
        "--crop", type=int, nargs=2, metavar=("H", "W"), help="random crop (whole images)"
    )
    group.add_argument(
        "--scale", type=float, nargs=2, metavar=("LO", "HI"), help="random scale (none)"
    )
    group.add_argument("--flip", action=flag, help="mirror half of the images (yes)")
    group.add_argument(
        "--replacement", action=flag, help="draw images with replacement (each once an epoch)"
    )
    group.add_argument("--workers", type=int, metavar="N", help="loader processes (0; 4 on a GPU)")
    group.add_argument(
        "--cache", type=float, metavar="GIB", help="memory for decoded images, per process (none)"
    )

    group = train.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="fcn32s, fcn32s-late (colour and HHA), fcn16s, fcn8s (default), frontend, dilatednet",
    )
    group.add_argument(
        "--backbone",
        metavar="NAME",
        help="vgg16 or demo (demo for shapes); for fcn32s also alexnet, googlenet",
    )
    group.add_argument("--weights", metavar="FILE", help="torchvision VGG-16 weights to start from")
    group.add_argument("--init", metavar="FILE", help="earlier stage to start from")
    group.add_argument(
        "--init-hha", metavar="FILE", help="fcn32s-late: that on HHA; --init is that on colour"
    )
    group.add_argument("--context", metavar="WIDTH", help="context module: basic or large (basic)")
    group.add_argument(
        "--dilations", type=int, nargs="+", metavar="N", help="of its layers (1 1 2 4 8 16 1)"
    )
    group.add_argument("--stage", metavar="STAGE", help="dilatednet: all, context or joint (all)")
    group.add_argument(
        "--store-features",
        action=flag,
        help="stage context: compute the front end's scores once, into the run folder (no)",
    )
    group.add_argument(
        "--fc-channels", type=int, metavar="N", help="width of fc6, fc7 (vgg16: 4096)"
    )
    group.add_argument("--dropout", type=float, metavar="P", help="after fc6, fc7 (vgg16: 0.5)")
    group.add_argument(
        "--at-once", action=flag, help="FCN: scale pool4 by 1e-2, pool3 by 1e-4 (no)"
    )
    group.add_argument("--learned-upsampling", action=flag, help="FCN: train deconvolutions (no)")

    group = train.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    group.add_argument("--steps", type=int, metavar="N", help="optimiser steps, instead of epochs")
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="images per batch, all processes"
    )
    group.add_argument(
        "--accumulate", type=int, metavar="N", help="batches per step, gradients averaged (1)"
    )
    group.add_argument("--optimizer", metavar="NAME", help="sgd or adamw")
    group.add_argument("--lr", type=float, metavar="X", help="learning rate (biases twice, SGD)")
    group.add_argument("--momentum", type=float, metavar="X", help="of SGD (0.9)")
    group.add_argument("--weight-decay", type=float, metavar="X", help="of weights, not of biases")
    group.add_argument(
        "--plain-trunk-biases",
        action=flag,
        help="rate and decay of weights for the trunk's biases (no)",
    )
    group.add_argument(
        "--head-lr-multiplier", type=float, metavar="X", help="for layers not loaded (1)"
    )
    group.add_argument("--schedule", metavar="NAME", help="constant or poly")
    group.add_argument("--warmup", type=int, metavar="STEPS", help="linear rise of the rate (0)")
    group.add_argument("--clip-norm", type=float, metavar="X", help="largest gradient norm (none)")
    group.add_argument("--loss", metavar="KIND", help="mean over pixels, or sum over them (mean)")
    group.add_argument("--class-weights", metavar="KIND", help="none or median frequency (none)")
    group.add_argument("--label-smoothing", type=float, metavar="X", help="in [0, 1) (0)")
    group.add_argument(
        "--loss-sampling", type=float, metavar="P", help="share of cells whose labels count (1)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of everything random (0)")

    group = train.add_argument_group("machine")
    group.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (auto)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")
    group.add_argument("--amp", metavar="KIND", help="off, bf16 or fp16 autocast (off)")
    group.add_argument("--channels-last", action=flag, help="train in channels_last (no)")
    group.add_argument(
        "--deterministic", action=flag, help="repeatable cuDNN algorithms only (yes)"
    )

    group = train.add_argument_group("run folder")
    group.add_argument("--out", metavar="DIR", help="run folder (runs/DATA-MODEL)")
    group.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    group.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    group.add_argument("--save-every", type=int, metavar="STEPS", help="between checkpoints")
    group.add_argument(
        "--eval-every", type=int, metavar="STEPS", help="between evaluations; 0: never (an epoch)"
    )
    train.set_defaults(run=_train)


def _recipes_parser(commands: _Commands) -> None:
    recipes = commands.add_parser("recipes", help="list the published trainings that have a name")
    recipes.add_argument("names", nargs="*", metavar="NAME", help="show all values of this one")
    recipes.set_defaults(run=_recipes)


def _reproduce_parser(commands: _Commands) -> None:
    reproduce = commands.add_parser(
        "reproduce",
        help="train and score a published experiment, and write the table",
        description="Train the networks of a published experiment, score them on test, and write "
        "DIR/reproduction.json and .md. Called again, it goes on where it was stopped. camvid: "
        "DilatedNet (front end, then context module) and FCN-8s.",
        argument_default=argparse.SUPPRESS,  # what is left out is the experiment's
    )
    reproduce.add_argument("name", metavar="NAME", choices=("camvid",), help="camvid")
    reproduce.add_argument("--root", required=True, metavar="DIR", help="folder of the data set")
    reproduce.add_argument("--out", required=True, metavar="DIR", help="folder for runs and table")
    reproduce.add_argument("--weights", metavar="FILE", help="torchvision VGG-16 weights")
    flag = argparse.BooleanOptionalAction
    group = reproduce.add_argument_group("smaller than published")
    group.add_argument(
        "--stage-steps",
        dest="steps",
        type=int,
        nargs="+",
        metavar="N",
        help="steps of front end, context module and FCN-8s (3000 2000 4000)",
    )
    group.add_argument("--limit", type=int, metavar="N", help="train on N images, evenly spaced")
    group.add_argument("--eval-limit", type=int, metavar="N", help="score N images, evenly spaced")
    group.add_argument("--eval-every", type=int, metavar="STEPS", help="on val (1000)")
    group.add_argument("--save-every", type=int, metavar="STEPS", help="checkpoints (1000)")
    group.add_argument("--batch-size", type=int, metavar="N", help="images per batch (8, 8, 2)")
    group.add_argument("--backbone", metavar="NAME", help="vgg16 or demo (vgg16)")
    group.add_argument("--fc-channels", type=int, metavar="N", help="width of fc6, fc7 (4096)")
    group = reproduce.add_argument_group("machine")
    group.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (auto)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")
    group.add_argument("--workers", type=int, metavar="N", help="loader processes (0; 4 on a GPU)")
    group.add_argument("--cache", type=float, metavar="GIB", help="for decoded images (2)")
    group.add_argument("--amp", metavar="KIND", help="off, bf16 or fp16 autocast (bf16)")
    group.add_argument("--channels-last", action=flag, help="train in channels_last (yes)")
    group.add_argument("--deterministic", action=flag, help="repeatable cuDNN only (yes)")
    group.add_argument("--seed", type=int, metavar="N", help="seed of everything random (0)")
    reproduce.set_defaults(run=_reproduce)


def _eval_parser(commands: _Commands) -> None:
    evaluate = commands.add_parser("eval", help="score a checkpoint on whole images")
    evaluate.add_argument("--checkpoint", required=True, metavar="FILE", help="such as best.pt")
    group = evaluate.add_argument_group("data (default: that of the training)")
    group.add_argument("--data", metavar="NAME", help=_DATA)
    group.add_argument("--root", metavar="DIR", help="folder of the data set")
    group.add_argument("--split", metavar="SPLIT", help="split to score")
    group.add_argument("--limit", type=int, metavar="N", help="only N images, evenly spaced")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="loader processes (0)")
    group = evaluate.add_argument_group("output")
    group.add_argument(
        "--out",
        metavar="FILE",
        help="JSON (eval-SPLIT.json by the checkpoint); Markdown goes beside it, as .md",
    )
    group.add_argument("--predictions", metavar="DIR", help="also write predicted label maps")
    _add_inference(evaluate.add_argument_group("inference"))
    _add_machine(evaluate.add_argument_group("machine"))
    evaluate.set_defaults(run=_eval)


def _add_inference(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="images of equal size at once, neighbours only (1)",
    )
    group.add_argument(
        "--tile",
        type=int,
        metavar="N",
        help="DilatedNet: tiles of N pixels a side, same result in less memory (whole images)",
    )
    group.add_argument(
        "--anchor",
        choices=("centre", "corner"),
        default="centre",
        help="DilatedNet: corner zooms probabilities as its VOC, CamVid, KITTI release (centre)",
    )


def _predict_parser(commands: _Commands) -> None:
    predict = commands.add_parser(
        "predict",
        help="label maps and overlays for image files",
        description="Label maps and overlays for image files, or for the images of a data set: "
        "without --input, --data, --root and --split say which; left out, those of the training.",
    )
    predict.add_argument("--checkpoint", required=True, metavar="FILE", help="such as best.pt")
    predict.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    group = predict.add_argument_group("images")
    group.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="image files, folders, patterns such as 'a/*.jpg' or video frames a/%%05d.png",
    )
    group.add_argument(
        "--recursive", action="store_true", help="also what is in folders inside a folder"
    )
    group.add_argument("--data", metavar="NAME", help=_DATA)
    group.add_argument("--root", metavar="DIR", help="folder of the data set")
    group.add_argument("--split", metavar="SPLIT", help="split, which needs no labels")
    group.add_argument("--limit", type=int, metavar="N", help="only N images, evenly spaced")
    group = predict.add_argument_group("results")
    group.add_argument("--alpha", type=float, default=0.5, metavar="X", help="overlay opacity")
    group.add_argument(
        "--overlay",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write NAME_overlay.png (yes)",
    )
    group.add_argument(
        "--confidence",
        action="store_true",
        help="also write NAME_confidence.png: the probability of each pixel's class, white for 1",
    )
    group.add_argument("--head", metavar="NAME", help="which of several heads (the first)")
    group.add_argument(
        "--probabilities",
        action="store_true",
        help="also write NAME_probabilities.npz: those of all classes, float16 [classes, h, w]",
    )
    group.add_argument(
        "--submission",
        metavar="FORM",
        help="label maps alone, as a server takes them: voc2012-comp5, voc2012-comp6 (trained on "
        "other data too), the same of voc2011, cityscapes",
    )
    _add_inference(predict.add_argument_group("inference"))
    _add_machine(predict.add_argument_group("machine"))
    predict.set_defaults(run=_predict)


def _convert_parser(commands: _Commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="make a checkpoint of original Caffe weights or of torchvision's VGG-16",
        description="Make a checkpoint of a .caffemodel or of a torchvision VGG-16 state dict. "
        "Every layer of the file is accounted for; docs/original-weights.md has the commands for "
        "the published nets.",
    )
    convert.add_argument(
        "--from", required=True, dest="source", metavar="FILE", help="the weights to convert"
    )
    convert.add_argument(
        "--model",
        metavar="NAME",
        help="fcn32s, fcn32s-late, fcn16s, fcn8s, frontend, dilatednet (that of a released net)",
    )
    convert.add_argument(
        "--net",
        metavar="NAME",
        help="released net, such as fcn8s-heavy-pascal, in place of --model (name of the file)",
    )
    convert.add_argument(
        "--out", metavar="FILE", help="the checkpoint (name of the weights, with suffix .pt)"
    )
    group = convert.add_argument_group("classes")
    group.add_argument("--classes", type=int, metavar="N", help="number of classes")
    group.add_argument(
        "--data", metavar="NAME", help="data set, such as voc: class names and colours"
    )
    group.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="names in the file's order; with --data, outputs are put into the data's order",
    )
    group.add_argument("--head", metavar="SUFFIX", help="which of several heads, such as sem")
    group.add_argument(
        "--heads",
        nargs="+",
        type=_head,
        metavar="SUFFIX=N",
        help="all heads, with their classes: sem=33 geo=3",
    )
    group = convert.add_argument_group("input of the original net")
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="X",
        help="mean on 0-255 of three channels (six: colour and HHA), in the file's order",
    )
    group.add_argument("--scale", type=float, metavar="X", help="factor after the mean (1)")
    group.add_argument(
        "--bgr",
        action=argparse.BooleanOptionalAction,
        help="channels are B, G, R (yes for a .caffemodel, else no)",
    )
    group = convert.add_argument_group("network")
    group.add_argument("--backbone", metavar="NAME", help="fcn32s: alexnet or googlenet (vgg16)")
    group.add_argument("--depth", action="store_true", help="FCN: depth as a fourth channel")
    group.add_argument(
        "--learned-upsampling", action="store_true", help="FCN: deconvolutions as weights"
    )
    convert.set_defaults(run=_convert)


def _head(text: str) -> tuple[str, int]:
    """Suffix and number of classes of a head."""
    name, _, count = text.partition("=")
    if not name or not count.isdecimal() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"expected SUFFIX=N such as sem=33, but got {text!r}")
    return name, int(count)


def _bench_parser(commands: _Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="time your own model before and after the swap, or a few layers",
        description=(
            "With --model: swap the dilated convolutions of your own model, compare its results "
            "and time it before and after, layer by layer. Without: compare and time a handful of "
            "layers against torch's. Further arguments, such as --set quick, go to pytest and run "
            "the benchmarks of a source checkout."
        ),
    )
    bench.set_defaults(run=_bench)
    bench.add_argument(
        "--model", metavar="MODULE:FUNCTION", help="what makes your model, also FILE.py:FUNCTION"
    )
    bench.add_argument(
        "--input",
        action="append",
        metavar="N,C,H,W",
        help="size of the model's input, once per argument",
    )
    bench.add_argument("--step", action="store_true", help="time training steps, not inference")
    bench.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (float32)")
    bench.add_argument("--min-dilation", type=int, default=2, metavar="D", help="from which (2)")
    bench.add_argument("--channels-last", action="store_true", help="run in channels_last")
    bench.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (auto)")
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")
    bench.add_argument(
        "--seconds", type=float, metavar="S", help="to time a model (3) or layer (1)"
    )
    bench.add_argument("--json", metavar="FILE", help="also write the figures here")


# Commands --------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    import torch

    import dilseg

    rows: list[tuple[str, Any]] = [
        ("dilseg", dilseg.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
    ]
    rows += [(f"build: {key}", value) for key, value in dilseg.build_info().items()]
    rows.append(("cpu threads", torch.get_num_threads()))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows.append(
                (
                    f"cuda:{index}",
                    f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                    f"{properties.total_memory / 2**30:.0f} GiB",
                )
            )
    else:
        rows.append(("cuda devices", "none usable by this torch"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {_shown(value)}")
    print("\noperators")
    for schema in sorted(_operator_schemas()):
        print(f"  {schema}")
    return 0


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _operator_schemas() -> list[str]:
    import torch

    schemas = torch._C._jit_get_all_schemas()
    return [str(schema) for schema in schemas if schema.name.startswith("dilseg::")]


def _train(args: argparse.Namespace) -> int:
    from dilseg.engine import configure, resume_config, train

    given = {key: value for key, value in vars(args).items() if key != "run"}
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: give one of them.")
    if resume:
        if "out" not in given:
            raise ValueError("--resume: name the run folder with --out.")
        config = resume_config(given.pop("out"), **given)
    else:
        config = configure(**given)
    result = train(config, resume=resume, overwrite=overwrite)
    return 0 if result["status"] == "finished" else 128 + signal.SIGINT


def _recipes(args: argparse.Namespace) -> int:
    from dilseg.engine.recipes import RECIPES, find_recipe

    if args.names:
        print("\n\n".join(str(find_recipe(name)) for name in args.names))
        return 0
    width = max(map(len, RECIPES))
    for recipe in RECIPES.values():
        print(f"{recipe.name:<{width}}  {recipe.title}")
    return 0


def _reproduce(args: argparse.Namespace) -> int:
    from dilseg.engine import reproduce

    given = {key: value for key, value in vars(args).items() if key != "run"}
    result = reproduce(**given)
    return 0 if result["status"] == "finished" else 128 + signal.SIGINT


def _use_threads(args: argparse.Namespace) -> None:
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: expected a number >= 1, but got {args.threads}.")
        torch.set_num_threads(args.threads)


def _eval(args: argparse.Namespace) -> int:
    from dilseg.engine import evaluate

    _use_threads(args)
    evaluate(
        args.checkpoint,
        data=args.data,
        root=args.root,
        split=args.split,
        limit=args.limit,
        out=args.out,
        predictions=args.predictions,
        device=args.device,
        amp=args.amp,
        channels_last=args.channels_last,
        workers=args.workers,
        batch_size=args.batch_size,
        tile=args.tile,
        anchor=args.anchor,
    )
    return 0


def _predict(args: argparse.Namespace) -> int:
    from dilseg.engine import predict

    _use_threads(args)
    failures = predict(
        args.checkpoint,
        args.input,
        args.out,
        recursive=args.recursive,
        data=args.data,
        root=args.root,
        split=args.split,
        limit=args.limit,
        device=args.device,
        amp=args.amp,
        channels_last=args.channels_last,
        batch_size=args.batch_size,
        tile=args.tile,
        anchor=args.anchor,
        alpha=args.alpha,
        overlay=args.overlay,
        confidence=args.confidence,
        head=args.head,
        probabilities=args.probabilities,
        submission=args.submission,
    )
    for failure in failures:
        print(f"dilseg: {' '.join(failure.split())}", file=sys.stderr)
    return 2 if failures else 0


def _convert(args: argparse.Namespace) -> int:
    from dilseg.engine import convert

    convert(
        args.source,
        args.model,
        net=args.net,
        backbone=args.backbone,
        depth=args.depth,
        classes=args.classes,
        data=args.data,
        class_names=args.class_names,
        mean=args.mean,
        scale=args.scale,
        bgr=args.bgr,
        head=args.head,
        heads=None if args.heads is None else dict(args.heads),
        learned_upsampling=args.learned_upsampling,
        out=args.out,
    )
    return 0


def _bench(args: argparse.Namespace) -> int:
    if args.model is not None:
        return _bench_model(args)
    for name in ("input", "step"):
        if getattr(args, name):
            raise ValueError(f"--{name}: goes with --model.")
    if not args.pytest_arguments:
        return _bench_layers(args)
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: {args.pytest_arguments[0]} is for the benchmarks of a source checkout; "
            "run it in one, or run `dilseg bench` without it."
        )
    from dilseg.engine.files import require

    require("pytest_benchmark", "dilseg bench")
    arguments = list(args.pytest_arguments)
    for name in ("device", "threads", "seconds"):
        if (value := getattr(args, name)) is not None:
            arguments += [f"--{name}", str(value)]
    if not any(word.split("=")[0] == "--set" for word in arguments):
        arguments += ["--set", "quick"]
    command = [sys.executable, "-m", "pytest", str(folder), *arguments]
    return subprocess.run(command, cwd=folder.parent, check=False).returncode


def _bench_layers(args: argparse.Namespace) -> int:
    from dilseg.engine.bench_layers import bench_layers

    _use_threads(args)
    same = bench_layers(
        dtype=args.dtype,
        channels_last=args.channels_last,
        device=args.device or "auto",
        seconds=1.0 if args.seconds is None else args.seconds,
        json=args.json,
    )
    return 0 if same else 1


def _bench_model(args: argparse.Namespace) -> int:
    if args.pytest_arguments:
        raise ValueError(f"--model: goes without {args.pytest_arguments[0]}; see --help.")
    if args.input is None:
        raise ValueError("--model: needs --input N,C,H,W, the size of what the model takes.")
    from dilseg.engine.bench import bench_model

    _use_threads(args)
    same = bench_model(
        args.model,
        args.input,
        dtype=args.dtype,
        channels_last=args.channels_last,
        device=args.device or "auto",
        min_dilation=args.min_dilation,
        step=args.step,
        seconds=3.0 if args.seconds is None else args.seconds,
        json=args.json,
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
