#!/bin/sh
# What Orthanc's image does, behind what is said in files.
set -eu
. /opt/orthanc-events/variables.sh
# A plain Orthanc, for whoever wants one from the same image.
if [ "${ORTHANC_EVENTS_ENABLED:-true}" = false ]; then
    unset ORTHANC__PYTHON_SCRIPT ORTHANC__PYTHON__ALLOW_THREADS
    export PYTHON_PLUGIN_ENABLED=false
fi
exec /docker-entrypoint.sh "$@"
