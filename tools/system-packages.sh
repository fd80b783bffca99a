#!/bin/sh
# Installs those of the named Debian packages that are missing, as root or with sudo. With nothing missing it is instant
# and asks nothing of the network.
set -eu

missing() {
    for package; do
        dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || echo "$package"
    done
}

has_virtiofsd() {
    for path in /usr/lib/qemu/virtiofsd /usr/libexec/virtiofsd; do [ -x "$path" ] && return; done
    return 1
}

install() {
    if [ "$(id -u)" -eq 0 ]; then root=; else root=sudo; fi
    echo "installing $*" >&2
    $root apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if ! command -v apt-get >/dev/null; then
    echo "this is no Debian; what is needed here are its packages $*, by whatever names: see README.md" >&2
    exit 0
fi
wanted=$(missing "$@")
# In Debian 12 virtiofsd comes with QEMU; later it is a package of its own.
[ -n "$wanted" ] || has_virtiofsd || wanted=virtiofsd
[ -n "$wanted" ] || exit 0
if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then
    echo "please run as root: apt-get install" $wanted >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then apt-get update -qq; else sudo apt-get update -qq; fi
if [ "$wanted" != virtiofsd ]; then install $wanted; fi
if ! has_virtiofsd; then install virtiofsd; fi
