#!/usr/bin/env bash
# First of all scripts: a cache that is missing ends the build in its first minute. What was found is written
# down for vep.sh, which needs it half an hour later.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

[ "$VEP_VERSION" = none ] && exit 0
[ -n "$HAIL_BUCKET$OPEN_DATA_BUCKET" ] || fail "VEP $VEP_VERSION needs a cache, and neither HAIL_BUCKET nor OPEN_DATA_BUCKET is set."

: >"$SOURCES/vep-caches"
for build in GRCh37 GRCh38; do
  key="vep/cache/homo_sapiens_vep_${VEP_VERSION}_$build.tar.gz"
  found=
  for bucket in $HAIL_BUCKET $OPEN_DATA_BUCKET; do
    # Open data is read without credentials first, since a role rarely names somebody else's bucket.
    for unsigned in --no-sign-request ""; do
      # shellcheck disable=SC2086
      if aws s3api head-object $unsigned --bucket "$bucket" --key "$key" >/dev/null 2>&1; then
        found="s3://$bucket/$key $unsigned"
        break 2
      fi
    done
  done
  [ -n "$found" ] || fail "VEP $VEP_VERSION has no cache for $build: $key is in none of the buckets ($HAIL_BUCKET $OPEN_DATA_BUCKET). Put Ensembl's file of that name there, or build with another VEP_VERSION."
  echo "$build $found" >>"$SOURCES/vep-caches"
done
