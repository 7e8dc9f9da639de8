#!/usr/bin/env bash
# Chromium, which the tests of the page drive, where there is none and this user may install it. Never fails: without one
# those tests are skipped.
set -uo pipefail

say() { printf 'browser: %s\n' "$*"; }

for name in chromium chromium-headless-shell chromium-browser google-chrome google-chrome-stable; do
  if path=$(command -v "$name"); then
    say "$path"
    exit 0
  fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  say "none here; the tests of the page in a browser are skipped (as root, on Debian: apt-get install chromium)"
  exit 0
fi
log=$(mktemp)
install() {
  timeout 120 apt-get -q update &&
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qy install --no-install-recommends chromium
}
if install > "$log" 2>&1 && command -v chromium > /dev/null; then
  say "installed $(command -v chromium)"
else
  say "chromium cannot be installed, the tests of the page in a browser are skipped: $(tail -n 1 "$log")"
fi
rm -f "$log"
