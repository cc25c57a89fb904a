#!/bin/sh
# One virtual environment per peer, about 6 GB each, in .venv-peers/ (or $1): sh benchmarks/peers/make_envs.sh [FOLDER]
# An environment that exists is left as it is. The versions are those of requirements-*.txt.
set -e
here=$(cd "$(dirname "$0")" && pwd)
envs=${1:-$here/../../.venv-peers}
for file in "$here"/requirements-*.txt; do
    name=$(basename "$file" .txt)
    name=${name#requirements-}
    [ -x "$envs/$name/bin/python" ] && continue
    "${PYTHON:-python3}" -m venv "$envs/$name"
    "$envs/$name/bin/python" -m pip install -r "$file" || { rm -rf "$envs/$name"; exit 1; }
done
