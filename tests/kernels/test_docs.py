"""The constants that docs/kernels.md names exist."""

import re

import pytest

from tests.docs import DOCS

ROW = re.compile(r"^\| `(vr_jax/kernels/[\w/]+\.py)` \| (.*?) \|", re.MULTILINE)
ROWS = ROW.findall((DOCS / "kernels.md").read_text())


def test_the_table_is_there():
    assert len(ROWS) == 4


@pytest.mark.parametrize(("file", "names"), ROWS)
def test_block_sizes_stand_in_the_named_file(file, names):
    text = (DOCS.parent / file).read_text()
    for name in re.findall(r"`([A-Z_]+)`", names):
        assert re.search(rf"^{name} = \d+$", text, re.MULTILINE), name
