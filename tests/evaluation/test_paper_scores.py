"""The paper's printed scores: complete, consistent with their own averages, and found again from a model."""

import dataclasses

import pytest

from vr_jax.evaluation.paper_scores import PAPER_SCORES, PaperRow, rows_of
from vr_jax.experiments import DECODERS, TABLES, find_row

# Printed averages that do not follow from the printed groups: (3 * 55.4 + 4 * 44.0 + 4 * 42.2) / 11 = 46.45, not 46.3.
OFF = {PaperRow("table5a", "multi_level", "0.5b")}


def test_every_row_of_the_paper_is_there():
    of_the_paper = {(name, row) for name, table in TABLES.items() for row, one in table.rows.items() if not one.extra}
    assert {(key.table, key.row) for key in PAPER_SCORES} == of_the_paper
    three_sizes = {(key.table, key.row) for key in PAPER_SCORES if key.size == "7b"}
    assert three_sizes == {pair for pair in of_the_paper if pair[0] in ("table3", "table4")}
    assert {key.size for key in PAPER_SCORES} == set(DECODERS)


@pytest.mark.parametrize("key", PAPER_SCORES, ids="-".join)
def test_averages_follow_from_the_groups(key):
    scores = PAPER_SCORES[key]
    # Each number is rounded to 0.05: the groups' mean by as much, and the average once more.
    assert (abs(scores.weighted - scores.average) <= 0.1 + 1e-9) == (key not in OFF)


@pytest.mark.slow  # It builds sixty models' configs, and compares each with all others.
def test_one_model_has_the_same_scores_in_every_table():
    for key, scores in PAPER_SCORES.items():
        config = find_row(key.table, key.row).config(DECODERS[key.size], TABLES[key.table].image)
        rows = rows_of(config)
        assert key in rows
        assert {PAPER_SCORES[row] for row in rows} == {scores}


def test_rows_of_other_models():
    config = find_row("table3", "vision_remember").config(DECODERS["1.5b"], "anyres9")
    rows = rows_of(dataclasses.replace(config, dtype="bfloat16", remat="full"))
    assert rows == (PaperRow("table3", "vision_remember", "1.5b"), PaperRow("table4", "vision_remember", "1.5b"))
    assert rows_of(dataclasses.replace(config, vision_feature_layer=22)) == ()


def test_a_model_whose_tokenizer_has_a_token_for_images_has_rows_too():
    """Imported models name the id of that token, here one beyond a vocabulary of a single word."""
    config = find_row("table3", "vision_remember").config(DECODERS["1.5b"], "anyres9")
    assert rows_of(dataclasses.replace(config, image_token_id=511)) == rows_of(config) != ()
