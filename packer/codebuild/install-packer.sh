#!/usr/bin/env bash
# Puts the pinned Packer on the PATH of the build.
set -euo pipefail
# shellcheck source=packer/versions.env
. ./versions.env
# shellcheck source=packer/codebuild/fail.sh
. codebuild/fail.sh

case $(uname -m) in
  x86_64) arch=amd64 sha256=$PACKER_SHA256_AMD64 ;;
  aarch64) arch=arm64 sha256=$PACKER_SHA256_ARM64 ;;
  *) fail "Packer $PACKER_VERSION is pinned for x86_64 and aarch64, and this build runs on $(uname -m)." ;;
esac
zip="packer_${PACKER_VERSION}_linux_$arch.zip"
url="https://releases.hashicorp.com/packer/$PACKER_VERSION/$zip"

work=$(mktemp -d)
trap 'ended "$BASH_COMMAND"' EXIT
curl --fail --silent --show-error --location --retry 5 --output "$work/$zip" "$url" ||
  fail "$url cannot be downloaded; the build needs a way out to the internet."
(cd "$work" && echo "$sha256  $zip" | sha256sum --check --quiet) ||
  fail "$url is not the file that versions.env names; compare its checksum with the publisher's."
unzip -q -o "$work/$zip" packer -d "${BIN:-/usr/local/bin}"
