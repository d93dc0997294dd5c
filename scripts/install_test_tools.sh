#!/usr/bin/env bash
# Installs the programs that some tests drive: Prometheus with promtool, Chromium, and the C compiler of the CPU's kernels.
# Needs Debian or Ubuntu, and root or sudo without a password. Elsewhere it says so and exits with 0, and those tests are
# skipped; with CI_REQUIRE_TOOLS=1 it fails, as those tests then do.
set -euo pipefail

declare -A package_of=(
    [prometheus]=prometheus
    [promtool]=prometheus
    [chromium]=chromium
    [gcc]=gcc
)
# For text in screenshots that looks the same everywhere, and C's headers.
extra=(fonts-dejavu-core libc6-dev)

give_up() {
    echo "install_test_tools: $1; tests that need: ${missing[*]} are skipped" >&2
    exit "${CI_REQUIRE_TOOLS:-0}"
}

missing=()
for program in "${!package_of[@]}"; do
    package=${package_of[$program]}
    # Of Chromium the others will do (tests/browser.py).
    [ "$program" = chromium ] && { command -v chromium-browser || command -v google-chrome; } >/dev/null && continue
    command -v "$program" >/dev/null || [[ " ${missing[*]} " == *" $package "* ]] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

command -v apt-get >/dev/null || give_up "no apt-get here"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || give_up "not root, and no sudo without a password"
    as_root=(sudo -n)
fi

# The package of Prometheus starts a daemon; a policy that forbids it is Debian's way to install without.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod +x "$policy"
fi

# A machine that has just started may be without a network for a moment, or have another apt at work.
apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 "$@"
}
install() {
    apt update && apt install -y --no-install-recommends "${missing[@]}" "${extra[@]}"
}
log=$(mktemp)
for pause_s in 10 30 0; do
    install >"$log" 2>&1 && break
    if [ "$pause_s" -eq 0 ]; then
        tail -20 "$log" >&2
        give_up "apt-get could not install them"
    fi
    sleep "$pause_s"
done
rm -f "$log"
