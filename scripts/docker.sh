#!/usr/bin/env bash
# Runs a command with a container engine that answers, and with the images of the tests' servers in it. Where none
# answers, root starts Docker's for the time of the command. Where that can't be, the command is run all the same: tests
# in containers then say what is missing.
#
#   scripts/docker.sh COMMAND…
#
# DOCKER_HOST       an engine elsewhere, as ever
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

say() { printf 'docker: %s\n' "$*" >&2; }
[ $# != 0 ] || {
    say "usage: scripts/docker.sh COMMAND…"
    exit 2
}

answers() { docker version >/dev/null 2>&1; }

engine='' log='' mounted=()

end() {
    trap '' HUP INT TERM
    if [ -n "$engine" ] && kill "$engine" 2>/dev/null; then
        wait "$engine" || true
        say "stopped Docker"
    fi
    if [ -n "$log" ]; then rm -f "$log"; fi
    for ((i = ${#mounted[@]} - 1; i >= 0; i--)); do umount "${mounted[i]}" || true; done
}

# Where no service manager has been at work the kernel's control groups are nowhere: those of the old kind that are in
# use elsewhere (this is a chroot then), else all in the new way.
mount_groups() {
    local place=/sys/fs/cgroup group groups
    if mountpoint -q "$place"; then return; fi
    groups=$(awk '!/^#/ && $2 != 0 && $4 == 1 { print $1 }' /proc/cgroups)
    if [ -z "$groups" ]; then
        mount -t cgroup2 cgroup2 "$place" && mounted+=("$place")
        return
    fi
    mount -t tmpfs -o mode=755 cgroup "$place" || return
    mounted+=("$place")
    for group in $groups; do
        mkdir "$place/$group"
        if mount -t cgroup -o "$group" cgroup "$place/$group"; then mounted+=("$place/$group"); fi
    done
}

# In a container, with groups of the new kind, everything runs in the group that the engine's own will be below, and one
# that has processes can't limit what is below it. So they move aside, as in Docker's own image for this.
move_aside() {
    local place=/sys/fs/cgroup process
    if [ ! -e "$place/cgroup.type" ]; then return; fi # groups of the old kind, or the machine's own, which may have both
    mkdir -p "$place/init"
    for process in $(cat "$place/cgroup.procs"); do # read as a whole: it changes
        echo "$process" 2>/dev/null >"$place/init/cgroup.procs" || true # it may have ended
    done
    sed 's/[^ ]*/+&/g' "$place/cgroup.controllers" >"$place/cgroup.subtree_control"
}

start() {
    local options=() i
    trap end EXIT
    trap 'exit 130' HUP INT TERM
    mount_groups || say "control groups can't be mounted"
    move_aside || say "control groups can't be divided: limits of containers may fail"
    # The firewall is left alone: published ports of this machine are served by a proxy, tests need no way out of their
    # containers, and builds use this machine's network.
    options=(--iptables=false --ip6tables=false --ip-masq=false --ip-forward=false)
    log=$(mktemp)
    # Not in the terminal's process group, whose interrupt would end it before the tests; and not for longer than this.
    setsid setpriv --pdeathsig TERM dockerd "${options[@]}" >"$log" 2>&1 </dev/null &
    engine=$!
    for ((i = 0; i < 600; i++)); do
        if answers; then
            say "started Docker for the time of the command"
            return
        fi
        kill -0 "$engine" 2>/dev/null || break
        sleep 0.1
    done
    grep -E 'level=(error|fatal)|^failed' "$log" | tail -n 20 >&2 || true
    say "Docker did not start, see above"
}

if ! answers; then
    if [ -n "${DOCKER_HOST:-}" ]; then
        say "no container engine answers at DOCKER_HOST"
    elif [ "$(id -u)" != 0 ] || ! command -v dockerd >/dev/null; then
        say "no container engine answers: start one, or let root run this where Docker is installed (Debian: docker.io)"
    else
        start
    fi
fi
if answers; then
    "$here/images.sh" || say "going on with the official images"
fi

if [ -z "$engine" ]; then
    exec "$@"
fi
# In the background, so that a signal for this script reaches the command at once; the terminal's goes to both, unless
# the command was told to ignore it, as the shell tells what it puts there.
env --default-signal=INT,QUIT "$@" <&0 &
command=$!
trap : INT
trap 'kill -TERM "$command" 2>/dev/null || true' HUP TERM
while
    code=0
    wait "$command" || code=$?
    kill -0 "$command" 2>/dev/null
do :; done
exit "$code"
