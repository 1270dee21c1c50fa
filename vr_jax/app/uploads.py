"""The check of uploaded files: what is no image, or too large, or too much at once, is refused in one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vr_jax.app.contract import Upload
from vr_jax.data.images import MAX_PIXELS, decode_rgb, open_image
from vr_jax.data.skips import SkipRecord, one_line
from vr_jax.errors import UserError

MAX_IMAGES = 16  # the most images of one question
MAX_BYTES = 64 * 2**20  # the largest file
LONGEST_NAME = 60  # the characters of a file's name that a message repeats


class UploadError(UserError):
    """A file that cannot be used.

    Attributes:
        usable: The files of the same question that can be used.
    """

    def __init__(self, message: str, usable: Sequence[str | os.PathLike[str]] = ()):
        """Takes the message, and the files that can be used."""
        super().__init__(message)
        self.usable = tuple(usable)


def check_uploads(
    files: Sequence[str | os.PathLike[str]], *, max_pixels: int | None = MAX_PIXELS
) -> tuple[Upload, ...]:
    """Reads the images of a question and decodes each of them once.

    Args:
        files: The paths of the uploaded files.
        max_pixels: The largest allowed number of pixels.

    Returns:
        The images in the order of the files.

    Raises:
        UploadError: There are too many files, or one of them is no usable image.
    """
    if len(files) > MAX_IMAGES:
        raise UploadError(
            f"{len(files)} files were given, but a question may have at most {MAX_IMAGES} images; "
            "nothing was asked, choose fewer"
        )
    uploads, problems, usable = [], [], []
    for file in files:
        try:
            uploads.append(_checked(Path(file), max_pixels))
            usable.append(file)
        except SkipRecord as error:
            detail = error.detail
            if error.reason == "image_too_large" and max_pixels is not None:  # Pillow's own message speaks of an attack
                detail = f"The image has too many pixels; make it smaller than {max_pixels:,}."
            problems.append(f"{shown_name(file)}: {detail}")
    if problems:
        others = f" ({len(problems) - 1} more files cannot be used either)" if len(problems) > 1 else ""
        raise UploadError(one_line(problems[0], 400) + others, usable)
    return tuple(uploads)


def shown_name(file: str | os.PathLike[str]) -> str:
    """Returns the name of a file as one short line of printable characters."""
    return one_line(Path(file).name, LONGEST_NAME) or "the file"


def _checked(path: Path, max_pixels: int | None) -> Upload:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SkipRecord("missing_image", f"The file has {size:,} bytes, but at most {MAX_BYTES:,} are allowed.")
        data = path.read_bytes()
    except OSError as error:
        raise SkipRecord("missing_image", f"The file cannot be read: {error.strerror}.") from error
    with open_image(data, max_pixels=max_pixels) as image:
        decode_rgb(image)
    return Upload(shown_name(path), data)
