#!/bin/bash
# Has Apple's codesign verify everything native in a wheel for macOS, and the entitlement: verify-signatures.sh WHEEL
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
unzip -q "$1" -d "$directory"
program=$directory/vmette/_payload/macos/vmette-vz
for file in "$directory"/vmette/*.so "$program"; do
    codesign --verify --strict --verbose=4 "$file"
    codesign --display --verbose=4 "$file"
done
codesign --display --entitlements - --xml "$program" | plutil -extract 'com\.apple\.security\.virtualization' raw - |
    grep -Fx true
