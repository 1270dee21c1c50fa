"""Images of every mode become right RGB, and damaged files become skips with a reason."""

import io
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from tests.data.samples import chat, png, small_config
from vr_jax.data.images import FORMATS, MAX_PIXELS, decode_rgb, open_image, size_of
from vr_jax.data.processor import Processor
from vr_jax.data.skips import SkipRecord
from vr_jax.settings import DataSettings

GREY = np.linspace(0, 1, 64).reshape(8, 8)
EIGHT_BITS = np.rint(GREY * 255)


def saved(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def decoded(data: bytes, **options) -> np.ndarray:
    with open_image(data) as image:
        return np.asarray(decode_rgb(image, **options))


def tiff(values: np.ndarray, *, photometric: int = 1, order: str = "<") -> bytes:
    """A TIFF file of one strip, written by hand, so that every type of number can be stored."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(data), 339: kind}
    entries = b"".join(
        struct.pack(order + "HHI", tag, 4, 1) + struct.pack(order + "I", tags[tag]) for tag in sorted(tags)
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)


def pgm(white: int) -> bytes:
    return b"P5 8 8 %d\n" % white + np.rint(GREY * white).astype(">u2").tobytes()


WORDS = np.rint(GREY * 65535).astype(np.uint16)
DEEP = {
    "PNG of 16 bits": saved(Image.fromarray(WORDS), "PNG"),
    "TIFF of 16 bits": saved(Image.fromarray(WORDS), "TIFF"),
    "TIFF of 16 bits, compressed": saved(Image.fromarray(WORDS), "TIFF", compression="tiff_lzw"),
    "TIFF of 16 bits, big-endian": tiff(WORDS, order=">"),
    "TIFF of 16 bits, white is 0": tiff(65535 - WORDS, photometric=0),
    "PGM of 16 bits": pgm(65535),
    "PGM of 10 bits": pgm(1023),
    "plain PGM of 16 bits": b"P2 8 8 65535\n" + " ".join(map(str, WORDS.ravel())).encode(),
    "TIFF of floats": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "TIFF of floats, big-endian": tiff(GREY.astype(np.float32), order=">"),
    "PFM": b"Pf\n8 8\n-1.0\n" + GREY[::-1].astype("<f4").tobytes(),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_are_scaled_by_their_depth(name):
    found = decoded(DEEP[name]).astype(int)
    assert np.all(found == found[..., :1])
    np.testing.assert_allclose(found[..., 0], EIGHT_BITS, atol=1)
    assert (found.min(), found.max()) == (0, 255)


UNKNOWN = {
    "signed 32 bits": saved(Image.fromarray(np.rint(GREY * 65535).astype(np.int32)), "TIFF"),
    "32 bits": tiff(np.rint(GREY * (2**32 - 1)).astype(np.uint32)),
    "signed 16 bits": tiff(np.rint(GREY * 32767).astype(np.int16)),
    "floats above 1": saved(Image.fromarray((GREY * 255).astype(np.float32)), "TIFF"),
    "negative floats": tiff((GREY - 0.5).astype(np.float32)),
    "not a number": tiff(np.where(GREY > 0.5, np.nan, GREY).astype(np.float32)),
    "infinity": tiff(np.where(GREY > 0.5, np.inf, GREY).astype(np.float32)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_numbers_without_a_known_white_are_refused(name):
    with pytest.raises(SkipRecord) as caught:
        decoded(UNKNOWN[name])
    assert caught.value.reason == "image_mode"
    assert "convert it to 8 or 16 bits" in caught.value.detail


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_modes_of_eight_bits_are_converted_as_pillow_does(mode):
    colours = Image.fromarray(np.stack([EIGHT_BITS, EIGHT_BITS[::-1], EIGHT_BITS.T], -1).astype(np.uint8))
    image = (colours.convert("RGBA") if mode in ("LA", "PA") else colours).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(EIGHT_BITS.astype(np.uint8)))
    np.testing.assert_array_equal(np.asarray(decode_rgb(image)), np.asarray(image.convert("RGB")))
    for format in FORMATS:
        try:
            data = saved(image, format)
            with Image.open(io.BytesIO(data)) as plain:
                expected = np.asarray(plain.convert("RGB"))
        except (OSError, ValueError, KeyError):
            continue  # The format does not have this mode, or this version of Pillow cannot read what it wrote.
        np.testing.assert_array_equal(decoded(data), expected, err_msg=format)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_colours_that_are_multiplied_by_alpha_are_divided_again(mode):
    image = Image.fromarray(np.full((4, 4, 4), 255, np.uint8)).convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    np.testing.assert_array_equal(np.asarray(decode_rgb(image)), 255)


def test_a_transparent_palette_and_an_animation():
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    data = saved(palette, "PNG", transparency=3)
    with Image.open(io.BytesIO(data)) as plain:
        np.testing.assert_array_equal(decoded(data), np.asarray(plain.convert("RGB")))
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.all(decoded(data)[..., 0] > 240), format


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_photographs_are_turned_on_request_only(orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for format in ("JPEG", "PNG", "WEBP"):
        data = saved(image, format, exif=exif)
        with Image.open(io.BytesIO(data)) as plain:
            lying = np.asarray(plain.convert("RGB"))
        np.testing.assert_array_equal(decoded(data), lying)
        turned = decoded(data, rotate=True)
        with Image.open(io.BytesIO(data)) as plain:
            np.testing.assert_array_equal(turned, np.asarray(ImageOps.exif_transpose(plain).convert("RGB")))
        with open_image(data) as opened:
            assert size_of(opened, rotate=True) == turned.shape[1::-1]
            assert size_of(opened) == (32, 16)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pillow_turns_a_tiff_which_is_not_turned_again(orientation, rotate):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8))
    data = saved(image, "TIFF", tiffinfo={ExifTags.Base.Orientation: orientation})
    with Image.open(io.BytesIO(data)) as plain:
        expected = np.asarray(ImageOps.exif_transpose(plain).convert("RGB"))
    found = decoded(data, rotate=rotate)
    np.testing.assert_array_equal(found, expected)
    with open_image(data) as opened:
        assert size_of(opened, rotate=rotate) == found.shape[1::-1]


def test_signed_integers_of_8_bits_are_refused():
    data = saved(Image.new("L", (4, 3), 255), "TIFF", tiffinfo={339: 2})
    with pytest.raises(SkipRecord, match="has signed integers"):
        decoded(data)


def test_a_processor_that_turns_images_lays_them_out_turned(tokenizer):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(io.BytesIO(png(96, 32))) as image:
        lying = saved(image, "PNG", exif=exif)
        upright = saved(image.transpose(Image.Transpose.ROTATE_270), "PNG")
    turning = Processor(tokenizer, small_config(), rotate=True)
    found, expected = (turning.example(chat("<image>", "A", images=(one,))) for one in (lying, upright))
    np.testing.assert_array_equal(found.tile_pixels, expected.tile_pixels)
    np.testing.assert_array_equal(found.vision_cell, expected.vision_cell)
    plain = Processor(tokenizer, small_config()).example(chat("<image>", "A", images=(lying,)))
    assert len(plain.tile_pixels) != len(found.tile_pixels)


FILES = {
    **{
        format: saved(Image.fromarray(WORDS.astype(np.uint8)).convert("RGB").resize((24, 16)), format)
        for format in FORMATS
    },
    **{name: DEEP[name] for name in ("PNG of 16 bits", "TIFF of 16 bits, compressed", "PFM")},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged EXIF.
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_off_anywhere_is_decoded_or_refused(name):
    """It never ends in another exception. Formats that keep their pixels at the end may lose nothing that counts."""
    data = FILES[name]
    reasons = []
    for length in range(0, len(data), max(1, min(10, len(data) // 10))):
        try:
            assert decoded(data[:length]).shape[2] == 3
        except SkipRecord as error:
            reasons.append(error.reason)
    assert len(reasons) > 3
    assert set(reasons) <= {"broken_image", "image_too_large", "image_mode"}
    assert decoded(data).shape[2] == 3


def test_the_setting_has_the_same_default_as_the_library():
    assert DataSettings().max_pixels == MAX_PIXELS
