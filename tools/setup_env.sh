#!/bin/sh
# Creates the virtual environment $1 with this project and its extras $2 (e.g. "test,lint").
# Uses uv where it is installed (it can fetch Python 3.12 itself), else any Python >= 3.12 with venv and pip.
# Two variables change what is installed:
#   VERSIONS      pinned (those of constraints.txt, the default), lowest or newest (those that pyproject.toml allows)
#   BASE_PYTHON   the Python to make the environment with, such as python3.13
set -eu
venv=$1
extras=${2:-}
target=.
[ -n "$extras" ] && target=".[$extras]"

fail() { echo "setup: $*" >&2; exit 1; }

case ${VERSIONS:=pinned} in
  pinned) versions="-c constraints.txt" ;;
  lowest) versions="--resolution lowest-direct" ;;
  newest) versions="--upgrade" ;;
  *) fail "VERSIONS is '$VERSIONS', expected pinned, lowest or newest" ;;
esac

if [ ! -x "$venv/bin/python" ]; then
  python=
  for candidate in ${BASE_PYTHON:-python3.12 python3.13 python3.14 python3 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -n "$python" ]; then
    "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian: apt-get install python3-venv"
  elif [ -n "${BASE_PYTHON:-}" ]; then
    fail "BASE_PYTHON is '$BASE_PYTHON', which is no Python 3.12 or newer"
  elif command -v uv >/dev/null 2>&1; then
    uv venv --quiet --seed --python 3.12 "$venv"
  else
    fail "needs Python 3.12 or newer, or uv (https://docs.astral.sh/uv) to fetch it; found neither"
  fi
fi

# uv installs ten times faster than pip; pip alone does too, and knows mirrors that only pip.conf names.
if command -v uv >/dev/null 2>&1; then
  installer="uv pip install --quiet --python $venv/bin/python"
elif "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv >/dev/null 2>&1; then
  installer="$venv/bin/uv pip install --quiet --python $venv/bin/python"
else
  installer=
fi
if [ -n "$installer" ] && $installer $versions -e "$target"; then
  exit 0
fi
[ "$VERSIONS" = lowest ] && fail "only uv can install the lowest versions, and it could not"
echo "setup: uv could not install; trying pip" >&2
exec "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $versions -e "$target"
