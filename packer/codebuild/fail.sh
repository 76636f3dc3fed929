# shellcheck shell=bash
# Sourced. build-ami looks for the text in the log of a build that failed, and puts the sentence into the stack event.

said=

fail() {
  said=yes
  echo "hail-ami error: $*" >&2
  return 1
}

# For the EXIT of a script: every end that is not the script's own is told in such a sentence too, and once.
ended() {
  local status=$?
  rm -rf "${work:-}"
  [ $status = 0 ] || [ -n "$said" ] || echo "hail-ami error: the build ended at '$1', with status $status; what it said is above." >&2
}
