#!/usr/bin/env bash
# `make setup`: what demo and tests need. On Debian, as root, it installs the missing system packages; everywhere
# it makes .venv from the hashed lock, with this tree installed in it. Where nothing is missing it is silent.
#
#   scripts/bootstrap.sh [rabbitmq] [kafka] [postgresql] [docker] [faketime]
#
# Orthanc, its plugins for Python and DICOMweb, DCMTK and NATS always; these only where they are named:
#
# rabbitmq          RabbitMQ, from Debian
# kafka             Java and Maven, from Debian; Apache Kafka, from Maven's repository, into .cache
# postgresql        PostgreSQL and Orthanc's plugin for it, from Debian
# docker            a container engine and Compose, from Debian
# faketime          a library that gives a process another clock, from Debian
#
# PYTHON            the interpreter for .venv (default: the first of python3, python3.11 … 3.14 that is 3.11 or newer)
# ORTHANC_BINARY, ORTHANC_PYTHON_PLUGIN, ORTHANC_DICOMWEB_PLUGIN, ORTHANC_POSTGRESQL_PLUGIN, STORESCU_BINARY,
# RABBITMQ_SERVER_BINARY, KAFKA_JARS, POSTGRES_BINARY, FAKETIME_LIBRARY
#                   where these are, if not in the usual places
# PIP_*, proxies, certificates: pip and apt find them in the environment as ever.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# --------------------------------------------------------------------------------------------- system packages

# Any Python 3.11 or newer will do. It is run, not only looked up: version managers leave names that don't run.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found: install one, or name it: make setup PYTHON=/path/to/python3"
}

has_orthanc() {
    if [ -n "${ORTHANC_BINARY:-}" ]; then
        [ -f "$ORTHANC_BINARY" ]
        return
    fi
    [ -f /usr/sbin/Orthanc ] || [ -f /usr/local/sbin/Orthanc ] || command -v Orthanc >/dev/null
}

has_plugin() { # its name, and where it is if not in the usual places
    if [ -n "$2" ]; then
        [ -f "$2" ]
        return
    fi
    local folder
    for folder in /usr/share/orthanc/plugins /usr/local/share/orthanc/plugins \
        /usr/share/orthanc/plugins-available /usr/lib/orthanc /usr/local/lib/orthanc /opt/orthanc/plugins; do
        if [ -f "$folder/$1.so" ] || [ -f "$folder/$1.dylib" ]; then return; fi
    done
    return 1
}

has_python_plugin() { has_plugin libOrthancPython "${ORTHANC_PYTHON_PLUGIN:-}"; }

has_dicomweb_plugin() { has_plugin libOrthancDicomWeb "${ORTHANC_DICOMWEB_PLUGIN:-}"; }

has_postgresql_plugin() { has_plugin libOrthancPostgreSQLIndex "${ORTHANC_POSTGRESQL_PLUGIN:-}"; }

has_postgresql() {
    [ -n "${POSTGRES_BINARY:-}" ] || compgen -G "/usr/lib/postgresql/*/bin/postgres" >/dev/null \
        || command -v postgres >/dev/null
}

has_dcmtk() {
    if [ -n "${STORESCU_BINARY:-}" ]; then
        [ -f "$STORESCU_BINARY" ]
        return
    fi
    command -v storescu >/dev/null
}

wanted() { [[ " $components " = *" $1 "* ]]; }

has_rabbitmq() {
    [ -n "${RABBITMQ_SERVER_BINARY:-}" ] || [ -f /usr/lib/rabbitmq/bin/rabbitmq-server ] \
        || command -v rabbitmq-server >/dev/null
}

kafka_version=$(sed -n 's/.*<version>\([0-9.]*\)<.*/\1/p' docker/kafka/pom.xml | head -n 1)
kafka_jars=.cache/kafka-$kafka_version
# It comes into its place as a whole, or not at all.
has_kafka() { [ -n "${KAFKA_JARS:-}" ] || [ -d "$kafka_jars" ]; }

has_faketime() {
    [ -n "${FAKETIME_LIBRARY:-}" ] || compgen -G '/usr/lib/*/faketime/libfaketimeMT.so.1' >/dev/null
}

has_venv() { [ -x .venv/bin/python ] || "$python" -c 'import ensurepip, venv' 2>/dev/null; }

# Debian's pip reads the certificates of the system.
has_certificates() { [ ! -e /etc/debian_version ] || [ -s /etc/ssl/certs/ca-certificates.crt ]; }

# Prints the Debian packages that are missing.
missing_packages() {
    has_certificates || echo ca-certificates
    has_dcmtk || echo dcmtk
    has_orthanc || echo orthanc
    has_python_plugin || echo orthanc-python
    has_dicomweb_plugin || echo orthanc-dicomweb
    has_venv || echo python3-venv
    if wanted rabbitmq; then has_rabbitmq || echo rabbitmq-server; fi
    if wanted kafka; then
        command -v java >/dev/null || echo default-jre-headless
        has_kafka || command -v mvn >/dev/null || echo maven
    fi
    if wanted postgresql; then
        has_postgresql || echo postgresql
        has_postgresql_plugin || echo orthanc-postgresql
    fi
    if wanted docker; then
        command -v dockerd >/dev/null || echo docker.io
        command -v debootstrap >/dev/null || echo debootstrap
        command -v docker-compose >/dev/null || docker compose version >/dev/null 2>&1 || echo docker-compose
    fi
    if wanted faketime; then has_faketime || echo libfaketime; fi
}

# The package's maintainer scripts ask /usr/sbin/policy-rc.d before they start a service. Ours says no, so that no
# Orthanc comes up on the standard ports. It is there during the installation only: what was there before comes
# back, also after an interruption, and if this was killed, at the next `make setup`.
policy=/usr/sbin/policy-rc.d
saved=$policy.orthanc-events-bridge
marker="# by the setup of orthanc-events-bridge, for the time of an installation"

restore_policy() {
    if [ -e "$saved" ] || [ -L "$saved" ]; then
        mv -f "$saved" "$policy"
    elif [ -f "$policy" ] && grep -qF "$marker" "$policy"; then
        rm -f "$policy"
    fi
}

deny_services() {
    if [ -e "$policy" ] || [ -L "$policy" ]; then mv "$policy" "$saved"; fi
    printf '#!/bin/sh\n%s\nexit 101\n' "$marker" >"$policy"
    chmod 755 "$policy"
}

# One installation at a time: two would take each other's policy for the one to restore.
lock_system() {
    exec 9>/run/lock/orthanc-events-bridge-setup
    flock 9
}

# After a kill of an earlier one.
recover_policy() (
    if [ -e "$saved" ] || grep -qsF "$marker" "$policy"; then
        lock_system
        restore_policy
    fi
)

install_packages() (
    lock_system
    restore_policy
    log=$(mktemp)
    trap 'restore_policy; rm -f "$log"' EXIT
    trap 'exit 130' HUP INT TERM
    apt() {
        if ! DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" \
            >"$log" 2>&1 </dev/null; then
            tail -n 30 "$log" >&2
            die "apt-get $1 failed, see above"
        fi
    }
    say "updating the list of Debian packages"
    apt update
    say "installing from Debian: $*"
    deny_services
    apt install --yes --no-install-recommends "$@"
)

system() {
    local missing
    if [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then recover_policy; fi
    read -r -d '' -a missing < <(missing_packages) || true
    if [ ${#missing[@]} = 0 ]; then return; fi
    if [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] && command -v apt-get >/dev/null; then
        install_packages "${missing[@]}"
        read -r -d '' -a missing < <(missing_packages) || true
        if [ ${#missing[@]} = 0 ]; then return; fi
        die "still missing after the installation: ${missing[*]}"
    fi
    local why="this is not Debian"
    if [ -e /etc/debian_version ]; then why="this is not root"; fi
    say "missing: ${missing[*]} (Debian's names), and $why, so nothing is installed by itself."
    if [ -e /etc/debian_version ]; then
        say "install: sudo apt-get install --no-install-recommends ${missing[*]}"
    else
        say "install: Orthanc 1.10 or newer with its plugins for Python and DICOMweb (https://orthanc.uclouvain.be/),"
        say "DCMTK, Python's venv"
        say "elsewhere than usual? set ORTHANC_BINARY, ORTHANC_PYTHON_PLUGIN, ORTHANC_DICOMWEB_PLUGIN, STORESCU_BINARY"
    fi
    has_venv || die "without Python's venv module there is no going on"
    say "going on without: tests that need one of these are skipped, with the reason"
}

# ------------------------------------------------------------------------------------------------------- Kafka

kafka() {
    if ! wanted kafka || has_kafka; then return; fi
    if ! command -v mvn >/dev/null; then return; fi # said already
    say "fetching Apache Kafka $kafka_version from Maven's repository (45 jars)"
    mkdir -p .cache
    local new
    new=$(mktemp -d .cache/kafka.XXXXXX)
    if mvn --batch-mode --quiet --file docker/kafka/pom.xml dependency:copy-dependencies \
        -DincludeScope=runtime "-DoutputDirectory=$PWD/$new" >"$new.log" 2>&1; then
        mv "$new" "$kafka_jars"
        rm -f "$new.log"
    else
        tail -n 20 "$new.log" >&2
        rm -rf "$new" "$new.log"
        die "Maven could not fetch Apache Kafka, see above"
    fi
}

# ------------------------------------------------------------------------------------------------- environment

pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check --no-input "$@"; }

# The stamps say what .venv was made from; the place too, since the scripts in .venv/bin name it.
fresh() { [ "$(cat ".venv/stamp-$1" 2>/dev/null)" = "$2" ]; }
stamp() { printf '%s\n' "$2" >".venv/stamp-$1"; }

environment() {
    local lock project
    lock=$(cat requirements/build.txt requirements/dev.txt | cksum)
    project=$(cat pyproject.toml orthanc_events_bridge/__init__.py | cksum)

    # Made anew for another lock: what is no longer locked must not linger.
    if ! fresh lock "$lock" || ! fresh place "$PWD" || ! .venv/bin/python --version >/dev/null 2>&1 \
        || { [ -n "${PYTHON:-}" ] && ! fresh python "$python"; }; then
        say "making .venv with $("$python" --version)"
        rm -rf .venv
        "$python" -m venv .venv || die "\"$python -m venv .venv\" failed"
        stamp python "$python"
        stamp place "$PWD"
        say "installing the locked Python packages"
        # All wheels but for nkeys, which is pure Python and comes as a source distribution only. It is built with
        # what the first step has installed, so that nothing comes in unpinned.
        pip install --require-hashes --only-binary :all: -r requirements/build.txt
        pip install --require-hashes --no-build-isolation -r requirements/dev.txt
        stamp lock "$lock"
    fi
    if ! fresh project "$project"; then
        say "installing this tree into .venv (editable)"
        pip install --no-deps --no-build-isolation --editable .
        stamp project "$project"
    fi
}

components=$*
for component in $components; do
    case $component in
        rabbitmq | kafka | postgresql | docker | faketime) ;;
        *) die "there is no component $component: rabbitmq, kafka, postgresql, docker, faketime" ;;
    esac
done

python=$(find_python)
system
# One at a time: `make demo` and `make test` can be started side by side.
if command -v flock >/dev/null; then
    exec 8>.setup.lock
    flock 8
fi
kafka
environment
