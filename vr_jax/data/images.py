"""Access to encoded image files that are not trusted: which paths are allowed, how a file is opened and decoded."""

from __future__ import annotations

import io
import os
import pathlib
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from vr_jax.data.schema import shown
from vr_jax.data.skips import SkipRecord, one_line
from vr_jax.data.texts import check_text
from vr_jax.storage import BucketPath, Path

# Pillow decodes these formats itself. For others, such as EPS, it would start external programs on untrusted files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# Pillow's decoders raise these exceptions for damaged files.
DECODE_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError),
    *(struct.error, zlib.error),
)
# What turns an image upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THE_SIDE = frozenset(_TURNS[value] for value in (5, 6, 7, 8))
# The modes whose colours are multiplied by their alpha, with the modes in which they are not.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_SIGNED = 2  # a value of _SAMPLE_FORMAT
_SIGNED_MESSAGE = (
    "{name} has signed integers or integers of 32 bits, of which no value is known to be white; convert it to 8 or 16 "
    "bits."
)
# The characters of a path that a message repeats.
LONGEST_NAME = 200
# Pillow warns of a possible decompression bomb above this number of pixels (89 million).
MAX_PIXELS = Image.MAX_IMAGE_PIXELS


def locate(folder: Path, name: object, *, follow_links: bool = False) -> Path:
    """Returns the path of an image file below a folder.

    Args:
        folder: The image folder, as a resolved path.
        name: The file name from a record, relative to `folder`.
        follow_links: Whether symbolic links inside the folder may lead out of it.

    Raises:
        SkipRecord: "malformed_record" if `name` is not a file name. "outside_folder" if it is an absolute path, climbs
            out of the folder with "..", or reaches a symbolic link that leads out while `follow_links` is False.
            "missing_image" if the path cannot be resolved.
    """
    if not isinstance(name, str) or not name:
        raise SkipRecord("malformed_record", f"The field 'image' contains {shown(name)}, but must contain a file name.")
    check_text(name, "The field 'image'")
    if "\\" in name and not _is_there(folder / name):
        name = name.replace("\\", "/")  # the record was written on Windows
    path = folder / name
    lexical = path.resolve() if isinstance(path, BucketPath) else pathlib.Path(*_collapsed(path))
    try:
        real = lexical if follow_links else path.resolve()
    except (OSError, RuntimeError) as error:
        raise SkipRecord("missing_image", f"The image path {shown(name)} cannot be resolved: {error}.") from error
    if not (lexical.is_relative_to(folder) and real.is_relative_to(folder)):
        by_link = lexical.is_relative_to(folder)
        how = (
            "by a link; set follow_links if it is meant"
            if by_link
            else "by its name; set images to a folder that holds all images"
        )
        raise SkipRecord(
            "outside_folder", f"The image path {shown(name)} leads out of the image folder {folder} {how}."
        )
    return path


def _is_there(path: Path) -> bool:
    return path.exists() if isinstance(path, BucketPath) else os.path.lexists(path)


def _collapsed(path: Path) -> list[str]:
    """Returns the parts of an absolute path after removing every `..`, without looking at symbolic links."""
    parts: list[str] = []
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif len(parts) > 1:
            parts.pop()
    return parts


def _nearby(path: Path) -> str:
    """Says whether a file exists whose extension is written in another way, which differs on a case-sensitive disk."""
    for suffix in (path.suffix.lower(), path.suffix.upper(), ".jpg", ".jpeg", ".png"):
        other = path.with_suffix(suffix)
        if other != path and other.is_file():
            return f", but {other.name} does exist; write the name as the file has it"
    return ""


def open_image(source: Path | bytes, *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Opens an encoded image and reads its header, which gives its size. The pixels are not decoded.

    The caller closes the image.

    Args:
        source: The encoded image, or the path of its file.
        max_pixels: The largest allowed number of pixels; None leaves only Pillow's own limit, which is twice its
            `MAX_IMAGE_PIXELS`.

    Raises:
        SkipRecord: "missing_image" if the file does not exist or cannot be read, "broken_image" if no decoder knows the
            format, "image_too_large" if there are more pixels than allowed, "malformed_record" if `source` is neither
            a path nor bytes.
    """
    if not isinstance(source, bytes | Path):
        raise SkipRecord(
            "malformed_record", f"The image is a {type(source).__name__}, but must be encoded bytes or a path."
        )
    name = (
        f"The image of {len(source)} bytes"
        if isinstance(source, bytes)
        else f"The image {one_line(str(source), LONGEST_NAME)}"
    )
    try:
        if isinstance(source, BucketPath):  # One request reads the whole object.
            image = Image.open(io.BytesIO(_object(source, name)), formats=FORMATS)
            image.filename = str(source)
        else:
            if isinstance(source, Path) and not source.is_file():
                raise SkipRecord("missing_image", f"{name} does not exist or is not a file{_nearby(source)}.")
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkipRecord("image_too_large", f"{name} is too large: {error} (`max_pixels`)") from error
    except UnidentifiedImageError as error:
        raise SkipRecord("broken_image", f"{name} has none of the formats {', '.join(FORMATS)}.") from error
    except DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise SkipRecord("missing_image", f"{name} cannot be read: {error.strerror}.") from error
        raise SkipRecord("broken_image", f"{name} cannot be opened: {error}.") from error
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        image.close()
        raise SkipRecord(
            "image_too_large",
            f"{name} has {width} x {height} pixels, but at most {max_pixels} are allowed (`max_pixels`).",
        )
    return image


def _object(source: BucketPath, name: str) -> bytes:
    try:
        return source.read_bytes()
    except FileNotFoundError as error:
        detail = f"{name} does not exist or is not a file{_nearby(source)}."
        raise SkipRecord("missing_image", detail) from error


def decode_rgb(image: Image.Image, *, rotate: bool = False) -> Image.Image:
    """Decodes an opened image and converts it to RGB. An alpha channel is dropped, and of an animation the first frame.

    Modes of 8 bits are converted as Pillow's `convert("RGB")` does, which LLaVA calls. It would make white or black of
    all others, so those are scaled to 8 bits: integers of 16 bits (or 12, in TIFF) from their whole range, and floats
    from 0..1. Integers of 32 bits and floats outside 0..1 have no usual white and are refused. Profiles of colours and
    gamma are ignored, as LLaVA does.

    Args:
        image: The opened image.
        rotate: Whether to turn the image as its EXIF orientation says. LLaVA and the benchmarks do not.

    Raises:
        SkipRecord: "broken_image" if the file is damaged, for example truncated; "image_mode" if its numbers have no
            known range.
    """
    path, size = getattr(image, "filename", ""), image.size
    name = f"The image {one_line(str(path), LONGEST_NAME)}" if path else "The encoded image"
    turn = _TURNS.get(_orientation(image)) if rotate else None
    try:
        image.load()
        rgb = _converted(image, name)
        if turn is not None:
            rgb = rgb.transpose(turn)
    except DECODE_ERRORS as error:
        raise SkipRecord("broken_image", f"{name} cannot be decoded: {error}.") from error
    if (rgb.size if turn is None else image.size) != size or 0 in size:
        raise SkipRecord("broken_image", f"{name} decodes to the size {rgb.size}, but its header states {size}.")
    return rgb


def size_of(image: Image.Image, *, rotate: bool = False) -> tuple[int, int]:
    """Returns the (width, height) that `decode_rgb` gives, without decoding the image.

    Args:
        image: The opened image.
        rotate: Whether the image is turned as its EXIF orientation says.
    """
    width, height = image.size
    return (height, width) if rotate and _TURNS.get(_orientation(image)) in _ON_THE_SIDE else (width, height)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an opened image, which is 1 for one that is upright or says nothing."""
    if image.format == "TIFF":
        return 1  # Pillow turns such an image itself when it decodes it, and states the size that it then has.
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole image to look behind it.
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _converted(image: Image.Image, name: str) -> Image.Image:
    """Converts a decoded image to RGB."""
    if image.mode == "RGB":
        return image
    if image.mode in _PREMULTIPLIED:
        return image.convert(_PREMULTIPLIED[image.mode]).convert("RGB")
    tags = getattr(image, "tag_v2", {})
    if image.mode != "F" and image.mode[:1] != "I":
        if tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED:  # Pillow would take -1 for 255.
            raise SkipRecord("image_mode", _SIGNED_MESSAGE.format(name=name))
        return image.convert("RGB")
    grey = _scaled_floats(image, name) if image.mode == "F" else _scaled_integers(image, name, tags)
    if tags.get(_PHOTOMETRIC) == 0:  # White is stored as 0, which Pillow leaves as it is in these modes.
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")


def _scaled_integers(image: Image.Image, name: str, tags: Mapping[int, Any]) -> UInt8[np.ndarray, "H W"]:
    """Scales integers of more than 8 bits by their depth."""
    values = np.asarray(image)
    short = image.mode.startswith("I;16")
    white = (1 << (tags.get(_BITS_PER_SAMPLE, (16,))[0] if short else 16)) - 1
    # PNG and PPM have at most 16 bits, which Pillow may hold in 32.
    known = short or image.format in ("PNG", "PPM")
    if not known or values.min(initial=0) < 0 or values.max(initial=0) > white:
        raise SkipRecord("image_mode", _SIGNED_MESSAGE.format(name=name))
    return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _scaled_floats(image: Image.Image, name: str) -> UInt8[np.ndarray, "H W"]:
    """Scales floats, of which 0 is black and 1 is white."""
    values = np.asarray(image)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and high <= 1):  # NaN is neither.
        raise SkipRecord(
            "image_mode",
            f"{name} has floats from {low:.3g} to {high:.3g}, but black must be 0 and white 1; scale it, or convert it "
            "to 8 or 16 bits.",
        )
    return np.rint(values * np.float32(255)).astype(np.uint8)
