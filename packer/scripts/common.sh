# shellcheck shell=bash
# Sourced by the other scripts: the pinned versions, and the two things that all of them do.
set -euo pipefail

# shellcheck source=packer/versions.env
. "${SOURCES:=/tmp}/versions.env"

fail() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# fetch URL SHA256 FILE: a download that is not what it was when it was pinned ends the build.
fetch() {
  curl --fail --silent --show-error --location --retry 5 --output "$3" "$1" || fail "$1 cannot be downloaded."
  echo "$2  $3" | sha256sum --check --quiet || fail "$1 is not the file that versions.env names; compare its checksum with the publisher's."
}
