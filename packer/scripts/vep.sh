#!/usr/bin/env bash
# Ensembl VEP with the caches of GRCh37 and GRCh38, in /opt/vep, where the configurations that hail-s3 seeds
# expect it.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

if [ "$VEP_VERSION" = none ]; then
  echo "VEP was not asked for."
  exit 0
fi

tag=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["vep_tags"].get(sys.argv[2], ""))' "$SOURCES/compatibility.json" "$VEP_VERSION")
[ -n "$tag" ] || fail "VEP $VEP_VERSION is not in compatibility.json."

dnf install -y perl perl-Archive-Zip perl-DBI perl-JSON perl-Module-Build perl-libwww-perl unzip ||
  fail "the Perl packages of Amazon Linux cannot be installed."

mkdir -p /opt/vep/cache
rm -rf /opt/vep/ensembl-vep
git clone --quiet --depth 1 --branch "release/$tag" https://github.com/Ensembl/ensembl-vep.git /opt/vep/ensembl-vep ||
  fail "VEP $tag cannot be fetched."
cd /opt/vep/ensembl-vep
# The installer of a release names the versions of htslib and Bio::DB::HTS that it builds; the Ensembl API it takes
# from the branch of the release.
perl INSTALL.pl --AUTO a --NO_UPDATE --NO_TEST --QUIET || fail "the installer of VEP $tag failed."

while read -r build source unsigned; do
  # shellcheck disable=SC2086
  aws s3 cp $unsigned --only-show-errors "$source" - | tar -xz -C /opt/vep/cache ||
    fail "the cache $source cannot be unpacked."
  # HGVS names need the sequence; VEP finds it beside the cache.
  perl INSTALL.pl --AUTO f --SPECIES homo_sapiens --ASSEMBLY "$build" --CACHEDIR /opt/vep/cache --NO_HTSLIB --NO_UPDATE --QUIET ||
    fail "the sequence of $build cannot be installed."
done <"$SOURCES/vep-caches"
