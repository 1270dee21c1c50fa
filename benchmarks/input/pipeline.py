"""Measures the images per second of one core, for vr_jax's `Processor` and for transformers' image processors.

    python -m benchmarks.input.pipeline [--images DIR [DIR ...]] [--tokenizer DIR] [--rounds 5] [--count 60]

The time of vr_jax covers everything from a file to a sample: decoding, AnyRes9 tiles, tokenisation and masks. The time
of transformers covers decoding and LLaVA-OneVision's image processor, and no text. Its processor on Pillow always
runs, and the one on torchvision runs where torchvision is installed. All of them read the same files with the same
grids. The script first checks that the tiles are equal to those of the processor on Pillow. The one on torchvision
resizes in another way, so its difference is only printed.

Everything runs in one thread on one core. The script measures CPU time, because a busy machine stretches it less than
wall time. Without --images it draws the images: charts as PNG files and textures as JPEG files. The goal is twice the
speed of transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries are loaded
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, LlavaOnevisionImageProcessorPil

from benchmarks import arguments
from benchmarks.evaluation.lmms_eval import chart
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.data.types import IMAGE, Conversation, Turn
from vr_jax.model.config import VlmConfig, anyres9
from vr_jax.model.refusion.vision_remember import VisionRememberConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
QUESTION = "\nWhat does the image show? Answer with one short sentence."
ANSWER = "A chart of four bars, the highest of which is at the right."


def found(folders: list[Path], count: int) -> list[Path]:
    """Finds images in folders and the folders below them.

    Args:
        folders: The folders. The same number of images is taken from each, in the order of their names.
        count: The largest number of images in total.

    Raises:
        SystemExit: No folder holds an image.
    """
    per_folder = [
        sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[: -(-count // len(folders))]
        for folder in folders
    ]
    files = [path for paths in per_folder for path in paths][:count]
    if not files:
        raise SystemExit(f"no images ({', '.join(SUFFIXES)}) in {', '.join(map(str, folders))}")
    return files


def drawn(folder: Path, count: int) -> list[Path]:
    """Draws charts and textures in turns into files of a folder."""
    files = []
    for number in range(count):
        path = folder / f"{number}.{'jpg' if number % 2 else 'png'}"
        path.write_bytes(texture(number) if number % 2 else chart(number))
        files.append(path)
    return files


def texture(number: int) -> bytes:
    """Draws a texture with detail at all scales and returns the bytes of a JPEG file of 640 x 480 pixels."""
    rng = np.random.default_rng(number)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((640, 480)) for side in (4, 32, 240)
    ]
    file = io.BytesIO()
    Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def opened(path: Path) -> Image.Image:
    """Decodes an image file to RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def processors() -> dict[str, Callable[[Path], np.ndarray]]:
    """The image processors of transformers by name.

    Each takes a file and returns its normalised tiles (tiles, 3, H, W).
    """
    config = anyres9()
    arguments = {
        "image_grid_pinpoints": [[h * config.tile_size, w * config.tile_size] for w, h in config.grids],
        "size": {"height": config.tile_size, "width": config.tile_size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    found: dict[str, Callable[[Path], np.ndarray]] = {}

    def add(name: str, processor: Callable) -> None:
        found[name] = lambda path: processor(opened(path), return_tensors="np")["pixel_values"][0]

    add("transformers, Pillow", LlavaOnevisionImageProcessorPil(**arguments))
    if importlib.util.find_spec("torchvision"):
        add("transformers, torchvision", transformers.LlavaOnevisionImageProcessor(**arguments))
    else:
        print("torchvision is not installed: transformers' processor that needs it is left out")
    return found


def compare(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Compares the tiles of one image.

    Args:
        ours: Tiles (tiles, H, W, 3) with values of 0 to 255.
        theirs: Normalised tiles (tiles, 3, H, W) with values of -1 to 1.

    Returns:
        The largest difference of a value on the scale of 0 to 255.

    Raises:
        SystemExit: The numbers of tiles differ.
    """
    if ours.shape[0] != theirs.shape[0]:
        raise SystemExit(f"vr_jax makes {ours.shape[0]} tiles of an image, and transformers {theirs.shape[0]}")
    pixels = np.rint((theirs.transpose(0, 2, 3, 1) + 1) * 127.5).astype(int)
    return int(np.abs(pixels - ours).max())


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--images", type=arguments.path, nargs="+", help="folders with images; default: drawn images")
    flags.add_argument("--tokenizer", type=arguments.path, help="folder of a tokenizer; default: that of the demo")
    flags.add_argument("--rounds", type=int, default=5, help="passes over all images, in turns")
    flags.add_argument("--count", type=int, default=60, help="number of images")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Compares the tiles, times all processors in turns and prints the result."""
    options = parser().parse_args(arguments)
    with one_core():
        measure(options)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this process on one core, and torch in one thread, until the block ends."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    if cores is not None:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)


def measure(options: argparse.Namespace) -> None:
    """Compares the tiles, times all processors in turns and prints the result."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else demo_tokenizer()
    processor = Processor(tokenizer, VlmConfig(image=anyres9(), refusion=VisionRememberConfig()))
    turns = (Turn("user", IMAGE, QUESTION), Turn("assistant", ANSWER))

    def sample(path: Path) -> np.ndarray:
        return processor.example(Conversation(path.name, turns, (path,))).tile_pixels

    with tempfile.TemporaryDirectory() as folder:
        files = found(options.images, options.count) if options.images else drawn(Path(folder), options.count)
        ways = {"vr_jax, with text": sample, **processors()}
        tiles = {path: sample(path) for path in files}
        print(f"{platform.processor() or platform.machine()}, Pillow {Image.__version__}, ", end="")
        print(f"transformers {transformers.__version__}; {len(files)} images, {sum(map(len, tiles.values()))} tiles")
        for name, way in list(ways.items())[1:]:
            differences = [compare(tiles[path], way(path)) for path in files]
            print(f"  {name}: same tiles, pixels differ by at most {max(differences)} of 255")
            if "Pillow" in name and max(differences):
                raise SystemExit("the tiles are not equal: no comparison of speed")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                start = time.process_time()
                for path in files:
                    way(path)
                seconds[name].append(time.process_time() - start)
    ours = statistics.median(seconds["vr_jax, with text"])
    for name, values in seconds.items():
        rates = sorted(len(files) / value for value in values)
        print(
            f"  {name:<28} {statistics.median(rates):6.1f} images/s ({rates[0]:.1f} .. {rates[-1]:.1f}), "
            f"x {statistics.median(values) / ours:.2f} of our time"
        )


if __name__ == "__main__":
    main()
