"""One measurement of three tiny systems, which all tests of its results share."""

import json

import pytest

from tests.efficiency import tiny_systems
from vr_jax.efficiency import JSON, EfficiencySettings, Source, measure, parse_scores, read_systems, write

SETTINGS = EfficiencySettings(repeats=3, warmup=1, new_tokens=4, batch_size=2, text_tokens=40)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    return tiny_systems.write(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="session")
def run(config_file, tmp_path_factory):
    """The folder and the report of one run with scores."""
    output = tmp_path_factory.mktemp("run") / "efficiency"
    output.mkdir()
    sources = [Source("config", f"{config_file}:{name}") for name in ("baseline", "uncompressed", "fastv")]
    chosen = read_systems(sources, SETTINGS.image)
    scores = parse_scores(["fastv=40", "baseline=42.9", "uncompressed=45"], [system.name for system in chosen])
    report = measure(chosen, SETTINGS)
    write(output, report, scores)
    return output, report


@pytest.fixture(scope="session")
def found(run):
    """The contents of efficiency.json, and its systems by name."""
    content = json.loads((run[0] / JSON).read_text())
    return content, {system["name"]: system for system in content["systems"]}
