"""Checks the files that other programs read: workflows, issue forms, Dependabot, the citation, the hooks.

    python tools/check_schemas.py [FOLDER]

It compares each file of the folder (default: this repository) with the schema that its reader publishes, and exits with
1 if one does not fit. The schemas are those inside check-jsonschema and pre-commit, so that nothing is fetched. A kind
of which the folder has no file is an error too, since a renamed file would otherwise be checked no more.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Which schemas each kind of file must fit. The second pattern of a kind names files that are of another kind.
SCHEMAS = (
    (".github/workflows/*.yml", "", ("vendor.github-workflows", "custom.github-workflows-require-timeout")),
    (".github/ISSUE_TEMPLATE/*.yml", "config.yml", ("vendor.github-issue-forms",)),
    (".github/ISSUE_TEMPLATE/config.yml", "", ("vendor.github-issue-config",)),
    (".github/dependabot.yml", "", ("vendor.dependabot",)),
    ("CITATION.cff", "", ("vendor.citation-file-format",)),
)
HOOKS = ".pre-commit-config.yaml"


def commands(root: Path) -> list[list[str]]:
    """The commands that check the files of a repository, as arguments of this Python.

    Args:
        root: The folder of the repository.

    Raises:
        FileNotFoundError: The folder has no file of a kind.
    """
    found = []
    for pattern, other, schemas in SCHEMAS:
        files = [str(path.relative_to(root)) for path in sorted(root.glob(pattern)) if path.name != other]
        if not files:
            raise FileNotFoundError(f"{root} has no file {pattern}; tools/check_schemas.py names the files to check")
        # CITATION.cff is YAML, which its name does not tell.
        found += [
            ["-m", "check_jsonschema", "--default-filetype=yaml", f"--builtin-schema={schema}", *files]
            for schema in schemas
        ]
    if not (root / HOOKS).is_file():
        raise FileNotFoundError(f"{root} has no file {HOOKS}; tools/check_schemas.py names the files to check")
    return [*found, ["-m", "pre_commit", "validate-config", HOOKS]]


def check(root: Path) -> list[str]:
    """Returns what does not fit: the output of each check that failed.

    Args:
        root: The folder of the repository.
    """
    findings = []
    for command in commands(root):
        done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            findings.append(f"{' '.join(command[1:])}\n{done.stdout}{done.stderr}".rstrip())
    return findings


def main() -> int:
    """Checks the folder of the command line; returns the exit status."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    findings = check(root)
    print("\n".join(findings) if findings else "schemas: every file fits")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
