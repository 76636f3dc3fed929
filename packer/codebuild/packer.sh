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
# What a step of the build said comes first: the line that ends the build may be about the cleaning up.
reason=$(sed -n 's/^==> [^:]*: \(Error .*\|Timeout .*\)/\1/p' "$log" | head -n 1)
[ -n "$reason" ] || reason=$(sed -n "s/^Build '[^']*' errored after [^:]*: //p; s/^Error: //p" "$log" | head -n 1)
case $reason in
  # EC2 has taken the launch and ended the instance: what it says of that does not reach Packer.
  *ResourceNotReady*) reason="${reason%.}; an instance that ends at once often cannot use the KMS key, or its subnet has no room" ;;
esac
reason=${reason:-what it said is above}
fail "packer $1 failed: ${reason%.}."
