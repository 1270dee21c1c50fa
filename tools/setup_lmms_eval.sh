#!/bin/sh
# Creates the virtual environment $1 in which lmms-eval runs vr_jax (docs/lmms_eval.md), at the pinned versions.
set -eu
cd "$(dirname "$0")/.."
venv=${1:?usage: setup_lmms_eval.sh VENV}

sh tools/setup_env.sh "$venv" lmms-eval
# Without its requirements: the extra holds those it needs for tasks with images.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt lmms-eval
"$venv/bin/python" - <<'END'
from lmms_eval.models import get_model

get_model("vr_jax")
END
