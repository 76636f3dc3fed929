#!/usr/bin/env bash
# Packer with these arguments. Where it fails for a reason of its own, and not of a script, the reason becomes the
# sentence that build-ami looks for.
set -euo pipefail
# shellcheck source=packer/codebuild/fail.sh
. codebuild/fail.sh

log=$(mktemp)
trap 'rm -f "$log"' EXIT
packer "$@" 2>&1 | tee "$log" && exit
grep -q 'hail-ami error: ' "$log" && exit 1
reason=$(sed -n "s/^Build '[^']*' errored after [^:]*: //p; s/^Error: //p" "$log" | head -n 1)
reason=${reason:-what it said is above}
fail "packer $1 failed: ${reason%.}."
