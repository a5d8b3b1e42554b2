#!/usr/bin/env bash
# Builds the images that tests run in containers and that the Compose file starts, where there are none to pull: from
# Debian's packages, from what setup has fetched (the nats-server of .venv, Kafka's jars in .cache), and from Python's
# packages. What is built already is left as it is: the tags stand for the files that an image is built from. Needs a
# container engine that answers.
#
#   scripts/images.sh [KIND…]
#
# The kinds are those of orthanc_events_bridge/testing/images.py; by default all but other versions (nats-2.10, …).
#
# consumers, orthanc-events and ai-service are this project's own images: docker/consumers, docker/Dockerfile,
# examples/ai-service.
#
# KEEP_IMAGES=1     leave what other states of the files have been built to: several checkouts share the engine
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

# What names places on this machine: programs that call its interpreter, where a package was installed from.
tidy() {
    rm -rf "$1/bin"
    find "$1" -name direct_url.json -delete
}

# The locked packages for an image's Python, which is another one than this machine's. All are wheels but for nkeys, which
# is pure Python.
chosen() { # version, the folder to put them into, and the lock (the bridge's)
    local lock=${3:-requirements/bridge.txt} pip=("$python" -m pip --quiet --disable-pip-version-check)
    local folder=$work/chosen/$lock/$1
    if [ ! -d "$folder" ]; then
        mkdir -p "$folder.wheels"
        awk '/^[^ #]/ { left_out = /^nkeys==/ } !left_out' "$lock" >"$folder.txt"
        awk '/^[^ #]/ { wanted = /^nkeys==/ } wanted' "$lock" >"$folder.pure.txt"
        if [ -s "$folder.pure.txt" ]; then
            "${pip[@]}" wheel --no-deps --require-hashes --no-build-isolation --wheel-dir "$folder.wheels" \
                -r "$folder.pure.txt"
            "${pip[@]}" install --target "$folder.new" --no-deps --no-compile "$folder.wheels"/*.whl
        fi
        "${pip[@]}" install --target "$folder.new" --no-deps --no-compile --require-hashes --only-binary :all: \
            --implementation cp --python-version "$1" -r "$folder.txt"
        tidy "$folder.new"
        mv "$folder.new" "$folder"
    fi
    mkdir -p "$2"
    cp -r "$folder" "$2/"
}

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
        orthanc)
            chosen 3.13 "$2/site"
            ;;
        orthanc-1.10)
            chosen 3.11 "$2/site"
            ;;
        orthanc-sid)
            chosen 3.13 "$2/site"
            chosen 3.14 "$2/site"
            ;;
        consumers | orthanc-events)
            # As .dockerignore has it.
            mkdir -p "$2/config" "$2/docker"
            cp config/orthanc_events.py "$2/config/"
            find docker -maxdepth 1 -type f -exec cp -t "$2/docker" {} +
            chosen 3.13 "$2/site"
            "$python" -m pip --quiet --disable-pip-version-check wheel --no-deps --no-build-isolation \
                --wheel-dir "$2/own" .
            "$python" -m pip --quiet --disable-pip-version-check install --target "$2/site/3.13" --upgrade --no-deps \
                "$2"/own/*.whl
            tidy "$2/site/3.13"
            rm -r "$2/own"
            ;;
        ai-service)
            chosen 3.13 "$2/site" examples/ai-service/requirements.txt
            ;;
    esac
}

# What an earlier state of the files had left.
remove_others() {
    if [ -n "${KEEP_IMAGES:-}" ]; then return; fi
    docker image ls --format '{{.Repository}}:{{.Tag}}' "${1%:*}" | { grep -vxF "$1" || true; } \
        | xargs --no-run-if-empty docker image rm >/dev/null 2>&1 || true
}

build() {
    local kind=$1 tag=$2 folder=$work/$1 began=$SECONDS name proxy suite arguments=()
    mkdir "$folder"
    if [[ $kind = base* ]]; then
        suite=${kind#base}
        command=(docker/base/build.sh "$tag" "$folder" ${suite:+"${suite#-}"})
    else
        case $kind in
            orthanc-events) cp docker/Dockerfile "$folder/" ;;
            ai-service)
                cp examples/ai-service/{Dockerfile,requirements.txt} "$folder/"
                install -D -m 644 -t "$folder/ai_service" examples/ai-service/ai_service/*.py
                ;;
            *) cp -r "docker/${recipes[$kind]}/." "$folder/" ;;
        esac
        collect "$kind" "$folder"
        case $kind in
            consumers | ai-service) arguments+=(--build-arg "STAGE=$work" --build-arg "PYTHON=${tags[${under[$kind]}]}") ;;
            orthanc-events)
                arguments+=(--build-arg "STAGE=$work" --build-arg "ORTHANC=${tags[${under[$kind]}]}")
                ;;
            *) arguments+=(--build-arg "BASE=${tags[${under[$kind]}]}") ;;
        esac
        # Docker keeps none of these in the image.
        for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
            if [ -n "${!name:-}" ]; then arguments+=(--build-arg "$name=${!name}"); fi
        done
        for name in http https; do
            proxy='' other=${name}_proxy && eval "$(apt-config shell proxy "Acquire::$name::Proxy")"
            if [ -n "$proxy" ] && [ -z "${!other:-}" ]; then arguments+=(--build-arg "$other=$proxy"); fi
        done
        # The host's network reaches what the host reaches, also where no NAT is set up.
        command=(docker build --force-rm --network host "${arguments[@]}" --tag "$tag" "$folder")
    fi
    # The classic builder is everywhere.
    DOCKER_BUILDKIT=0 "${command[@]}" >"$work/$kind.log" 2>&1 || {
        tail -n 30 "$work/$kind.log" >&2
        die "$tag could not be built, see above"
    }
    # Of two stages the first is left behind, under no name.
    docker image prune --force --filter "label=io.orthanc-events.stage=$work" >/dev/null 2>&1 || true
    remove_others "$tag"
    say "$tag: $((SECONDS - began)) s"
}

docker version >/dev/null 2>&1 || die "no container engine answers (scripts/docker.sh starts one)"
command -v "$python" >/dev/null || die "$python is missing: make setup"

declare -A tags recipes under # under: what they stand on
while read -r kind tag recipe other; do
    tags[$kind]=$tag recipes[$kind]=$recipe under[$kind]=$other
done < <("$python" -m orthanc_events_bridge.testing.images)
missing=()
if [ $# = 0 ]; then set -- nats rabbitmq kafka webhook orthanc consumers orthanc-events ai-service; fi
wanted=()
for kind in "$@"; do
    case ${under[$kind]:-} in
        '' | base*) wanted+=("$kind") ;;
        *) wanted+=("${under[$kind]}" "$kind") ;;
    esac
done
for kind in $(printf '%s\n' "${wanted[@]}" | awk '!seen[$0]++'); do
    [ "${tags[$kind]:--}" != - ] || die "$kind: there is nothing to build it from; make setup fetches what is missing"
    if ! there "${tags[$kind]}"; then missing+=("$kind"); fi
done
if [ ${#missing[@]} = 0 ]; then exit 0; fi

say "building ${missing[*]} (a minute or two)"
for kind in "${missing[@]}"; do
    base=${under[$kind]}
    if [[ $base != base* ]] || there "${tags[$base]}"; then continue; fi
    [ "$(id -u)" = 0 ] || die "debootstrap needs root; pull the official images, or let root build these"
    command -v debootstrap >/dev/null || die "debootstrap is missing: apt-get install debootstrap"
    build "$base" "${tags[$base]}"
done
for kind in "${missing[@]}"; do build "$kind" "${tags[$kind]}"; done
