"""Access to encoded image files that are not trusted: which paths are allowed, how a file is opened and decoded."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vr_jax.data.skips import SkipRecord

# Pillow decodes these formats itself. For others, such as EPS, it would start external programs on untrusted files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# Pillow's decoders raise these exceptions for damaged files.
DECODE_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError),
    *(struct.error, zlib.error),
)
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
    if not isinstance(name, str) or not name or "\0" in name:
        raise SkipRecord("malformed_record", f"The field 'image' contains {name!r}, but must contain a file name.")
    path = folder / name
    lexical = Path(*_collapsed(path))
    try:
        real = lexical if follow_links else path.resolve()
    except (OSError, RuntimeError) as error:
        raise SkipRecord("missing_image", f"The image path {name!r} cannot be resolved: {error}.") from error
    if not (lexical.is_relative_to(folder) and real.is_relative_to(folder)):
        by_link = lexical.is_relative_to(folder)
        how = (
            "by a link; set follow_links if it is meant"
            if by_link
            else "by its name; set images to a folder that holds all images"
        )
        raise SkipRecord("outside_folder", f"The image path {name!r} leads out of the image folder {folder} {how}.")
    return path


def _collapsed(path: Path) -> list[str]:
    """Returns the parts of an absolute path after removing every `..`, without looking at symbolic links."""
    parts: list[str] = []
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif len(parts) > 1:
            parts.pop()
    return parts


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
    name = f"The image of {len(source)} bytes" if isinstance(source, bytes) else f"The image {source}"
    try:
        if isinstance(source, Path) and not source.is_file():
            raise SkipRecord("missing_image", f"{name} does not exist or is not a file.")
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkipRecord("image_too_large", f"{name} is too large: {error}") from error
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
            "image_too_large", f"{name} has {width} x {height} pixels, but at most {max_pixels} are allowed."
        )
    return image


def decode_rgb(image: Image.Image) -> Image.Image:
    """Decodes an opened image and converts it to RGB. An alpha channel is dropped.

    Raises:
        SkipRecord: "broken_image" if the file is damaged, for example truncated.
    """
    path, size = getattr(image, "filename", ""), image.size
    name = f"The image {path}" if path else "The encoded image"
    try:
        image.load()
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    except DECODE_ERRORS as error:
        raise SkipRecord("broken_image", f"{name} cannot be decoded: {error}.") from error
    if rgb.size != size or 0 in size:
        raise SkipRecord("broken_image", f"{name} decodes to the size {rgb.size}, but its header states {size}.")
    return rgb
