"""The systems of the paper's Tables 1-5, row by row, as a short declaration.

Recipes (`configs/tables/`) and the comparison in miniature (`benchmarks/accuracy/`) are generated from it. Choices that
the paper leaves open are those of methods.md 11; rows beyond the paper's are marked `extra`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vr_jax.errors import ConfigError
from vr_jax.model.config import VlmConfig, anyres4, anyres9
from vr_jax.model.decoders.qwen2 import Qwen2Config

TEXTS: dict[str, Qwen2Config] = {
    "0.5b": Qwen2Config(hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2),
    "1.5b": Qwen2Config(hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12, num_kv_heads=2),
    "7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        tie_word_embeddings=False,
    ),
}
IMAGES = {"anyres4": anyres4, "anyres9": anyres9}

Fields = Mapping[str, Any]  # of a method's config class; `name` says which


@dataclass(frozen=True, kw_only=True)
class System:
    """One row: what is switched on by name. `insert_every`: after the first and then every n-th decoder layer, in place
    of the refusion's `insert_after`, which depends on the decoder's depth."""

    title: str
    projector: Fields
    refusion: Fields | None = None
    insert_every: int | None = None
    pruning: Fields | None = None  # training-free: the system trained is the same without it
    extra: bool = False  # not a row of the paper

    def config(self, text: Qwen2Config, image: str) -> VlmConfig:
        """The model of this row at the paper's sizes. image: a key of IMAGES."""
        return self.at(VlmConfig(decoder=text, image=IMAGES[image]()))

    def at(
        self,
        size: VlmConfig,
        levels: Mapping[int, int] | None = None,
        changes: Mapping[str, Fields] | None = None,
    ) -> VlmConfig:
        """This row with the encoder, decoder and images of `size`.

        levels: the paper's hidden states -> those of a shallower encoder. changes: method name -> further fields, such
        as widths and heads. Raises ConfigError for what does not fit."""
        refusion = self.refusion
        if refusion is not None and self.insert_every is not None:
            refusion = {**refusion, "insert_after": tuple(range(1, size.decoder.num_layers, self.insert_every))}
        methods: dict[str, Any] = {}
        for kind, fields in {"projector": self.projector, "refusion": refusion, "pruning": self.pruning}.items():
            if fields is None:
                continue
            method = VlmConfig.parse_field(kind, {**fields, **(changes or {}).get(fields["name"], {})}, kind)
            if levels is not None and hasattr(method, "levels"):
                method = dataclasses.replace(method, levels=tuple(levels[level] for level in method.levels))
            methods[kind] = method
        if "pruning" in methods:
            methods["image"] = methods["pruning"].adapt_image(size.image)
        return dataclasses.replace(size, **methods)


def pool(stride: int = 3) -> Fields:
    return {"name": "pool", "stride": stride}


def remember(**changes: Any) -> Fields:
    """Vision Remember as in the paper's main setting, or with changes."""
    return {"name": "vision_remember", "insert_after": (1, 4), "levels": (7, 15, 23), **changes}


UNCOMPRESSED: Fields = {"name": "mlp", "stride": 1}
BASELINE = System(title="Baseline (pooling)", projector=pool())
VISION_REMEMBER = System(title="Vision Remember", projector=pool(), refusion=remember())
_PROJECTORS = {"pooling": "pool", "pixel_shuffle": "pixel_shuffle", "perceiver": "perceiver", "ldpv2": "ldpv2"}
_TITLES = {"pooling": "Pooling", "pixel_shuffle": "PixelShuffle", "perceiver": "Perceiver", "ldpv2": "LDPv2"}


def _with_and_without(name: str, title: str, projector: Fields) -> dict[str, System]:
    return {
        name: System(title=title, projector=projector),
        f"{name}_vr": System(title=f"{title} + V.R.", projector=projector, refusion=remember()),
    }


@dataclass(frozen=True)
class Table:
    title: str
    image: str  # key of IMAGES
    rows: Mapping[str, System]


TABLES: dict[str, Table] = {
    "table1": Table(
        "Vision Remember with various projectors, 1/9",
        "anyres9",
        {
            row: system
            for name, projector in _PROJECTORS.items()
            for row, system in _with_and_without(name, _TITLES[name], {"name": projector, "stride": 3}).items()
        },
    ),
    "table2": Table(
        "Compression ratios, pooling",
        "anyres9",
        {
            row: system
            for stride in (2, 3, 4)
            for row, system in _with_and_without(f"ratio{stride**2}", f"1/{stride**2}", pool(stride)).items()
        },
    ),
    "table3": Table(
        "Re-fusion methods, pooling 1/9",
        "anyres9",
        {
            "baseline": BASELINE,
            "sva": System(title="SVA", projector=pool(), refusion={"name": "sva", "insert_after": (1, 4)}),
            "sva_every_third": System(
                title="SVA, every third layer",
                projector=pool(),
                refusion={"name": "sva"},
                insert_every=3,
                extra=True,
            ),
            "deepstack": System(title="DeepStack", projector=pool(), refusion={"name": "deepstack"}),
            "deepstack_qwen3_vl": System(
                title="DeepStack, Qwen3-VL merger",
                projector=pool(),
                refusion={"name": "deepstack", "merger": "qwen3_vl"},
                extra=True,
            ),
            "vision_remember": VISION_REMEMBER,
        },
    ),
    "table4": Table(
        "Efficient methods, 1/9 of the vision tokens",
        "anyres9",
        {
            "fastv": System(title="FastV", projector=UNCOMPRESSED, pruning={"name": "fastv"}),
            "fastv_average": System(
                title="FastV, layer average",
                projector=UNCOMPRESSED,
                pruning={"name": "fastv", "budget": "layer_average"},
                extra=True,
            ),
            "pyramid_drop": System(title="PyramidDrop", projector=UNCOMPRESSED, pruning={"name": "pyramid_drop"}),
            "vispruner": System(title="VisPruner", projector=UNCOMPRESSED, pruning={"name": "vispruner"}),
            "deco": System(title="DeCo", projector=pool()),
            "token_packer": System(title="TokenPacker", projector={"name": "token_packer", "stride": 3}),
            "vision_remember": VISION_REMEMBER,
            "uncompressed": System(title="Uncompressed (1/1)", projector=UNCOMPRESSED, extra=True),
        },
    ),
    "table5a": Table(
        "Key components, 1/9",
        "anyres4",
        {
            "baseline": BASELINE,
            "local": System(
                title="+ local attention",
                projector=pool(),
                refusion=remember(levels=(23,), self_attention=False, text_pool="none"),
            ),
            "multi_level": System(
                title="+ multi-level fusion",
                projector=pool(),
                refusion=remember(self_attention=False, text_pool="none"),
            ),
            "bidirectional": System(title="+ bidirectional", projector=pool(), refusion=remember(text_pool="none")),
            "text_token": System(title="+ text token", projector=pool(), refusion=remember()),
        },
    ),
    "table5b": Table(
        "Interaction, 1/9",
        "anyres4",
        {
            interaction: System(
                title=interaction.capitalize(), projector=pool(), refusion=remember(interaction=interaction)
            )
            for interaction in ("global", "deformable", "local")
        },
    ),
    "table5c": Table(
        "Insertion layers, 1/9",
        "anyres4",
        {
            f"after_{'_'.join(map(str, layers))}": System(
                title=",".join(map(str, layers)), projector=pool(), refusion=remember(insert_after=layers)
            )
            for layers in ((1,), (1, 4), (1, 4, 7))
        },
    ),
}


def system(table: str, row: str) -> System:
    """Raises ConfigError for an unknown table or row, listing the known ones."""
    if table not in TABLES:
        raise ConfigError(f"no table {table!r}: expected one of {', '.join(TABLES)}")
    rows = TABLES[table].rows
    if row not in rows:
        raise ConfigError(f"{table} has no row {row!r}: expected one of {', '.join(rows)}")
    return rows[row]


def listing() -> str:
    """Every row with what it switches on, as lines of text."""
    lines = []
    for name, table in TABLES.items():
        lines.append(f"{name}: {table.title} ({table.image})")
        for row, one in table.rows.items():
            parts = [one.projector, one.refusion, one.pruning]
            methods = " ".join(f"{part['name']}{_details(part)}" for part in parts if part is not None)
            lines.append(f"  {row:<20} {one.title:<28} {methods}{' (not in the paper)' if one.extra else ''}")
    return "\n".join(lines)


def _details(fields: Fields) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in fields.items() if name != "name")
    return f"({shown})" if shown else ""
