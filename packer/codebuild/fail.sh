# shellcheck shell=bash
# Sourced. build-ami looks for the text in the log of a build that failed, and puts the sentence into the stack event.

fail() {
  echo "hail-ami error: $*" >&2
  return 1
}
