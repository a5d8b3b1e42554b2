#!/usr/bin/env bash
# `make test-bare`: the README's two commands in a freshly debootstrapped Debian 12 that has Python and make only.
# Needs root, debootstrap and git. Writes tests/bare/RESULT.md. Everything runs in a mount and process namespace of
# its own, so that its mounts and processes end with it, however it ends.
#
#   scripts/test-bare.sh [--worktree] [TARGET…]
#
# --worktree       the files as they are, in place of a clone of the last commit
# TARGET           other targets of make than demo and test; then the result is only printed
# DEBIAN_MIRROR    default: http://deb.debian.org/debian
# TMPDIR           for the new system, 3 GB; a file system mounted noexec or nodev won't do
set -euo pipefail
cd "$(dirname "$0")/.."

die() {
    printf 'test-bare: %s\n' "$*" >&2
    exit 2
}
say() { printf 'test-bare: %s\n' "$*"; }

if [ "${IN_OWN_NAMESPACE:-}" != yes ]; then
    [ "$(id -u)" = 0 ] || die "debootstrap and chroot need root"
    for program in debootstrap git unshare; do
        command -v "$program" >/dev/null || die "$program is missing: apt-get install debootstrap git util-linux"
    done
    work=$(mktemp -d "${TMPDIR:-/tmp}/orthanc-events-bare.XXXXXX")
    child=
    # unshare would sit an interruption out: it is passed on, and the namespace ends as a whole. By the time of the
    # removal nothing is mounted below the folder any more; --one-file-system is for the day when this is wrong.
    clean() {
        trap '' HUP INT TERM
        if [ -n "$child" ]; then
            kill -KILL "$child" 2>/dev/null || true
            wait "$child" 2>/dev/null || true
        fi
        rm -rf --one-file-system "$work"
    }
    trap clean EXIT
    trap 'exit 130' HUP INT TERM
    IN_OWN_NAMESPACE=yes WORK=$work unshare --mount --pid --fork --kill-child=KILL --mount-proc \
        bash "$0" "$@" </dev/null &
    child=$!
    code=0
    wait "$child" || code=$?
    child=
    exit "$code"
fi

# --------------------------------------------------------------------------------------------- inside: a new system

source_of=clone
if [ "${1:-}" = --worktree ]; then
    source_of=worktree
    shift
fi
targets=("$@")
if [ $# = 0 ]; then targets=(demo test); fi

root=$WORK/debian
home=/root/orthanc-events-bridge
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

say "debootstrap of Debian 12 (a minute)"
debootstrap --variant=minbase --include=python3,make bookworm "$root" "$mirror" >"$WORK/debootstrap.log" 2>&1 || {
    tail -n 20 "$WORK/debootstrap.log" >&2
    die "debootstrap failed"
}

# What this host needs to reach the registries, the new system needs too.
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
if [ -f /etc/pip.conf ]; then cp -L /etc/pip.conf "$root/etc/"; fi
# Maven and Java trust what the system trusts.
if compgen -G "/usr/local/share/ca-certificates/*.crt" >/dev/null; then
    mkdir -p "$root/usr/local/share/ca-certificates"
    cp -L /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
fi
apt-config dump | grep -E '^Acquire::(https?|Check|Retries|ForceIPv)' >"$root/etc/apt/apt.conf.d/90host" || true
inside=(HOME=/root LANG=C.UTF-8 "PATH=/usr/sbin:/usr/bin:/sbin:/bin" TERM=dumb)
for name in http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY \
    PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST PIP_DEFAULT_TIMEOUT PIP_RETRIES; do
    if [ -n "${!name:-}" ]; then inside+=("$name=${!name}"); fi
done
bundle=${PIP_CERT:-${SSL_CERT_FILE:-${REQUESTS_CA_BUNDLE:-}}}
if [ -n "$bundle" ] && [ -f "$bundle" ]; then
    mkdir -p "$root/etc/host"
    cp -L "$bundle" "$root/etc/host/ca.pem"
    for name in PIP_CERT SSL_CERT_FILE REQUESTS_CA_BUNDLE; do inside+=("$name=/etc/host/ca.pem"); done
fi

if [ "$source_of" = clone ]; then
    commit=$(git -c safe.directory='*' rev-parse --short=12 HEAD) || die "there is no commit yet: use --worktree"
    git -c safe.directory='*' clone --quiet --no-hardlinks . "$root$home"
else
    commit="files not committed"
    mkdir -p "$root$home"
    git -c safe.directory='*' ls-files -z --cached --others --exclude-standard \
        | tar --null --ignore-failed-read -cf - -T - 2>/dev/null | tar -xf - -C "$root$home"
fi

mount --make-rprivate /
mount --bind "$root" "$root" # a container engine needs its own / to be a mount
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 dev "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs shm "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for number in 0 1 2; do
    ln -s "/proc/self/fd/$number" "$root/dev/$(echo stdin stdout stderr | cut -d' ' -f$((number + 1)))"
done

# Not by chroot: a container engine finds its way in a whole system only.
within() {
    unshare --mount bash -c 'cd "$1" && shift && mkdir -p .host && pivot_root . .host && umount -l /.host && exec "$@"' \
        within "$root" /usr/bin/env -i "${inside[@]}" "$@"
}

# --------------------------------------------------------------------------------------------------------- the runs

worst=0
declare -A codes seconds
for target in "${targets[@]}"; do
    say "make $target"
    began=$SECONDS
    code=0
    within make -C "$home" --no-print-directory "$target" 2>&1 | tee "$WORK/$target.log" || code=${PIPESTATUS[0]}
    codes[$target]=$code
    seconds[$target]=$((SECONDS - began))
    say "make $target: exit code $code, ${seconds[$target]} s"
    if [ "$code" != 0 ]; then worst=1; fi
done

# Whoever still runs in the new system, a moment after the last command: its mounts are others than ours.
running() {
    local process own
    own=$(readlink /proc/self/ns/mnt)
    for process in /proc/[0-9]*; do
        if [ "$(readlink "$process/ns/mnt" || echo "$own")" != "$own" ]; then cat "$process/comm"; fi
    done 2>/dev/null | sort | uniq -c | tr -s ' \n' ' '
}
sleep 2
survivors=$(running)
left=$(within ls -A /tmp | head -n 5 | tr '\n' ' ')
package() { within dpkg-query -W -f '${Version}' "$1" 2>/dev/null || echo "not installed"; }

report() {
    echo "# The README's two commands on a bare machine"
    echo
    echo "Written by \`make test-bare\`: a freshly debootstrapped Debian 12 (minbase) with Python and make only."
    echo
    echo "| | |"
    echo "|---|---|"
    echo "| date | $(date -u +%Y-%m-%dT%H:%MZ) |"
    echo "| commit | $commit |"
    echo "| Debian | $(within cat /etc/debian_version) |"
    echo "| Python | $(within python3 --version | cut -d' ' -f2) |"
    echo "| orthanc | $(package orthanc) |"
    echo "| orthanc-python | $(package orthanc-python) |"
    echo "| dcmtk | $(package dcmtk) |"
    echo "| nats-server | $(within "$home/.venv/bin/nats-server" --version 2>/dev/null | tr -d '\n' || true) |"
    for target in "${targets[@]}"; do
        echo "| \`make $target\` | exit code ${codes[$target]}, ${seconds[$target]} s |"
    done
    echo "| processes left | ${survivors:-none} |"
    echo "| files left in /tmp | ${left:-nothing} |"
    for target in "${targets[@]}"; do
        printf '\nThe last lines of `make %s`:\n\n```\n' "$target"
        # Without colours, and without addresses other than the loopback's: they may be a private registry's.
        tail -n 25 "$WORK/$target.log" | sed -E -e 's/\x1b\[[0-9;]*[A-Za-z]//g' \
            -e '/127\.0\.0\.1|localhost/! s#https?://[^ ]+#<address>#g'
        echo '```'
    done
}

if [ $# = 0 ]; then
    mkdir -p tests/bare
    report >tests/bare/RESULT.md
    say "the result is in tests/bare/RESULT.md"
else
    report | sed -n '5,/^$/p'
fi
exit "$worst"
