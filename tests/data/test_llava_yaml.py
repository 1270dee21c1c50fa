"""LLaVA's data files in YAML: what they list is read, and every other field is refused by its name."""

import pytest

from vr_jax.data.llava_yaml import read_llava_yaml
from vr_jax.errors import UserError

# The form of LLaVA-NeXT@df17966:scripts/train/single_image.yaml.
LIST = """
datasets:
  - json_path: /data/a.json # a comment
    sampling_strategy: "first:50%"
  - json_path: b.jsonl
    sampling_strategy: all
  - json_path: c.json
"""


def test_paths_and_strategies_in_order(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(LIST)
    assert read_llava_yaml(path) == [("/data/a.json", "first:50%"), ("b.jsonl", "all"), ("c.json", "all")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [", "not valid YAML"),
        ("", r"found None, expected the field 'datasets' alone"),
        ("- a.json", r"found \['a.json'\], expected the field 'datasets'"),
        ("datasets: []\nmore: 1", "found datasets, more, expected the field 'datasets' alone"),
        ("datasets: []", r"datasets = \[\]: expected a list of one or more"),
        ("datasets: [a.json]", r"datasets\[0\] = 'a.json': expected the fields json_path and sampling_strategy"),
        ("datasets: [{json_path: a.json, weight: 2}]", r"datasets\[0\] has the field 'weight'; known are json_path"),
        ("datasets: [{sampling_strategy: all}]", r"datasets\[0\].json_path = None: expected a text"),
        ("datasets: [{json_path: a.json, sampling_strategy: 3}]", r"datasets\[0\].sampling_strategy = 3: expected a"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, text, message):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_llava_yaml(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml"):
        read_llava_yaml(tmp_path / "gone.yaml")
