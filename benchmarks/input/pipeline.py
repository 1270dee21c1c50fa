"""Images per second of one core: the training input's `Processor` against transformers' image processors.

    python -m benchmarks.input.pipeline [--images DIR [DIR ...]] [--tokenizer DIR] [--rounds 5] [--count 60]

Ours is the whole way from a file to a sample: decoding, AnyRes9 tiles, tokenisation, masks, vision tokens. Theirs is
decoding and LLaVA-OneVision's image processor, without any text: the one on Pillow, and the one on torchvision where
that is installed. Same files, same grids; that the tiles are equal is checked first (the one on torchvision resizes in
its own way and is not held to it). One thread each, on one core, and its CPU time, which a busy machine stretches less
than wall time. Without --images, they are drawn: charts as PNG, textures as JPEG. The goal is twice their speed."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries are loaded
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, LlavaOnevisionImageProcessorPil

from benchmarks.evaluation.lmms_eval import chart
from vr_jax.data.demo.tokenizer import demo_tokenizer
from vr_jax.data.processor import Processor
from vr_jax.data.types import Conversation, Turn
from vr_jax.model.config import VlmConfig, anyres9
from vr_jax.model.refusion.vision_remember import VisionRememberConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
QUESTION = "<image>\nWhat does the image show? Answer with one short sentence."
ANSWER = "A chart of four bars, the highest of which is at the right."


def found(folders: list[Path], count: int) -> list[Path]:
    """As many from each folder, in the order of their names."""
    per_folder = [
        sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[: -(-count // len(folders))]
        for folder in folders
    ]
    files = [path for paths in per_folder for path in paths][:count]
    if not files:
        raise SystemExit(f"no images ({', '.join(SUFFIXES)}) in {', '.join(map(str, folders))}")
    return files


def drawn(folder: Path, count: int) -> list[Path]:
    """Charts and textures in turns."""
    files = []
    for number in range(count):
        path = folder / f"{number}.{'jpg' if number % 2 else 'png'}"
        path.write_bytes(texture(number) if number % 2 else chart(number))
        files.append(path)
    return files


def texture(number: int) -> bytes:
    """A JPEG file of COCO's size with detail at all scales."""
    rng = np.random.default_rng(number)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((640, 480)) for side in (4, 32, 240)
    ]
    file = io.BytesIO()
    Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def processors() -> dict[str, Callable[[Path], np.ndarray]]:
    """transformers' ways from a file to normalised tiles, (tiles, 3, H, W)."""
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
    """The largest difference of two images' tiles in steps of 1/255, as whole pixels."""
    if ours.shape[0] != theirs.shape[0]:
        raise SystemExit(f"{ours.shape[0]} tiles against {theirs.shape[0]}")
    pixels = np.rint((theirs.transpose(0, 2, 3, 1) + 1) * 127.5).astype(int)
    return int(np.abs(pixels - ours).max())


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--images", type=Path, nargs="+", help="folders, searched with those below")
    flags.add_argument("--tokenizer", type=Path, help="directory of a tokenizer; default: the demo's")
    flags.add_argument("--rounds", type=int, default=5, help="passes over all images, in turns")
    flags.add_argument("--count", type=int, default=60)
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Compares the tiles, times all ways in turns and prints the result."""
    options = parser().parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else demo_tokenizer()
    processor = Processor(tokenizer, VlmConfig(image=anyres9(), refusion=VisionRememberConfig()))
    turns = (Turn("user", QUESTION), Turn("assistant", ANSWER))

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
