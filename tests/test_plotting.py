"""Figures as files: repeatable, whole or absent, and one line without the extra."""

import sys

import pytest

from vr_jax.errors import UserError
from vr_jax.plotting import MatplotlibMissingError, check_plotting, figure_file


def draw(path, height=1.0):
    with figure_file(path, (2, 1), {"font.size": 9}) as figure:
        figure.subplots().plot([0, 1], [0, height], label="a")


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_the_same_numbers_give_the_same_file(tmp_path, suffix):
    one, two, other = (tmp_path / "new" / f"{name}.{suffix}" for name in ("one", "two", "other"))
    draw(one)
    draw(two)
    draw(other, height=2.0)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(KeyError), figure_file(tmp_path / "a.svg", (1, 1)):
        raise KeyError
    with pytest.raises(UserError, match=r"a\.gif: expected a file name that ends in \.svg, \.png, \.pdf"):
        draw(tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MatplotlibMissingError, match=r"pip install 'vr-jax\[benchmarks\]' brings it") as error:
        check_plotting()
    assert "\n" not in str(error.value)
