#!/usr/bin/env bash
# Runs tests side by side. They then compete for the processors, and some for the time in which a broker has to answer:
# what has failed is run again, alone, and has to pass then. Both results are shown.
#
#   scripts/beside.sh PYTEST OPTIONS…
#
# WORKERS           how many at a time (default: 3; 0: one after the other, and nothing is run again)
set -euo pipefail
pytest=$1
shift
workers=${WORKERS:-3}

code=0
"$pytest" -n "$workers" --durations=10 "$@" || code=$?
# 1: tests have failed. Everything else, an interruption say, is final.
if [ "$code" != 1 ] || [ "$workers" = 0 ]; then exit "$code"; fi
printf '\ntests: what failed beside others is run again, alone\n'
exec "$pytest" --last-failed --last-failed-no-failures=none "$@"
