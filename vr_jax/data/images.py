"""Encoded image files: where they may lie, and opening them without trusting them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vr_jax.data.skips import SkipRecord

# Formats with a decoder inside Pillow; others (EPS, for one) would start external programs on untrusted files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# What Pillow's decoders raise for damaged files.
DECODE_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError),
    *(struct.error, zlib.error),
)
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # Pillow's guess at a decompression bomb: 89 million


def locate(folder: Path, name: object, *, follow_links: bool = False) -> Path:
    """The file `name` below `folder` (resolved by the caller). Raises SkipRecord "outside_folder" for an absolute path,
    one that climbs out, or a symbolic link that leads out (unless follow_links); "malformed_record" for no path."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise SkipRecord("malformed_record", f"image: expected a file name, found {name!r}")
    path = folder / name
    lexical = Path(*_collapsed(path))
    try:
        real = lexical if follow_links else path.resolve()
    except (OSError, RuntimeError) as error:
        raise SkipRecord("missing_image", f"{name}: {error}") from error
    if not (lexical.is_relative_to(folder) and real.is_relative_to(folder)):
        raise SkipRecord("outside_folder", f"{name!r} leaves the image folder {folder}")
    return path


def _collapsed(path: Path) -> list[str]:
    """The parts of an absolute path with every `..` taken back, without looking at links."""
    parts: list[str] = []
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif len(parts) > 1:
            parts.pop()
    return parts


def open_image(source: Path | bytes, *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Opens an encoded image without decoding it; `size` is known afterwards. The caller closes it.

    Raises SkipRecord: "missing_image" (no such readable file), "broken_image" (no known format), "image_too_large"
    (more than max_pixels; Pillow's own limit of twice its MAX_IMAGE_PIXELS stays)."""
    if not isinstance(source, bytes | Path):
        raise SkipRecord("malformed_record", f"image: expected bytes or a path, found {type(source).__name__}")
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, Path) and not source.is_file():
            raise SkipRecord("missing_image", f"{name}: no such file")
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkipRecord("image_too_large", f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise SkipRecord("broken_image", f"{name}: not an image ({', '.join(FORMATS)})") from error
    except DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise SkipRecord("missing_image", f"{name}: {error.strerror}") from error
        raise SkipRecord("broken_image", f"{name}: {error}") from error
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        image.close()
        raise SkipRecord("image_too_large", f"{name}: {width} x {height} pixels, allowed {max_pixels}")
    return image


def decode_rgb(image: Image.Image) -> Image.Image:
    """The opened image's pixels as RGB, alpha dropped. Raises SkipRecord "broken_image", e.g. if truncated."""
    name, size = getattr(image, "filename", "") or "encoded image", image.size
    try:
        image.load()
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    except DECODE_ERRORS as error:
        raise SkipRecord("broken_image", f"{name}: {error}") from error
    if rgb.size != size or 0 in size:
        raise SkipRecord("broken_image", f"{name}: decodes to {rgb.size}, its header says {size}")
    return rgb
