"""Fixed parts of a source by LLaVA's sampling strategies: sizes, rounding, order, and what is read together."""

import pytest

from tests.data.test_mixture import Numbered
from vr_jax.data.fingerprint import data_files
from vr_jax.data.selection import selected

COUNT = 25


def chosen(strategy, seed=0, count=COUNT):
    source = selected(Numbered("a", count), strategy, seed)
    return [int(source[k].id[1:]) for k in range(len(source))]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", range(25)),
        ("first:3", range(3)),
        ("first:10%", range(3)),  # ceil(10 * 25 / 100), as LLaVA rounds
        ("first:100%", range(25)),
        ("end:4", range(21, 25)),
        ("end:1%", range(24, 25)),
        ("end:20%", range(20, 25)),
    ],
)
def test_the_first_and_the_last_records_are_those_of_llava(strategy, expected):
    assert chosen(strategy) == list(expected)


def test_a_random_choice_depends_on_the_seed_alone_and_keeps_the_order():
    found = chosen("random:10")
    assert len(found) == 10
    assert found == sorted(set(found)) == chosen("random:10")
    assert found != chosen("random:10", seed=1)
    assert len(chosen("random:10%")) == 3
    assert set(chosen("random:5")) < set(found), "a smaller choice is part of a larger one"


def test_more_records_than_there_are_are_all_of_them_and_a_warning(caplog):
    assert chosen("end:30") == list(range(25))
    assert "has fewer records than end:30 asks for" in caplog.text


def test_blocks_are_those_of_the_selected_records():
    source = selected(Numbered("a", 30, [0, 10, 20]), "end:15", 0)
    assert source.blocks == [0, 5]
    assert selected(Numbered("a", 30, [0, 10, 20]), "first:5", 0).blocks == [0]
    assert selected(Numbered("a", 30), "first:5", 0).blocks is None


def test_the_files_of_a_selection_are_those_of_its_source(tmp_path):
    source = Numbered("a", 30)
    source.files = [tmp_path / "a.json"]
    assert data_files(selected(source, "random:3", 0)) == source.files
