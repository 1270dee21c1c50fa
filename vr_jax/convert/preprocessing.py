"""preprocessor_config.json and processor_config.json: how transformers turns an image into pixels of the encoder.

What such a file leaves out has the default of its class, as in transformers. In the classes of LLaVA the mean is that
of CLIP, not of SigLIP.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vr_jax.errors import ConfigError, UserError
from vr_jax.fields import check_value, shown
from vr_jax.model.config import Deviation, ImageConfig, Rgb
from vr_jax.model_directory import WAY_OUT, FieldTable

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
# Pillow's filters by their numbers, which the field `resample` holds.
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_PIXEL_FIELDS = ("image_mean", "image_std", "rescale_factor", "resample")
_SIDES = {384 * k for k in range(1, 7)}


@dataclass(frozen=True)
class ProcessorClass:
    """The defaults of a class of image processors of transformers, which apply where its file does not say.

    Attributes:
        name: Its name, without the ending that chooses a backend.
        image_mean: The mean of the normalisation.
        image_std: The standard deviation.
        size: The side of a tile.
        square: Whether a size of one number is a square; otherwise it is that of the shorter side.
        crop_size: The side of the crop, or None for no crop.
        pads: Whether `do_pad` pads an image to a square.
        pinpoints: The sizes (height, width) of images cut into tiles, or None for a class that makes one tile.
    """

    name: str
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    size: int
    square: bool = False
    crop_size: int | None = None
    pads: bool = False
    pinpoints: tuple[tuple[int, int], ...] | None = None


SIGLIP_CLASS = ProcessorClass("SiglipImageProcessor", SIGLIP_MEAN, SIGLIP_STD, 224, square=True)
CLIP_CLASS = ProcessorClass("CLIPImageProcessor", CLIP_MEAN, CLIP_STD, 224, crop_size=224)
LLAVA_CLASS = ProcessorClass("LlavaImageProcessor", CLIP_MEAN, CLIP_STD, 224, crop_size=224, pads=True)
ONEVISION_CLASS = ProcessorClass(
    "LlavaOnevisionImageProcessor",
    CLIP_MEAN,
    CLIP_STD,
    384,
    pinpoints=tuple(itertools.product(sorted(_SIDES), sorted(_SIDES))),
)
NEXT_CLASS = ProcessorClass(
    "LlavaNextImageProcessor",
    CLIP_MEAN,
    CLIP_STD,
    224,
    crop_size=224,
    pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)

_BATCHING = "It is about batches of several images in transformers."
IMAGE_PROCESSOR_TABLE = FieldTable(
    honoured=frozenset(
        (
            *_PIXEL_FIELDS,
            *("size", "crop_size", "do_center_crop", "do_pad", "default_to_square"),
            *("image_grid_pinpoints", "image_processor_type", "feature_extractor_type"),
        )
    ),
    fixed={
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_convert_rgb": (True,),
        "pad_size": (None,),
        "data_format": ("channels_first",),
        "input_data_format": (None,),
        # The released LLaVA-NeXT have it, from before their class was a part of transformers, which does not read it.
        "aspect_ratio_setting": ("anyres",),
    },
    without_meaning={
        "processor_class": "It names the class that holds the image processor.",
        "image_seq_length": "transformers does not read it for these classes.",
        "disable_grouping": _BATCHING,
        "device": "It chooses where transformers computes.",
        "return_tensors": "It chooses the type of arrays that transformers returns.",
        "size_divisor": "transformers does not read it for these classes.",
        "_valid_processor_keys": "transformers 4 lists the names of its arguments there.",
        "transformers_version": "It records how the file came about.",
    },
)
PROCESSOR_TABLE = FieldTable(
    honoured=frozenset(
        (
            "image_processor",
            "image_token",
            "num_image_tokens",
            "patch_size",
            "vision_aspect_ratio",
            "vision_feature_select_strategy",
            "num_additional_image_tokens",
            "chat_template",
        )
    ),
    without_meaning={
        "processor_class": "It names the class of the processor.",
        "video_processor": "Videos are not read here.",
        "video_token": "Videos are not read here.",
        "tokenizer": "It repeats the tokenizer's own files.",
        "auto_map": "No code of the folder is run.",
        "transformers_version": "It records how the file came about.",
    },
)


def read_image_processor(
    values: Mapping[str, Any],
    classes: Sequence[ProcessorClass],
    tile: int,
    pinpoints: Sequence[Sequence[int]] | None,
    where: str,
) -> dict[str, Any]:
    """Reads the settings of an image processor.

    Args:
        values: The content of preprocessor_config.json, or of `image_processor` in processor_config.json.
        classes: The classes that the processor may have, first that of a file that names none.
        tile: The side of the encoder's images in pixels.
        pinpoints: The sizes (height, width) of the model's config.json; empty or None for a model that has none.
        where: The file, for messages.

    Returns:
        The fields of `ImageConfig` that say how pixels come about; of a class that makes one tile, how it does so
        (`aspect_ratio`) too.

    Raises:
        UserError: A field is not known, has a wrong value, or asks for what is not computed here.
    """
    IMAGE_PROCESSOR_TABLE.check(values, where)
    kind = _class_of(values, classes, where)
    fields = read_pixel_fields(values, kind.image_mean, kind.image_std, where)
    if kind.pinpoints is None:
        return {**fields, "aspect_ratio": _one_tile(values, kind, tile, where)}
    for name, side, square in (("size", kind.size, True), ("crop_size", kind.crop_size, False)):
        _check_side(values, name, side, tile, where, square=square)
    if pinpoints is not None:
        theirs = values.get("image_grid_pinpoints")
        theirs = kind.pinpoints if theirs is None else theirs
        if not isinstance(theirs, list | tuple) or _pairs(theirs) != _pairs(pinpoints):
            raise UserError(
                f"{where}: image_grid_pinpoints = {shown(theirs)} differs from that of config.json, "
                f"{shown(list(pinpoints))}; set both to the same sizes"
            )
    return fields


def read_pixel_fields(
    values: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...], where: str
) -> dict[str, Any]:
    """Reads how pixels are resized and normalised.

    Args:
        values: The content of preprocessor_config.json, or of `image_processor` in processor_config.json.
        mean: The mean of the normalisation that the class has by default.
        std: Its standard deviation.
        where: The file, for messages.

    Raises:
        UserError: A field has a wrong value.
    """
    return {
        "image_mean": _channels(values.get("image_mean"), mean, Rgb, f"{where}: image_mean"),
        "image_std": _channels(values.get("image_std"), std, Deviation, f"{where}: image_std"),
        **_scalars(values, where),
    }


def _class_of(values: Mapping[str, Any], classes: Sequence[ProcessorClass], where: str) -> ProcessorClass:
    """The class that a file names; `feature_extractor_type` is an older name of the field."""
    name = "image_processor_type" if values.get("image_processor_type") else "feature_extractor_type"
    found = str(values.get(name) or classes[0].name)
    plain = found.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    for kind in classes:
        if kind.name == plain:
            return kind
    expected = " or ".join(repr(kind.name) for kind in classes)
    raise UserError(f"{where}: {name} = {found!r} is not supported, expected {expected}")


def _one_tile(values: Mapping[str, Any], kind: ProcessorClass, tile: int, where: str) -> str:
    """How a class that makes one tile of an image does so, as `ImageConfig.aspect_ratio` has it."""
    size = values.get("size")
    square = values.get("default_to_square")
    square = kind.square if square is None else bool(square)
    shorter = set(size) == {"shortest_edge"} if isinstance(size, Mapping) else not square
    _check_side(values, "size", kind.size, tile, where, square=True)
    crops = values.get("do_center_crop")
    crops = kind.crop_size is not None if crops is None else bool(crops)
    if crops:
        _check_side(values, "crop_size", kind.crop_size or kind.size, tile, where, square=False)
    if kind.pads and values.get("do_pad"):
        return "pad"
    if not shorter:
        return "square"
    if not crops:
        raise UserError(
            f"{where}: size gives the shorter side of an image and do_center_crop is off, so that images would keep "
            "their shapes; set do_center_crop to true, or size to height and width"
        )
    return "crop"


def _check_side(values: Mapping[str, Any], name: str, side: int | None, tile: int, where: str, *, square: bool) -> None:
    """Raises UserError if a size is not that of a tile; `side` is the default of the class."""
    given = values.get(name)
    if side is None and given is None:
        return
    sides = (side, side) if given is None else _sides(given, f"{where}: {name}", square=square)
    if sides != (tile, tile):
        absent = "is absent, and its class takes" if given is None else f"= {shown(given)} makes tiles of"
        raise UserError(
            f"{where}: {name} {absent} {sides[0]} x {sides[1]} pixels, but the encoder's image_size is {tile}"
        )


def check_processor(values: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Checks the fields of a processor_config.json against the model.

    Args:
        values: The fields.
        config: What the model has, by the name of the field.
        where: The file, for messages.

    Raises:
        UserError: A field is not known, or transformers would place another number of vision tokens than it computes.
    """
    PROCESSOR_TABLE.check(values, where)
    for name, expected in config.items():
        found = values.get(name)
        if found is not None and found != expected:
            way_out = WAY_OUT.format(name=name)
            raise UserError(f"{where}: {name} = {shown(found)} does not fit the model's {expected!r}; {way_out}")


def write_image_processor(image: ImageConfig, kind: ProcessorClass, processor: str | None = None) -> dict[str, Any]:
    """Returns the preprocessor_config.json of an encoder or of a LLaVA of transformers.

    Args:
        image: The images of the model.
        kind: The class of the image processor.
        processor: The class of the processor that holds it, or None for that of an encoder.
    """
    side = {"height": image.tile_size, "width": image.tile_size}
    shorter = kind is NEXT_CLASS or image.aspect_ratio in ("crop", "pad")
    return {
        "image_processor_type": kind.name,
        **({} if processor is None else {"processor_class": processor}),
        **pixel_fields(image),
        "size": {"shortest_edge": image.tile_size} if shorter else side,
        **({} if kind.crop_size is None else {"crop_size": side, "do_center_crop": shorter}),
        **({} if kind.pinpoints is None else {"image_grid_pinpoints": write_pinpoints(image), "do_pad": True}),
        **({"do_pad": image.aspect_ratio == "pad"} if kind.pads else {}),
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    }


def pixel_fields(image: ImageConfig) -> dict[str, Any]:
    """Returns the fields of an image processor that say how pixels are normalised and resized."""
    return {
        "image_mean": list(image.image_mean),
        "image_std": list(image.image_std),
        "rescale_factor": image.rescale_factor,
        "resample": FILTERS.index(image.resample),
    }


def write_pinpoints(image: ImageConfig) -> list[list[int]]:
    """Returns the sizes (height, width) of the grids in pixels."""
    return [[rows * image.tile_size, columns * image.tile_size] for columns, rows in image.grids]


def _scalars(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    factor, number = values.get("rescale_factor"), values.get("resample")
    factor = 1 / 255 if factor is None else factor
    number = FILTERS.index("bicubic") if number is None else number
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(FILTERS):
        raise UserError(f"{where}: resample = {shown(number)}: expected the number of a filter of Pillow, 0 to 5")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e30:
        raise UserError(f"{where}: rescale_factor = {shown(factor)}: expected a number > 0")
    return {"rescale_factor": float(factor), "resample": FILTERS[number]}


def _channels(value: Any, default: tuple[float, ...], hint: Any, where: str) -> tuple[float, ...]:
    """The numbers of red, green and blue; one number stands for all three."""
    value = default if value is None else value
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    try:
        check_value(hint, numbers, where)
    except ConfigError as error:
        raise UserError(str(error)) from None
    return tuple(float(number) for number in numbers)


def _sides(value: Any, where: str, *, square: bool) -> tuple[int, int]:
    """Height and width of a size in one of the forms of transformers."""
    if isinstance(value, Mapping):
        keys = set(value)
        if keys == {"height", "width"}:
            value = (value["height"], value["width"])
        elif keys == {"shortest_edge"} and square:
            value = (value["shortest_edge"],) * 2
        else:
            raise UserError(f"{where} = {shown(dict(value))}: expected the fields height and width")
    elif not isinstance(value, list | tuple):
        value = (value, value)
    if len(value) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in value):
        raise UserError(f"{where} = {shown(value)}: expected whole numbers of pixels")
    return value[0], value[1]


def _pairs(sizes: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(size) if isinstance(size, list | tuple) else (size,) for size in sizes]
