# SPDX-License-Identifier: Apache-2.0
"""Output files that are either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import fcntl
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

__all__ = ["claim", "require", "write_atomic", "write_json"]

_EXTRAS = {"tqdm": "tqdm", "matplotlib": "matplotlib", "PIL": "pillow"}


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keeps other processes from claiming `folder`, which is created; a kill ends the claim too.

    Raises:
        ValueError: Another process has claimed it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            # Not flock: loader workers would inherit it and outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is training in it; wait for it or stop it, or give "
                "another --out."
            ) from None
        yield


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that a kill or a power cut leaves the old content or the new, never a part.

    The content goes to a temporary file in the same folder, is flushed to the disk and then renamed
    over `path`. The temporary name is fixed, so a killed run leaves at most one and the next write
    takes it over; a failed write, such as on a full disk, leaves none.

    Args:
        path: The file to write; its folder is created.
        write: Called with the open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
    os.replace(temporary, path)
    if os.name == "posix":  # The rename itself is durable only once the folder is on the disk.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _plain(value: object) -> object:
    """JSON has no nan or infinity: they become null, so that every reader can parse the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON atomically; nan and infinities become null."""
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    write_atomic(path, lambda file: file.write(f"{text}\n".encode()))


def require(module: str, purpose: str) -> ModuleType:
    """Imports a package of the `commands` extra, or says how to install it.

    Raises:
        ImportError: The package is missing; the message names it, its purpose and the command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = _EXTRAS.get(module.split(".")[0], module)
        raise ImportError(
            f"{purpose} needs the package {package}, which is not installed: "
            'run pip install "dilseg[commands]".'
        ) from None
