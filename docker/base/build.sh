#!/usr/bin/env bash
# The base of the servers' images for tests: Debian 13 (or the release $3), as small as it goes, made by debootstrap (root
# only) and told to the container engine under the name in $1. The folder $2 is for its files, 300 MB.
#
# DEBIAN_MIRROR     default: the one that this machine's apt uses, else http://deb.debian.org/debian
set -euo pipefail

name=$1
root=$2
suite=${3:-trixie}

# Debian's own archive among this machine's sources, by apt's own account of them.
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' 2>/dev/null \
    | awk '$2 ~ /^(bookworm|trixie|forky|sid|stable|testing|unstable)$/ && $1 ~ /\/debian\/?$/ { print $1; exit }' \
    || true)}
mirror=${mirror:-http://deb.debian.org/debian}

debootstrap --variant=minbase "$suite" "$root" "$mirror"

# What this machine needs to reach the archive, a build needs too; but its proxy, which can have a password, is told to
# each build (scripts/images.sh) and stays in none.
apt-config dump | grep -E '^Acquire::(https?|Check|Retries|ForceIPv)' | grep -vi proxy \
    >"$root/etc/apt/apt.conf.d/90host" || true
if [[ $mirror == https:* ]]; then
    install -D -m 644 -t "$root/etc/ssl/certs" /etc/ssl/certs/ca-certificates.crt
fi

# No service starts while it is installed; no fsync for what can be built again; nothing is kept that no server reads
# (the folders for manual pages are: Java's installation fails without them), nor the packages themselves.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/fast"
printf '%s\n' 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };' 'Dir::Cache::pkgcache "";' \
    'Dir::Cache::srcpkgcache "";' >"$root/etc/apt/apt.conf.d/small"
printf 'path-exclude=/usr/share/%s\n' 'doc/*' 'info/*' 'locale/*' 'man/*/*' >"$root/etc/dpkg/dpkg.cfg.d/small"
find "$root"/usr/share/{doc,info,locale,man} "$root"/var/{lib/apt/lists,cache/apt,log} -type f -delete

tar -C "$root" --numeric-owner -c . | docker import --change 'ENV DEBIAN_FRONTEND=noninteractive' - "$name"
rm -rf --one-file-system "$root"
