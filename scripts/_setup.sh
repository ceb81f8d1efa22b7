# Sourced by the other scripts: makes .venv beside the repository's README and installs sedd_graph into it.
# usage: setup_venv EXTRAS   (such as "" or "test,all")
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup_venv() {
  local extras=${1:-} python=${PYTHON:-python3} want
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "sedd_graph needs Python 3.11 or newer; $("$python" --version) was found (set PYTHON=/path/to/python3)" >&2
    exit 1
  }
  [ -x .venv/bin/python ] || { echo "making .venv"; "$python" -m venv .venv; }
  # Reinstall only where something that decides the install has changed.
  want=$(cat pyproject.toml constraints.txt sedd_graph/__init__.py | cksum | tr -d ' \n'):${extras}
  if [ "$(cat .venv/.sedd_graph-installed 2>/dev/null)" != "$want" ]; then
    echo "installing sedd_graph${extras:+[$extras]} (a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
    echo "$want" > .venv/.sedd_graph-installed
  fi
}
