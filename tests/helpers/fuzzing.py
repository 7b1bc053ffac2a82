# SPDX-License-Identifier: Apache-2.0
"""Damages files at random and reads them, in a process of its own with little memory.

``python -m helpers.fuzzing FOLDER SEED COUNT`` reads COUNT damaged copies of each file that
:func:`originals` writes, and prints, per file, how many were read and how many were refused.
A reader may return or refuse with one sentence that names the file; anything else ends the process
with a traceback, as does a crash or more memory than :data:`MEMORY`.
"""

from __future__ import annotations

import json
import resource
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import scipy.io
from PIL import Image

from dilseg.data import KITTI, NYUDv2, read_image, read_label, save_palette_png
from dilseg.data.files import read_color_label, read_lines
from dilseg.data.folder import read_classes
from dilseg.data.matlab import hdf_frame, hdf_frames, open_hdf, read_mat

#: Bytes that readers may need on top of what the process has once everything is imported.
MEMORY = 2**29

LABEL = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 11


def read_frame(path: Path) -> None:
    with open_hdf(path) as file:
        hdf_frame(hdf_frames(file, "images", "uint8", 3, None, None), 1)
        hdf_frame(hdf_frames(file, "labels", "uint16", None, None), 1)


READERS = {
    "photo.png": read_image,
    "photo.jpg": read_image,
    "photo.tif": read_image,
    "photo.bmp": read_image,
    "photo.webp": read_image,
    "palette.png": lambda path: read_label(path, 11),
    "color.png": lambda path: read_color_label(path, KITTI.palette),
    "plain.mat": lambda path: read_mat(path, "S"),
    "packed.mat": lambda path: read_mat(path, "S"),
    "struct.mat": lambda path: read_mat(path, "GTcls", "Segmentation"),
    "frames.mat": read_frame,
    "stored.mat": read_frame,
    "list.txt": read_lines,
    "classes.txt": read_classes,
    "nyud": lambda path: NYUDv2(path, "test")[0],
}


def originals(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    for name in READERS:
        if name.startswith("photo."):
            Image.fromarray(pixels).save(folder / name)
    save_palette_png(folder / "palette.png", LABEL, KITTI.palette)
    Image.fromarray(KITTI.palette[LABEL]).save(folder / "color.png")
    for name in ("plain", "packed"):
        scipy.io.savemat(folder / f"{name}.mat", {"S": LABEL}, do_compression=name == "packed")
    cells = np.empty((2, 1), object)
    cells[:] = [["text"], [scipy.sparse.csc_matrix(np.eye(5))]]
    scipy.io.savemat(folder / "struct.mat", {"GTcls": {"Boundaries": cells, "Segmentation": LABEL}})
    for name, options in {"frames": {"compression": "gzip"}, "stored": {}}.items():
        write_frames(folder / f"{name}.mat", **options)
    lines = [f"2008_{i:06}" for i in range(40)]
    (folder / "list.txt").write_text("\n".join(lines))
    (folder / "classes.txt").write_text("road 1 2 3\nwet road\n# a comment\nsky 255 0 9\n")
    nyud = folder / "nyud"
    nyud.mkdir()
    write_frames(nyud / "nyu_depth_v2_labeled.mat", compression="gzip")
    scipy.io.savemat(nyud / "classMapping40.mat", {"mapClass": np.arange(1, 12)[None] % 40 + 1})
    scipy.io.savemat(nyud / "splits.mat", {"testNdxs": np.array([[2], [3]])})


def write_frames(path: Path, **options: object) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, size, kind in (("images", (3, 3, 32, 24), "u1"), ("labels", (3, 32, 24), "u2")):
            data = rng.integers(0, 11, size).astype(kind)
            file.create_dataset(name, data=data, **options)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with a few changes of the kinds that happen: flips, runs, cuts, repetitions."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        # Headers lie in front and at the ends of parts; half of the changes go to the front.
        reach = min(len(out), 256) if rng.random() < 0.5 else len(out)
        place = int(rng.integers(0, max(reach, 1)))
        kind = rng.integers(0, 6)
        if kind == 0:
            out[place : place + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 1:
            run = int(rng.integers(1, 9))
            out[place : place + run] = bytes([int(rng.choice([0, 1, 127, 128, 255]))]) * run
        elif kind == 2:
            del out[place:]
        elif kind == 3:
            del out[place : place + int(rng.integers(1, 9))]
        elif kind == 4:
            out[place:place] = out[place : place + int(rng.integers(1, 64))]
        else:
            out[place : place + 4] = int(rng.integers(0, 2**32)).to_bytes(4, "little")
    return bytes(out)


def with_checksums(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks put right, so that readers look into them."""
    out = bytearray(data)
    place = 8
    while place + 12 <= len(out):
        end = place + 8 + int.from_bytes(out[place : place + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(out)


def attempt(name: str, path: Path) -> bool:
    """Whether the file could be read; a refusal must be a sentence that names it."""
    try:
        READERS[name](path)
    except (ValueError, FileNotFoundError) as error:
        sentence = str(error)
        assert str(path.name) in sentence, sentence
        assert "expected" in sentence, sentence
        assert "got" in sentence, sentence
        assert len(sentence) < 1500, len(sentence)
        return False
    return True


def main(folder: Path, seed: int, count: int) -> None:
    originals(folder)
    for name in READERS:
        assert attempt(name, folder / name), name
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSize:"):
            limit = int(line.split()[1]) * 1024 + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    results = {}
    for name in READERS:
        rng = np.random.default_rng([seed, len(results)])
        path = folder / name
        targets = sorted(path.iterdir()) if path.is_dir() else [path]
        read = 0
        for turn in range(count):
            target = targets[turn % len(targets)]
            original = target.read_bytes()
            data = damaged(original, rng)
            target.write_bytes(with_checksums(data) if turn % 2 and name.endswith("png") else data)
            try:
                read += attempt(name, path)
            except BaseException:
                print(f"{name}, turn {turn} of seed {seed}", file=sys.stderr)
                raise
            target.write_bytes(original)
        results[name] = {"read": read, "refused": count - read}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
