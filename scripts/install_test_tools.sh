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

log=$(mktemp)
install() {
    "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "${missing[@]}" "${extra[@]}"
}
if ! install >"$log" 2>&1; then
    tail -20 "$log" >&2
    give_up "apt-get could not install them"
fi
rm -f "$log"
