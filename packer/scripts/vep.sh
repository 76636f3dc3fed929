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

dnf install -y \
  expat-devel perl perl-App-cpanminus perl-Archive-Zip perl-DBI perl-JSON perl-Module-Build perl-Try-Tiny perl-libwww-perl unzip ||
  fail "the Perl packages of Amazon Linux cannot be installed."
HTSLIB_DIR=/usr/local cpanm --notest \
  "PerlIO::gzip@$PERLIO_GZIP_VERSION" "Set::IntervalTree@$SET_INTERVALTREE_VERSION" "Bio::DB::HTS@$BIO_DB_HTS_VERSION" ||
  fail "the Perl modules of VEP cannot be installed from CPAN."

mkdir -p /opt/vep/cache
rm -rf /opt/vep/ensembl-vep
git clone --quiet --depth 1 --branch "release/$tag" https://github.com/Ensembl/ensembl-vep.git /opt/vep/ensembl-vep ||
  fail "VEP $tag cannot be fetched."
cd /opt/vep/ensembl-vep
# The API comes from the branch of the same Ensembl release; the installer has no finer choice.
perl INSTALL.pl --AUTO a --NO_HTSLIB --NO_UPDATE --NO_TEST --QUIET

while read -r build source unsigned; do
  # shellcheck disable=SC2086
  aws s3 cp $unsigned --only-show-errors "$source" - | tar -xz -C /opt/vep/cache ||
    fail "the cache $source cannot be unpacked."
  # HGVS names need the sequence; VEP finds it beside the cache.
  perl INSTALL.pl --AUTO f --SPECIES homo_sapiens --ASSEMBLY "$build" --CACHEDIR /opt/vep/cache --NO_HTSLIB --NO_UPDATE --QUIET
done <"$SOURCES/vep-caches"
