#!/usr/bin/env bash
# Builds the images of the servers that tests run in containers, where there are none to pull: from Debian's packages,
# and from what setup has fetched (the nats-server of .venv, Kafka's jars in .cache). What is built already is left as
# it is: the tags stand for the files that an image is built from. Needs a container engine that answers.
#
#   scripts/images.sh [nats|rabbitmq|kafka|webhook|orthanc|orthanc-sid…]     default: all but the last
#
# PYTHON            the interpreter that has this project (default: .venv/bin/python)
# DEBIAN_MIRROR     as docker/base/build.sh says
# TMPDIR            for Debian's files, 300 MB; a file system mounted noexec or nodev won't do
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'images: %s\n' "$*"; }
die() {
    printf 'images: %s\n' "$*" >&2
    exit 1
}

python=${PYTHON:-.venv/bin/python}

work=$(mktemp -d "${TMPDIR:-/tmp}/orthanc-events-images.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' HUP INT TERM

there() { docker image inspect "$1" >/dev/null 2>&1; }

# Puts into the build's folder what an image takes from outside.
collect() {
    case $1 in
        nats)
            cp "$("$python" -c 'from orthanc_events_bridge.testing import programs; print(programs.find_nats())')" \
                "$2/nats-server"
            ;;
        kafka)
            mkdir "$2/libs"
            cp .cache/kafka-*/*.jar "$2/libs/"
            ;;
        orthanc | orthanc-sid)
            # For the image's Python, which is another one than this machine's; without nkeys, which has no wheel.
            awk '/^[^ #]/ { left_out = /^nkeys==/ } !left_out' requirements/bridge.txt >"$2/requirements.txt"
            awk '/^[^ #]/ { wanted = /^(aiokafka|async-timeout)==/ } wanted' requirements/dev.txt >>"$2/requirements.txt"
            for python_version in 3.13 3.14; do
                if [ "$1" = orthanc ] && [ $python_version != 3.13 ]; then continue; fi
                "$python" -m pip --quiet --disable-pip-version-check install --target "$2/site/$python_version" \
                    --no-deps --require-hashes --only-binary :all: --implementation cp \
                    --python-version $python_version -r "$2/requirements.txt"
            done
            ;;
    esac
}

# What an earlier state of the files had left.
remove_others() {
    docker image ls --format '{{.Repository}}:{{.Tag}}' "${1%:*}" | { grep -vxF "$1" || true; } \
        | xargs --no-run-if-empty docker image rm >/dev/null 2>&1 || true
}

build() {
    local kind=$1 tag=$2 folder=$work/$1 began=$SECONDS name arguments=()
    mkdir "$folder"
    if [ "$kind" = base ]; then
        command=(docker/base/build.sh "$tag" "$folder")
    else
        cp "docker/$kind/Dockerfile" "$folder/"
        collect "$kind" "$folder"
        for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
            if [ -n "${!name:-}" ]; then arguments+=(--build-arg "$name=${!name}"); fi
        done
        # The host's network reaches what the host reaches, also where no NAT is set up.
        command=(docker build --force-rm --network host --build-arg "BASE=${tags[base]}" "${arguments[@]}" --tag "$tag" "$folder")
    fi
    # The classic builder is everywhere.
    DOCKER_BUILDKIT=0 "${command[@]}" >"$work/$kind.log" 2>&1 || {
        tail -n 30 "$work/$kind.log" >&2
        die "$tag could not be built, see above"
    }
    remove_others "$tag"
    say "$tag: $((SECONDS - began)) s"
}

docker version >/dev/null 2>&1 || die "no container engine answers (scripts/docker.sh starts one)"
command -v "$python" >/dev/null || die "$python is missing: make setup"

declare -A tags
while read -r kind tag; do tags[$kind]=$tag; done < <("$python" -m orthanc_events_bridge.testing.images)
missing=()
if [ $# = 0 ]; then set -- nats rabbitmq kafka webhook orthanc; fi
for kind in "$@"; do
    [ "${tags[$kind]:--}" != - ] || die "$kind: there is nothing to build it from; make setup fetches what is missing"
    if ! there "${tags[$kind]}"; then missing+=("$kind"); fi
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi

say "building ${missing[*]} (a minute or two)"
if ! there "${tags[base]}"; then
    [ "$(id -u)" = 0 ] || die "debootstrap needs root; pull the official images, or let root build these"
    command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"
    build base "${tags[base]}"
fi
for kind in "${missing[@]}"; do build "$kind" "${tags[$kind]}"; done
