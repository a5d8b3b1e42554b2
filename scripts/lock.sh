#!/usr/bin/env bash
# `make lock`: pin every package by version and hash, for Python 3.11 to 3.14, without index addresses.
# What is pinned already stays unless it has to move; `scripts/lock.sh --upgrade` takes the newest of all.
set -euo pipefail
cd "$(dirname "$0")/.."

export UV_CUSTOM_COMPILE_COMMAND="make lock"
compile() {
    .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links "$@"
}
compile "$@" requirements/build.in --output-file requirements/build.txt
compile "$@" pyproject.toml --extra dev --constraint requirements/build.txt --output-file requirements/dev.txt
compile "$@" pyproject.toml --extra all --constraint requirements/dev.txt \
    --output-file requirements/bridge.txt
echo "requirements/build.txt, dev.txt (all of development) and bridge.txt (bridge and consumers, with every broker) are written"
