"""The scores that the paper prints in its Tables 1 to 5, and the search for the rows of a given model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from vr_jax.evaluation.interface import Group
from vr_jax.experiments import DECODERS, TABLES, find_row
from vr_jax.model.config import VlmConfig

# The number of benchmarks in each group. The paper's average is over the eleven benchmarks, not over the groups
# (docs/design/benchmarks.md#paper-average).
GROUP_SIZES: dict[Group, int] = {"General": 3, "Knowledge": 4, "OCR&Chart": 4}


class PaperRow(NamedTuple):
    """A row of a table of the paper, for one size of the decoder.

    Attributes:
        table: A key of `vr_jax.experiments.TABLES`.
        row: A row of that table.
        size: The size of the decoder, a key of `vr_jax.experiments.DECODERS`.
    """

    table: str
    row: str
    size: str

    @property
    def title(self) -> str:
        """The name of the system, as the page shows it."""
        return find_row(self.table, self.row).title

    @property
    def source(self) -> str:
        """The name of the table, as the page shows it."""
        return self.table.replace("table", "Table ")

    @property
    def decoder(self) -> str:
        """The name of the decoder, as the page shows it."""
        return f"Qwen2-{self.size.upper()}"


@dataclass(frozen=True)
class PaperScores:
    """The printed scores of a row, from 0 to 100, with one decimal.

    Attributes:
        general: The score of the group General.
        knowledge: The score of the group Knowledge.
        ocr_chart: The score of the group OCR&Chart.
        average: The average over the eleven benchmarks.
    """

    general: float
    knowledge: float
    ocr_chart: float
    average: float

    @property
    def groups(self) -> dict[Group, float]:
        """The scores of the groups by name."""
        return {"General": self.general, "Knowledge": self.knowledge, "OCR&Chart": self.ocr_chart}

    @property
    def weighted(self) -> float:
        """The average over the benchmarks that follows from the printed scores of the groups."""
        return sum(GROUP_SIZES[name] * score for name, score in self.groups.items()) / sum(GROUP_SIZES.values())


# The columns are: table, decoder, row, General, Knowledge, OCR&Chart, Average.
_PRINTED = """
table1  0.5b  pooling           55.2 43.4 40.4 45.5
table1  0.5b  pooling_vr        56.5 43.6 47.5 48.5
table1  0.5b  pixel_shuffle     55.4 43.5 37.4 44.6
table1  0.5b  pixel_shuffle_vr  55.6 43.4 46.8 48.0
table1  0.5b  perceiver         54.1 43.7 35.4 43.5
table1  0.5b  perceiver_vr      55.5 43.5 47.3 48.1
table1  0.5b  ldpv2             55.7 43.1 42.2 46.2
table1  0.5b  ldpv2_vr          56.1 43.6 46.9 48.2

table2  0.5b  ratio4            54.7 43.6 45.3 47.3
table2  0.5b  ratio4_vr         56.5 44.1 50.1 49.7
table2  0.5b  ratio9            55.2 43.4 40.4 45.5
table2  0.5b  ratio9_vr         56.5 43.6 47.5 48.5
table2  0.5b  ratio16           53.9 43.7 35.2 43.3
table2  0.5b  ratio16_vr        55.9 44.1 45.2 47.7

table3  0.5b  baseline          55.2 43.4 40.4 45.5
table3  0.5b  sva               54.4 43.6 39.4 45.1
table3  0.5b  deepstack         54.0 43.5 38.7 44.6
table3  0.5b  vision_remember   56.5 43.6 47.5 48.5
table3  1.5b  baseline          60.2 51.2 49.8 53.2
table3  1.5b  sva               61.0 51.0 49.8 53.2
table3  1.5b  deepstack         60.6 51.3 49.3 53.1
table3  1.5b  vision_remember   63.2 51.3 55.6 56.1
table3  7b    baseline          63.9 56.0 56.4 58.2
table3  7b    sva               63.2 55.0 56.6 57.8
table3  7b    deepstack         63.6 54.6 56.8 57.8
table3  7b    vision_remember   66.2 56.9 58.9 60.2

table4  0.5b  fastv             53.4 42.6 35.2 42.8
table4  0.5b  pyramid_drop      55.4 43.9 39.1 45.3
table4  0.5b  vispruner         55.5 43.9 42.7 46.6
table4  0.5b  deco              55.2 43.4 40.4 45.5
table4  0.5b  token_packer      55.5 43.9 40.6 45.8
table4  0.5b  vision_remember   56.5 43.6 47.5 48.5
table4  1.5b  fastv             59.0 50.7 42.3 50.0
table4  1.5b  pyramid_drop      59.5 50.8 47.5 52.0
table4  1.5b  vispruner         60.2 51.0 52.9 54.1
table4  1.5b  deco              60.2 51.2 49.8 53.2
table4  1.5b  token_packer      60.8 50.3 48.6 52.5
table4  1.5b  vision_remember   63.2 51.3 55.6 56.1
table4  7b    fastv             64.2 53.5 49.3 54.9
table4  7b    pyramid_drop      64.2 54.1 53.2 56.5
table4  7b    vispruner         64.6 54.5 57.4 58.3
table4  7b    deco              63.9 56.0 56.4 58.2
table4  7b    token_packer      64.0 55.8 53.8 57.3
table4  7b    vision_remember   66.2 56.9 58.9 60.2

table5a 0.5b  baseline          54.6 43.7 33.4 42.9
table5a 0.5b  local             56.4 43.7 39.5 45.7
table5a 0.5b  multi_level       55.4 44.0 42.2 46.3
table5a 0.5b  bidirectional     55.7 43.9 42.4 46.6
table5a 0.5b  text_token        55.9 43.9 42.5 46.7

table5b 0.5b  global            54.1 43.3 36.4 43.7
table5b 0.5b  deformable        54.8 43.0 40.0 45.1
table5b 0.5b  local             55.9 43.9 42.5 46.7

table5c 0.5b  after_1           55.5 43.6 42.0 46.3
table5c 0.5b  after_1_4         55.9 43.9 42.5 46.7
table5c 0.5b  after_1_4_7       55.9 44.0 42.5 46.7
"""


def _parsed() -> dict[PaperRow, PaperScores]:
    lines = [line.split() for line in _PRINTED.splitlines() if line]
    return {PaperRow(table, row, size): PaperScores(*map(float, scores)) for table, size, row, *scores in lines}


PAPER_SCORES: dict[PaperRow, PaperScores] = _parsed()


def rows_of(config: VlmConfig) -> tuple[PaperRow, ...]:
    """Finds the rows of the paper whose model has a config's encoder, decoder size, methods and image layout.

    Args:
        config: The config of a model.

    Returns:
        The rows in the order of the tables. A model can be in several tables, or in none.
    """
    wanted = _essence(config)
    return tuple(key for key in PAPER_SCORES if _essence(_config(key)) == wanted)


def _config(key: PaperRow) -> VlmConfig:
    return find_row(key.table, key.row).config(DECODERS[key.size], TABLES[key.table].image)


def _essence(config: VlmConfig) -> VlmConfig:
    """Removes what does not affect scores: dtypes, kernels, ids and padding of the vocabulary, initialisation."""
    ignored: dict[str, Any] = {"vocab_size": 1, "initializer_range": 1.0, "tie_word_embeddings": True}
    decoder = dataclasses.replace(config.decoder, **ignored)
    return dataclasses.replace(
        config, decoder=decoder, image_token_id=None, dtype="float32", attention="xla", remat="none"
    )
