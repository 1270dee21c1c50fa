"""The files that other programs and newcomers read agree with the project: workflow, hooks, citation, changelog."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tools import check_schemas

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
STEPS = [(name, step) for name, job in WORKFLOW["jobs"].items() for step in job["steps"]]
CHANGES = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limits")
# Requirements of lmms-eval itself, whose environment has the versions of constraints.txt (tools/setup_lmms_eval.sh).
UNBOUND_EXTRAS = ("lmms-eval",)


def requirements(extras: list[str]) -> list[Requirement]:
    """The requirements of the project and of some extras, without the project itself."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != PROJECT["name"]]


def pythons() -> list[str]:
    """The versions of Python that the classifiers name, lowest first."""
    found = [re.fullmatch(r"Programming Language :: Python :: (\d+\.\d+)", line) for line in PROJECT["classifiers"]]
    return sorted((match[1] for match in found if match), key=Version)


def test_every_requirement_has_a_lower_bound_that_works_with_the_pins():
    """Without a bound, the lowest version is one of years ago that cannot even be built."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    bound = [name for name in PROJECT["optional-dependencies"] if name not in UNBOUND_EXTRAS]
    for requirement in requirements(bound):
        assert any(part.operator == ">=" for part in requirement.specifier), requirement
    for requirement in requirements(list(PROJECT["optional-dependencies"])):
        pin = pins.get(requirement.name.replace("_", "-").lower())
        assert pin is None or requirement.specifier.contains(pin, prereleases=True), (requirement, pin)


def test_the_workflow_tests_every_python_with_the_lowest_and_the_newest_versions():
    rows = [(row["python"], row["versions"]) for row in WORKFLOW["jobs"]["versions"]["strategy"]["matrix"]["include"]]
    assert {python for python, _ in rows} == set(pythons())
    assert (pythons()[0], "lowest") in rows
    assert {python for python, versions in rows if versions == "newest"} == set(pythons())
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(f">={pythons()[0]}")


def test_the_workflow_may_only_read_and_names_its_actions_by_their_major_version():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "concurrency" in WORKFLOW
    assert not [name for name, job in WORKFLOW["jobs"].items() if "permissions" in job or "timeout-minutes" not in job]
    for _, step in STEPS:
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
            assert "checkout" not in step["uses"] or step["with"] == {"persist-credentials": False}


def test_the_workflow_runs_what_there_is():
    for name, step in STEPS:
        for command in step.get("run", "").splitlines():
            program, what = command.split()
            if program == "make":
                assert re.search(rf"^{re.escape(what)}:", MAKEFILE, re.MULTILINE), f"{name}: make {what}"
            else:
                assert program == "sh"
                assert (ROOT / what).is_file(), f"{name}: {what}"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"VERSIONS": "latest"}, "VERSIONS is 'latest', expected pinned, lowest or newest"),
        ({"BASE_PYTHON": "false"}, "BASE_PYTHON is 'false', which is no Python 3.12 or newer"),
    ],
    ids=["versions", "python"],
)
def test_an_environment_that_cannot_be_made_is_one_line(variables, message, tmp_path):
    done = subprocess.run(
        ["sh", "tools/setup_env.sh", str(tmp_path / "env")],
        cwd=ROOT,
        env={**os.environ, "PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, f"setup: {message}\n")


def test_the_hooks_are_local_and_those_of_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    assert {hook["language"] for hook in hooks[0]["hooks"]} == {"system"}
    [recipe] = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    lint = recipe.replace("$(PYTHON)", ".venv/bin/python").replace("$(VENV)", ".venv").replace(" --check", "")
    commands = [re.sub(r" \.$", "", line.strip()) for line in lint.splitlines()]
    assert [hook["entry"] for hook in hooks[0]["hooks"]] == commands


def test_the_citation_and_the_changelog_have_the_version_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert headings[0] == "[Unreleased]"
    assert all(released)
    versions = [Version(match[1]) for match in released]
    assert versions == sorted(versions, reverse=True)
    assert not released or released[0][1] == PROJECT["version"]
    assert citation["version"] == PROJECT["version"]
    assert bool(released) == ("date-released" in citation)
    assert citation["license"] == PROJECT["license"]
    assert "2506.03928" in citation["preferred-citation"]["url"]


def test_the_changelog_sorts_changes_by_their_kind():
    text = (ROOT / "CHANGELOG.md").read_text()
    kinds = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert kinds
    assert set(kinds) <= set(CHANGES)
    assert not re.search(r"^\* [a-z]", text, re.MULTILINE), "an entry is a sentence"


FAULTS = {  # for each file, a text and what breaks it
    ".github/workflows/ci.yml": ("runs-on:", "run-on:"),
    ".github/ISSUE_TEMPLATE/bug.yml": ("type: textarea", "type: text"),
    ".github/ISSUE_TEMPLATE/config.yml": ("true", "perhaps"),
    ".github/dependabot.yml": ("monthly", "sometimes"),
    "CITATION.cff": ("family-names", "surname"),
    ".pre-commit-config.yaml": ("- id: mypy", "- identity: mypy"),
}


@pytest.mark.slow  # It starts seven programs; `make lint` checks the files themselves.
@pytest.mark.skipif(importlib.util.find_spec("check_jsonschema") is None, reason="needs the extra 'lint'")
def test_a_file_that_does_not_fit_its_schema_is_found(tmp_path):
    for name in [*FAULTS, ".github/ISSUE_TEMPLATE/method.yml"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert check_schemas.check(tmp_path) == []
    for name, (text, fault) in FAULTS.items():
        whole = (tmp_path / name).read_text()
        assert text in whole
        (tmp_path / name).write_text(whole.replace(text, fault))
    findings = check_schemas.check(tmp_path)
    assert [name for name in FAULTS if not any(name in finding for finding in findings)] == []


def test_a_kind_of_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("has no file .github/workflows/*.yml")):
        check_schemas.check(tmp_path)
