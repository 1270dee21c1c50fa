"""The cards of the page: what each of them shows of an item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vr_jax.evaluation.report.heat import HeatMap
from vr_jax.evaluation.report.images import Embedded, Source, key_of
from vr_jax.evaluation.report.items import ReportItem, State
from vr_jax.evaluation.report.text import NAME, SHOWN, short_name

MAX_IMAGES = 8  # The number of images that a card shows at most.
MAX_REFERENCES = 20  # The number of references that a card shows at most.
# Images that fit at least twice into a square of so many pixels are enlarged.
_SMALL = 240
_NOTE = 500  # The number of characters of a heat map's note that are shown.
WORDS: dict[State, str] = {
    "right": "✓ right",
    "partial": "◐ partly right",
    "wrong": "✕ wrong",
    "unscored": "! not scored",
}


@dataclass(frozen=True)
class ImageView:
    """An image of a card.

    Attributes:
        label: The label of the button that enlarges the image.
        problem: The reason why there is no image, or None.
        width: The width in CSS pixels.
        height: The height in CSS pixels.
        enlarged: Whether a small image is enlarged.
        name: The id of the element that holds the image.
        url: The image as a data URL.
        same: The id of an earlier element with the same image, whose URL is then not repeated; or None.
    """

    label: str
    problem: str | None = None
    width: int = 0
    height: int = 0
    enlarged: bool = False
    name: str = ""
    url: str = ""
    same: str | None = None


@dataclass(frozen=True)
class MapView:
    """A heat map of a card.

    Attributes:
        label: The name of the insertion.
        note: The line below the image.
        url: The map as a data URL, or None if it cannot be shown.
    """

    label: str
    note: str
    url: str | None


@dataclass(frozen=True)
class CardView:
    """A card.

    Attributes:
        item: The item.
        number: The number of the card on the page.
        state: The state of the item.
        words: The state in words, with the score of a partly right answer.
        category: The short name of the category.
        places: The benchmark and the category, where the item belongs.
        length: The number of characters of a longer text that are shown.
        references: The references that are shown.
        more_references: The number of references that are not shown.
        images: The images that are shown.
        more_images: The number of images that are not shown.
        maps: The heat maps over the first image.
        map_choices: The choices of the switch between the image and its heat maps, as pairs of value and text.
    """

    item: ReportItem
    number: int
    state: State
    words: str
    category: str
    places: tuple[str, ...]
    length: int
    references: tuple[str, ...]
    more_references: int
    images: tuple[ImageView, ...]
    more_images: int
    maps: tuple[MapView, ...]
    map_choices: tuple[tuple[str, str], ...]


def map_choices(labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Returns the choices between the plain image and its heat maps, as pairs of value and text."""
    return (("", "image"), *((label, label) for label in labels))


def card_views(
    items: Sequence[ReportItem],
    images: Mapping[str, Embedded],
    maps: Mapping[str, Embedded],
    titles: Mapping[str, str],
    length: int = SHOWN,
) -> list[CardView]:
    """Computes the cards of a page.

    Args:
        items: The items, in the order of the cards.
        images: The embedded images by key.
        maps: The embedded heat maps by key.
        titles: The titles of the benchmarks by name.
        length: The number of characters of a longer text that are shown.
    """
    names: dict[str, str] = {}  # The ids of the elements that hold an image, by the key of the image.
    return [_card(item, number, images, maps, names, titles, length) for number, item in enumerate(items)]


def _card(
    item: ReportItem,
    number: int,
    images: Mapping[str, Embedded],
    maps: Mapping[str, Embedded],
    names: dict[str, str],
    titles: Mapping[str, str],
    length: int,
) -> CardView:
    state, category = item.state, short_name(item.category)
    shown = item.images[:MAX_IMAGES]
    labels = [f"Enlarge image {place}" for place in range(1, len(shown) + 1)]
    if len(shown) == 1:
        labels = [f"Enlarge the image of {item.id[:NAME]}"]
    heat_maps = item.maps if item.images else ()
    return CardView(
        item=item,
        number=number,
        state=state,
        words=f"{WORDS[state]} {item.score:.2f}" if state == "partial" else WORDS[state],
        category=category,
        places=tuple(text for text in (titles.get(item.benchmark, item.benchmark), category) if text),
        length=length,
        references=item.references[:MAX_REFERENCES],
        more_references=max(0, len(item.references) - MAX_REFERENCES),
        images=tuple(_image(source, label, images, names) for source, label in zip(shown, labels, strict=True)),
        more_images=len(item.images) - len(shown),
        maps=tuple(_heat(one, maps[key_of(one.png)]) for one in heat_maps),
        map_choices=map_choices([one.label for one in heat_maps]),
    )


def _image(source: Source, label: str, images: Mapping[str, Embedded], names: dict[str, str]) -> ImageView:
    key = key_of(source)
    embedded = images[key]
    if embedded.problem is not None:
        return ImageView(label, problem=embedded.problem)
    width, height = embedded.size
    times = max(1, _SMALL // max(width, height))
    same = names.get(key)
    name = names.setdefault(key, f"p{len(names)}")
    url = "" if same else embedded.url
    return ImageView(label, None, times * width, times * height, times > 1, name, url, same)


def _heat(one: HeatMap, embedded: Embedded) -> MapView:
    if embedded.problem is not None:
        return MapView(one.label, f"The heat map cannot be shown: {embedded.problem}", None)
    return MapView(one.label, one.note[:_NOTE], embedded.url)
