# shellcheck shell=bash
# Sourced by the other scripts: the pinned versions, and what several of them do.
set -euo pipefail

# shellcheck source=packer/versions.env
. "${SOURCES:=/tmp}/versions.env"

# /tmp is memory on Amazon Linux 2023, and what is built here is larger.
export TMPDIR="${TMPDIR:-/var/tmp}"

# samtools and bgzip are there, and sudo leaves it out.
export PATH="/usr/local/bin:$PATH"

# A folder that a script makes for what it only needs itself.
work=
said=

# build-ami looks for the text in the log of a build that failed, and puts the sentence into the stack event.
fail() {
  said=yes
  echo "${0##*/}: hail-ami error: $*" >&2
  exit 1
}

# Every end that is not the script's own is told in such a sentence too, and once.
ended() {
  local status=$?
  [ -z "$work" ] || rm -rf "$work"
  [ $status = 0 ] || [ -n "$said" ] || echo "${0##*/}: hail-ami error: the build ended at '$1', with status $status; what it said is above." >&2
}
trap 'ended "$BASH_COMMAND"' EXIT

# fetch URL SHA256 FILE: a download that is not what it was when it was pinned ends the build.
fetch() {
  curl --fail --silent --show-error --location --retry 5 --output "$3" "$1" || fail "$1 cannot be downloaded."
  echo "$2  $3" | sha256sum --check --quiet || fail "$1 is not the file that versions.env names; compare its checksum with the publisher's."
}

# checkout REPOSITORY COMMIT FOLDER: that commit (or tag) and nothing else; git checks that a commit is what its name says.
checkout() {
  rm -rf "$3"
  git init --quiet "$3"
  git -C "$3" fetch --quiet --depth 1 "$1" "$2" || fail "$2 of $1 cannot be fetched."
  git -C "$3" checkout --quiet FETCH_HEAD
}

# logged LOG COMMAND...: shows the end of its log where it fails. bash does not stop at errors in a command that stands
# before ||, so a function that is run so has && between its own.
logged() {
  ("${@:2}") >"$1" 2>&1 || {
    tail -n 50 "$1"
    return 1
  }
}
