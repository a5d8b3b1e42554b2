#!/bin/sh
# What Orthanc's image does, behind what is said in files: of every variable that begins with ORTHANC_, NAME_FILE names a
# file with the value of NAME, which keeps it out of the container's description. Options (with two underscores) are the
# bridge's own: it reads its files by itself.
set -eu
for name in $(env | sed -n 's/^\(ORTHANC_[A-Z0-9_]*\)_FILE=.*/\1/p' | grep -v __); do
    eval "value=\${$name:-} file=\${${name}_FILE:-}"
    if [ -z "$value" ] && [ -n "$file" ]; then
        value=$(cat "$file")
        export "$name=$value"
    fi
done
# A plain Orthanc, for whoever wants one from the same image.
if [ "${ORTHANC_EVENTS_ENABLED:-true}" = false ]; then
    unset ORTHANC__PYTHON_SCRIPT ORTHANC__PYTHON__ALLOW_THREADS
    export PYTHON_PLUGIN_ENABLED=false
fi
exec /docker-entrypoint.sh "$@"
