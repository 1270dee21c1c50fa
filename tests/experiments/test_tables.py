"""The declaration of the paper's tables."""

import pytest

from vr_jax.errors import ConfigError
from vr_jax.experiments import TABLES, find_row, listing


def test_the_tables_have_the_paper_s_rows():
    counted = {name: [row for row, one in table.rows.items() if not one.extra] for name, table in TABLES.items()}
    assert {name: len(rows) for name, rows in counted.items()} == {
        "table1": 8, "table2": 6, "table3": 4, "table4": 6, "table5a": 5, "table5b": 3, "table5c": 3,
    }  # fmt: skip


def test_the_listing_has_every_row_with_its_methods():
    text = listing()
    assert all(f"  {row} " in text for table in TABLES.values() for row in table.rows)
    assert "pool(stride=3) sva(insert_after=(1, 4))" in text
    assert text.count("(not in the paper)") == sum(
        one.extra for table in TABLES.values() for one in table.rows.values()
    )


@pytest.mark.parametrize(
    ("table", "row", "message"),
    [
        ("table9", "pooling", "no table 'table9': expected one of table1, table2"),
        ("table1", "pool", "table1 has no row 'pool': expected one of pooling, pooling_vr"),
    ],
)
def test_an_unknown_row_is_named(table, row, message):
    with pytest.raises(ConfigError, match=message):
        find_row(table, row)
