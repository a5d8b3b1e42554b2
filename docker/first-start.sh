#!/bin/sh
# Makes in the folder $1 what each installation has to have of its own, at its first start: passwords for Orthanc's users
# `orthanc` and `ai`, the source that the events name, the secrets of pseudonyms. What is there stays; a password that is
# given (ORTHANC_PASSWORD) takes the place of the one there. In the folder $2 is what the AI service logs in with: the
# header, and nothing else.
set -eu
umask 027
cd "$1"

keep() { # the name, and what to write unless it is there
    if [ ! -s "$1" ]; then
        printf '%s\n' "$2" >"$1.new"
        mv "$1.new" "$1" # whole, or not at all
    fi
}

random() { python3 -c 'import secrets; print(secrets.token_hex(24))'; }

if [ -n "${ORTHANC_PASSWORD:-}" ]; then rm -f orthanc-password; fi
keep orthanc-password "${ORTHANC_PASSWORD:-$(random)}"
keep ai-password "$(random)"
keep source "${ORTHANC_EVENTS_SOURCE:-urn:uuid:$(python3 -c 'import uuid; print(uuid.uuid4())')}"
umask 077
keep research.secret "$(random)"
keep ai.secret "$(random)"

umask 027
printf 'Basic %s\n' "$(printf 'ai:%s' "$(cat ai-password)" | base64 -w 0)" >"$2/authorization"
