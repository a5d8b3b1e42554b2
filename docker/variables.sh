#!/bin/sh
# Read by the programs of Orthanc's image: of every variable that begins with ORTHANC_, NAME_FILE names a file with the
# value of NAME, which keeps it out of the container's description. Not of options (ORTHANC__…, ORTHANC_EVENTS__…), where
# it is an option's own name.
for name in $(env | sed -n 's/^\(ORTHANC_[A-Z0-9_]*\)_FILE=.*/\1/p' | grep -v __); do
    eval "value=\${$name:-} file=\${${name}_FILE:-}"
    if [ -z "$value" ] && [ -n "$file" ]; then
        value=$(cat "$file")
        export "$name=$value"
    fi
done
