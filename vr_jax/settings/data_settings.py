"""The settings of the training data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from vr_jax.fields import MIN_FLOAT, Config, Fraction, PositiveInt, Range, Seed, check
from vr_jax.path_text import OptionalPathsText, OptionalPathText, PathsText

# The name of the data format, and of the tokenizer, that need no files.
DEMO: Final = "demo"
# How much of a source is taken, as LLaVA's data files say it.
SAMPLING_STRATEGY = re.compile(r"all|(first|end|random):([1-9][0-9]*|([1-9][0-9]?|100)%)")
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

Rate = Annotated[float, Range(MIN_FLOAT, 1e6)]


@dataclass(frozen=True, kw_only=True)
class DemoDataSettings(Config):
    """The generated images of the format "demo".

    Attributes:
        size: Number of images.
        seed: Seed of all images.
        turns: Questions about an image, as far as it has that many.
    """

    size: PositiveInt = 10_000
    seed: Seed = 0
    turns: PositiveInt = 1


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Config):
    """One of several places that the samples of a run come from (docs/data.md#several-sources).

    Attributes:
        path: File, folder, glob pattern, or name of a data set on the Hugging Face hub; several with commas between.
        images: Folder that image paths are relative to. When empty, it is the folder of each data file.
        format: Name of the file format. When empty, it follows from the file's name.
        split: Split to read where a folder has several.
        follow_links: Whether symbolic links inside the image folder may lead out of it.
        name: Name of the source in the numbers of the run, e.g. `loss/<name>`. When empty, it follows from the path.
        sampling_strategy: Which records are taken, once and for all, as in LLaVA's data files: "all", or "first",
            "end" or "random" with a number of records or a percentage, e.g. "first:1000" or "random:10%".
        weight: Relative rate of the source's samples. All sources have one, or none. None: the source is read once in
            an epoch.
        share: How often each record is read in an epoch, e.g. 0.1 for another tenth of them in each epoch. None: once.
    """

    path: PathsText
    images: OptionalPathText = ""
    format: Literal["", "llava_json", "llava_parquet", "array_record"] = ""
    split: str = "train"
    follow_links: bool = False
    name: str = ""
    sampling_strategy: str = "all"
    weight: Rate | None = None
    share: Rate | None = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        super().__post_init__()
        check(
            SAMPLING_STRATEGY.fullmatch(self.sampling_strategy) is not None,
            f"sampling_strategy = {self.sampling_strategy!r} of the source {self.path}: expected 'all', or 'first', "
            "'end' or 'random' with a number of records or up to 100 percent of them, as in 'first:1000' or 'end:10%'",
        )
        check(
            not self.name or SOURCE_NAME.fullmatch(self.name) is not None,
            f"name = {self.name!r} of the source {self.path}: expected letters, digits, '_', '.' and '-'",
        )


@dataclass(frozen=True, kw_only=True)
class DataSettings(Config):
    """Which samples a run reads, and how they become batches (docs/data.md).

    The fields from `path` to `follow_links` describe one source, as those of `SourceSettings` do. `sources` takes their
    place where there are several.

    Attributes:
        path: File, folder, glob pattern, or name of a data set on the Hugging Face hub; several with commas between. A
            .yaml file is one of LLaVA's lists of sources.
        images: Folder that image paths are relative to. When empty, it is the folder of each data file.
        format: Name of the file format. When empty, it follows from the file's name. "demo" generates images as long as
            `path` and `sources` are empty.
        split: Split to read where a folder has several.
        follow_links: Whether symbolic links inside the image folder may lead out of it.
        sources: Several sources, which are shuffled as one, or mixed by their weights or shares. Each has its own
            images, format and split.
        demo: The generated images of the format "demo".
        template: "chat" writes the chat format of the model, `config.model.template`. "plain" writes an image and its
            caption, as LLaVA's first phase does.
        label_quirk: Whether the targets are exactly those of LLaVA's code, with its known oddities
            (docs/design/methods.md#labels), rather than the answers only. LLaVA has them for the chat formats
            "qwen_1_5" and "llama_3"; captions have none.
        packing: Whether several samples share a row.
        shuffle: Whether the order of the samples is drawn anew for each epoch.
        exif_rotation: Whether images are turned as their EXIF orientation says, which LLaVA does not.
        workers: Processes that decode images and tokenise. With 0, threads of the training process do it.
        allow_changed: Whether a run may continue although the data files changed since its last start.
        allow_other_weights: Whether a run may continue although the weights or shares of its sources changed since its
            last start. Each source goes on from where it was.
        max_skipped: Share of unusable samples above which training stops.
        max_pixels: Largest number of pixels of an image. A larger one makes its sample unusable, because it may be a
            small file that fills the memory.
    """

    path: OptionalPathsText = ""
    images: OptionalPathText = ""
    format: Literal["", "llava_json", "llava_parquet", "array_record", "demo"] = ""
    split: str = "train"
    follow_links: bool = False
    sources: tuple[SourceSettings, ...] = ()
    demo: DemoDataSettings = field(default_factory=DemoDataSettings)
    template: Literal["chat", "plain"] = "chat"
    label_quirk: bool = True
    packing: bool = True
    shuffle: bool = True
    exif_rotation: bool = False
    workers: Annotated[int, Range(0, 1024)] = 4
    allow_changed: bool = False
    allow_other_weights: bool = False
    max_skipped: Fraction = 0.01
    max_pixels: Annotated[int, Range(1, 178_956_970)] = 89_478_485  # Pillow opens no larger image.

    def __post_init__(self) -> None:
        """Checks the fields, and that one source and several are not both given."""
        super().__post_init__()
        one = {"path": self.path, "images": self.images, "follow_links": self.follow_links}
        one["format"] = "" if self.format == DEMO else self.format
        given = [f"config.data.{name} = {value!r}" for name, value in one.items() if value]
        given += [f"config.data.split = {self.split!r}"] * (self.split != "train")
        check(
            not (self.sources and given),
            f"config.data.sources and {', '.join(given)} are both set; give the fields of each source in "
            "config.data.sources, or leave it empty",
        )
        weighted = [one.weight is not None for one in self.sources]
        check(
            len(set(weighted)) < 2,
            "config.data.sources: some sources have a weight and others none; give one to each of them, or to none",
        )
        check(
            not (any(weighted) and any(one.share is not None for one in self.sources)),
            "config.data.sources: there are weights and shares; give the rates of the sources in one way",
        )
        names = [one.name for one in self.sources if one.name]
        check(len(set(names)) == len(names), f"config.data.sources: two sources have one name ({', '.join(names)})")

    @property
    def generated(self) -> bool:
        """Whether the samples are the demo's generated images."""
        return self.format == DEMO and not self.path and not self.sources

    @property
    def all_sources(self) -> tuple[SourceSettings, ...]:
        """The sources of the samples; empty if there is none, or if the samples are generated."""
        if self.sources or not self.path:
            return self.sources
        return (
            SourceSettings(
                path=self.path,
                images=self.images,
                format="" if self.format == DEMO else self.format,
                split=self.split,
                follow_links=self.follow_links,
            ),
        )
