#!/usr/bin/env bash
# Puts the pinned Packer on the PATH of the build.
set -euo pipefail
# shellcheck source=packer/versions.env
. ./versions.env

case $(uname -m) in
  x86_64) arch=amd64 sha256=$PACKER_SHA256_AMD64 ;;
  aarch64) arch=arm64 sha256=$PACKER_SHA256_ARM64 ;;
  *) echo "Packer $PACKER_VERSION is pinned for x86_64 and aarch64, and this build runs on $(uname -m)." >&2 && exit 1 ;;
esac
zip="packer_${PACKER_VERSION}_linux_$arch.zip"
url="https://releases.hashicorp.com/packer/$PACKER_VERSION/$zip"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! curl --fail --silent --show-error --location --retry 5 --output "$work/$zip" "$url"; then
  echo "$url cannot be downloaded; the build needs a way out to the internet." >&2
  exit 1
fi
if ! (cd "$work" && echo "$sha256  $zip" | sha256sum --check --quiet); then
  echo "$url is not the file that versions.env names; compare its checksum with the publisher's." >&2
  exit 1
fi
unzip -q -o "$work/$zip" packer -d "${BIN:-/usr/local/bin}"
