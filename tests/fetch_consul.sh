#!/usr/bin/env bash
# A Consul server for the tests, unpacked into a folder: fetch_consul.sh FOLDER. The system stays as it is.
# Debian's suite bullseye carries it; the mirror is the one that this machine uses. Best effort: the
# tests that need it skip, and say so, where it cannot be had.
set -euo pipefail
target=$1
[ -x "$target/usr/bin/consul" ] && exit 0
command -v consul >/dev/null && exit 0
command -v apt-get >/dev/null && command -v dpkg >/dev/null || { echo "no apt here: tests that need Consul will skip"; exit 0; }
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    grep -E '^(deb |URIs:)' | grep -oE 'https?://[^ ]+' | grep -v security | head -n 1 || true)
[ -n "$mirror" ] && [ -r "$keyring" ] || { echo "no Debian mirror here: tests that need Consul will skip"; exit 0; }
work=$(mktemp -d "${TMPDIR:-/tmp}/consul-XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
cd "$work"
mkdir -p lists/partial cache/archives/partial
echo "deb [signed-by=$keyring] $mirror bullseye main" > bullseye.list
options=(-qq -o "Dir::Etc::sourcelist=$work/bullseye.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root
    -o Acquire::http::Timeout=20 -o Acquire::Retries=1)
echo "fetching Consul for the tests ..."
if timeout 120 apt-get "${options[@]}" update && timeout 120 apt-get "${options[@]}" download consul; then
    mkdir -p "$target"
    dpkg -x consul_*.deb "$target"
else
    echo "Consul could not be fetched: tests that need it will skip"
fi
