#!/usr/bin/env bash
# The test of the finished image: no AMI is made of one that fails it.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

hail="${HAIL_PREFIX:-/opt/hail}"
local="${LOCAL_PREFIX:-/usr/local}"

expect() { # what-it-is wanted found
  [ "$2" = "$3" ] || fail "$1 is '$3' and should be '$2'."
  echo "$1: $3"
}

expect "Python of $hail" "$PYTHON_VERSION" "$("$hail/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
expect "Hail" "$HAIL_VERSION" "$("$hail/bin/python" -c 'from importlib.metadata import version; print(version("hail"))')"
expect "htslib" "$HTSLIB_VERSION" "$("$local/bin/bgzip" --version | awk 'NR == 1 { print $NF }')"
expect "samtools" "$SAMTOOLS_VERSION" "$("$local/bin/samtools" --version | awk 'NR == 1 { print $NF }')"
expect "web server at boot" disabled "$(systemctl is-enabled httpd || true)"
[ -x /usr/sbin/httpd ] || fail "the web server for the plots is missing."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$hail/bin/python" - "$hail/hail-all-spark.jar" <<'PYTHON' || fail "Hail does not compute."
import sys

import hail as hl
from bokeh.plotting import output_file, save

assert open(sys.argv[1], "rb").read(2) == b"PK", "the jar of Hail is not where the clusters look for it"
hl.init(master="local[2]", quiet=True)
variants = hl.variant_qc(hl.balding_nichols_model(n_populations=2, n_samples=10, n_variants=50))
histogram = variants.aggregate_rows(hl.agg.hist(variants.variant_qc.AF[1], 0, 1, 10))
assert sum(histogram.bin_freq) == 50, histogram
output_file("plot.html")
save(hl.plot.histogram(histogram))
PYTHON
[ -s "$work/plot.html" ] || fail "Hail saved no plot."

if [ "$VEP_VERSION" != none ]; then
  found=$(/opt/vep/ensembl-vep/vep --help | awk '$1 == "ensembl-vep" { print $3 }')
  PERL5LIB=/opt/vep/ensembl-vep perl -MBio::DB::HTS -MJSON -e 1 || fail "VEP cannot read its cache or write JSON."
  expect "VEP" "$VEP_VERSION" "${found%%.*}"
  for build in GRCh37 GRCh38; do
    [ -f "/opt/vep/cache/homo_sapiens/${VEP_VERSION}_$build/info.txt" ] || fail "the VEP cache of $build is missing."
  done
fi
