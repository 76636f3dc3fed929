#!/usr/bin/env bash
# Ensembl VEP with its plugins and LOFTEE, and all that they read for GRCh37 and GRCh38, in /opt/vep, where the
# configurations that hail-s3 seeds expect it.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

if [ "$VEP_VERSION" = none ]; then
  echo "VEP was not asked for."
  exit 0
fi

prefix="${VEP_PREFIX:-/opt/vep}"
work=$(mktemp -d)

dnf install -y libpng-devel perl perl-Archive-Zip perl-DBD-SQLite perl-DBI perl-JSON perl-List-MoreUtils \
  perl-Module-Build perl-libwww-perl unzip ||
  fail "the Perl packages of Amazon Linux cannot be installed."

# A release that the table does not know is only built at one's own risk, from the branch of that release.
tag=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["vep"].get(sys.argv[2], sys.argv[2]))' "$SOURCES/compatibility.json" "$VEP_VERSION")
mkdir -p "$prefix/cache" "$prefix/fasta"
checkout "${VEP_REPOSITORY:-https://github.com/Ensembl/ensembl-vep.git}" "release/$tag" "$prefix/ensembl-vep"
checkout "${VEP_PLUGINS_REPOSITORY:-https://github.com/Ensembl/VEP_plugins.git}" "release/$VEP_VERSION" "$prefix/Plugins"
for build in GRCh37 GRCh38; do
  commit="LOFTEE_COMMIT_$build"
  checkout "$LOFTEE_REPOSITORY" "${!commit}" "$prefix/loftee/$build"
done

# The installer of a release names the versions of htslib and Bio::DB::HTS that it builds; the Ensembl API it takes
# from the branch of the release.
(cd "$prefix/ensembl-vep" && perl INSTALL.pl --AUTO a --NO_UPDATE --NO_TEST --QUIET) || fail "the installer of VEP $tag failed."

# What LOFTEE reads bigWig files with, built as Ensembl's documentation of VEP has it; kent is only linked into it.
bigwig() {
  export KENT_SRC="$work/kent-${KENT_TAG#v}/src" MACHTYPE CFLAGS=-fPIC MYSQLINC=/usr/include MYSQLLIBS=
  MACHTYPE=$(uname -m)
  curl --fail --silent --show-error --location --retry 5 "https://github.com/ucscGenomeBrowser/kent/archive/$KENT_TAG.tar.gz" | tar -xz -C "$work" &&
    echo 'CFLAGS="-fPIC"' >"$KENT_SRC/inc/localEnvironment.mk" &&
    make -C "$KENT_SRC/lib" &&
    make -C "$KENT_SRC/jkOwnLib" &&
    tar -xz -C "$work" -f "$work/bigfile.tar.gz" &&
    cd "$work/Bio-BigFile-$BIO_BIGFILE_VERSION" &&
    export PERL5LIB="$prefix/ensembl-vep" &&
    perl Build.PL --install_base "$prefix/perl5" &&
    ./Build &&
    ./Build install
}
if [ ! -d "$prefix/perl5" ]; then
  fetch "https://cpan.metacpan.org/authors/id/L/LD/LDS/Bio-BigFile-$BIO_BIGFILE_VERSION.tar.gz" "$BIO_BIGFILE_SHA256" "$work/bigfile.tar.gz"
  logged "$work/bigwig.log" bigwig || {
    rm -rf "$prefix/perl5"
    fail "what LOFTEE reads conservation scores with, Bio::DB::BigWig, cannot be built."
  }
fi

# One object of S3, on standard output.
object() { # source unsigned
  # shellcheck disable=SC2086
  aws s3 cp $2 --only-show-errors "$1" -
}

while read -r kind build source unsigned; do
  echo "hail-ami: $source"
  case $kind in
    cache)
      object "$source" "$unsigned" | tar -xz --no-same-owner -C "$prefix/cache" || fail "the cache $source cannot be unpacked."
      ;;
    fasta)
      # Packed anew, since only a file that bgzip made can be read at any place; Ensembl has both sorts.
      fasta="$prefix/fasta/$(basename "$source")"
      object "$source" "$unsigned" | gzip -dc | bgzip --threads "$(nproc)" >"$fasta" || fail "the sequence $source cannot be unpacked."
      samtools faidx "$fasta" || fail "the sequence $source cannot be indexed."
      ;;
    loftee)
      data="$prefix/loftee-data/$build"
      rm -rf "$data"
      mkdir -p "$data"
      object "$source" "$unsigned" | tar -x --no-same-owner -C "$data" || fail "LOFTEE's data $source cannot be unpacked."
      # The archive of one build has a folder at its top, and that of the other has none.
      find "$data" -mindepth 2 -type f -exec mv -t "$data" {} +
      samtools faidx "$data/human_ancestor.fa.gz" || fail "LOFTEE's data $source has no human_ancestor.fa.gz that can be indexed."
      ;;
  esac
done <"$SOURCES/vep-data"

# It is run by others than root.
chmod -R a+rX "$prefix"
