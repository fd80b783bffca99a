#!/bin/bash
# Runs a command in a microVM on a Mac, with the vmette in a directory: boot.sh VENV/bin
# Where Apple's framework makes no machines (GitHub's runners), it says so where it is seen, and is content.
set -euo pipefail
bin=$(cd "$1" && pwd)
cd / # the checkout's own package is not the one to be tried
program=$("$bin/python" -c 'from vmette import assets; print(assets.vz_program())')
capabilities=$("$program" --capabilities)
echo "$capabilities"
if ! grep -Fxq entitled=1 <<<"$capabilities"; then
    echo "::error::macOS does not honour the entitlement of $program"
    exit 1
fi
if grep -Fxq supported=1 <<<"$capabilities" && [ "$(sysctl -n kern.hv_support 2>/dev/null || echo 0)" = 1 ]; then
    "$bin/vmette" doctor
    "$bin/vmette" run builtin://base -- uname -a | tee /dev/stderr | grep -q '^Linux .* aarch64'
else
    "$bin/vmette" doctor || true # it finds that there are no machines to be had
    echo "::warning title=Nothing was booted::This runner is a virtual machine that cannot make others." \
        "Name a Mac in the repository's variable MACOS_RUNNER to have it tried."
fi
