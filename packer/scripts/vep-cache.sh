#!/usr/bin/env bash
# First of all scripts: what VEP reads and is missing ends the build in its first minute. What was found is written
# down for vep.sh, which needs it half an hour later.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

[ "$VEP_VERSION" = none ] && exit 0
[ -n "$HAIL_BUCKET$OPEN_DATA_BUCKET" ] || fail "VEP $VEP_VERSION needs a cache, and neither HAIL_BUCKET nor OPEN_DATA_BUCKET is set."

missing=()
bytes=0
: >"$SOURCES/vep-data"

find_object() { # kind build key
  local bucket unsigned size
  for bucket in $HAIL_BUCKET $OPEN_DATA_BUCKET; do
    # Open data is read without credentials first, since a role rarely names somebody else's bucket.
    for unsigned in --no-sign-request ""; do
      # shellcheck disable=SC2086
      if size=$(aws s3api head-object $unsigned --bucket "$bucket" --key "$3" --query ContentLength --output text 2>/dev/null); then
        bytes=$((bytes + size))
        echo "$1 $2 s3://$bucket/$3 $unsigned" >>"$SOURCES/vep-data"
        return
      fi
    done
  done
  missing+=("$3")
}

for build in GRCh37 GRCh38; do
  find_object cache "$build" "vep/cache/homo_sapiens_vep_${VEP_VERSION}_$build.tar.gz"
  find_object fasta "$build" "vep/fasta/Homo_sapiens.$build.dna.primary_assembly.fa.gz"
  find_object loftee "$build" "vep/loftee/$build.tar"
done
[ ${#missing[@]} = 0 ] ||
  fail "VEP $VEP_VERSION reads what is in none of the buckets ($HAIL_BUCKET $OPEN_DATA_BUCKET): ${missing[*]}. Bring it there as 'VEP data' of packer/readme.md tells, or build with another VEP_VERSION."

# What is unpacked is hardly larger than the archives, which hold compressed files, but for 2 GiB of LOFTEE's databases.
needed=$((bytes / 1024 ** 3 + 10))
free=$(df --output=avail -B 1G "${VEP_PREFIX:-/opt}" | tail -n 1)
[ "$free" -ge "$needed" ] ||
  fail "VEP $VEP_VERSION needs about $needed GiB and the root volume has$free GiB left; build with a larger ROOT_VOLUME_SIZE, of which EMR takes 100 at the most."
