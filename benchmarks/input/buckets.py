"""Measures how many images per second are read from a bucket and from a disk, by one process and by several.

    python -m benchmarks.input.buckets [--images 200] [--pixels 640] [--workers 0 1 2] [--folder gs://BUCKET/NAME]

The images are JPEG files of smooth noise, of about the size of those that LLaVA trains on. They are read in random
order, decoded to RGB and thrown away, by `vr_jax.data.images` as training does it. What is measured is

* `read`: the bytes of each file alone, in the threads of one process;
* `decode`: bytes and pixels, in threads, and in the given numbers of worker processes of Grain.

Without --folder the store is the one of the tests (`tests/object_store.py`), which runs on this machine and shares its
cores. So the numbers of the bucket are a lower bound of what the client can do, and say nothing of a network.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import grain
import numpy as np
from absl import flags
from PIL import Image

from tests.object_store import BUCKET, Store
from vr_jax.data.images import decode_rgb, open_image
from vr_jax.storage import Path as AnyPath
from vr_jax.storage import UploadedFolder, as_path

THREADS = 16


def jpeg(number: int, pixels: int) -> bytes:
    """A JPEG file of smooth noise, whose size is that of a photograph."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (pixels // 8, pixels // 8, 3), np.uint8))
    stream = io.BytesIO()
    coarse.resize((pixels, pixels), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


class Decode(grain.transforms.Map):
    """Decodes an image, as the pipeline of training does."""

    def map(self, element: AnyPath) -> int:
        with open_image(element) as image:
            return decode_rgb(image).size[0]


def in_threads(function: Callable[[AnyPath], object], paths: Sequence[AnyPath]) -> float:
    begin = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(function, paths):
            pass
    return len(paths) / (time.perf_counter() - begin)


def in_processes(paths: Sequence[AnyPath], workers: int) -> float:
    """Images per second behind the first of each worker, whose start is not counted."""
    data = grain.MapDataset.source(list(paths)).map(Decode())
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * THREADS)
    reading = data.to_iter_dataset(options)
    if workers:
        reading = reading.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator = iter(reading)
    first = max(1, workers)
    for _ in range(first):
        next(iterator)
    begin = time.perf_counter()
    rest = sum(1 for _ in iterator)
    return rest / (time.perf_counter() - begin)


def parser() -> argparse.ArgumentParser:
    """The arguments of the script."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--images", type=int, default=200)
    found.add_argument("--pixels", type=int, default=640)
    found.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--folder")
    return found


def main() -> None:
    """Prints a table in Markdown."""
    options = parser().parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own
    store = None if options.folder else Store()
    if store is not None:
        os.environ.update(store.environment)
    try:
        with tempfile.TemporaryDirectory() as local:
            measure(options, as_path(options.folder or f"gs://{BUCKET}/images"), Path(local))
    finally:
        if store is not None:
            store.close()


def measure(options: argparse.Namespace, remote: AnyPath, local: Path) -> None:
    """Writes the images to both places, and reads them in turns."""
    with UploadedFolder(remote) as files:
        for number in range(options.images):
            data = jpeg(number, options.pixels)
            (local / f"{number}.jpg").write_bytes(data)
            (files.local / f"{number}.jpg").write_bytes(data)
        files.upload()
    names = [f"{number}.jpg" for number in np.random.default_rng(0).permutation(options.images)]
    size = statistics.mean((local / name).stat().st_size for name in names)
    print(f"{options.images} images of {options.pixels} x {options.pixels} pixels and {size / 1e3:.0f} kB; images/s,")
    print(f"the median of {options.rounds} rounds; {os.cpu_count()} cores, {THREADS} threads\n")
    print("| | disk | bucket | bucket / disk |\n|---|---|---|---|")

    def row(title: str, run: Callable[[list[AnyPath]], float]) -> None:
        rates: dict[AnyPath, list[float]] = {local: [], remote: []}
        for _ in range(options.rounds):
            for place, found in rates.items():
                found.append(run([place / name for name in names]))
        disk, bucket = (statistics.median(found) for found in rates.values())
        print(f"| {title} | {disk:.0f} | {bucket:.0f} | {bucket / disk:.2f} |", flush=True)

    row("read, threads", lambda paths: in_threads(lambda path: path.read_bytes(), paths))
    for workers in options.workers:
        title = f"decode, {workers} worker processes" if workers else "decode, threads"
        row(title, lambda paths, workers=workers: in_processes(paths, workers))


if __name__ == "__main__":
    main()
