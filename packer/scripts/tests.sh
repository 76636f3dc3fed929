#!/usr/bin/env bash
# The test of the finished image: no AMI is made of one that fails it.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

hail="${HAIL_PREFIX:-/opt/hail}"
local="${LOCAL_PREFIX:-/usr/local}"
vep="${VEP_PREFIX:-/opt/vep}"

expect() { # what-it-is wanted found
  [ "$2" = "$3" ] || fail "$1 is '$3' and should be '$2'."
  echo "$1: $3"
}

python() { # program arguments...
  "$hail/bin/python" -c "$@"
}

expect "Python of $hail" "$PYTHON_VERSION" "$(python 'import sys; print("%d.%d" % sys.version_info[:2])')"
if [ -z "$HAIL_REVISION" ]; then
  expect "Hail" "$HAIL_VERSION" "$(python 'from importlib.metadata import version; print(version("hail"))')"
else
  expect "Hail's commit" "${HAIL_REVISION:0:12}" "$(python 'import hail; print(hail.__version__.split("-")[1])')"
fi
# The clusters run EMR's own Spark; the patch of it does not matter to Hail's jar.
expect "Spark" "${SPARK_VERSION%.*}" "$(python 'import pyspark; print(".".join(pyspark.__version__.split(".")[:2]))')"
expect "htslib" "$HTSLIB_VERSION" "$("$local/bin/bgzip" --version | awk 'NR == 1 { print $NF }')"
expect "samtools" "$SAMTOOLS_VERSION" "$("$local/bin/samtools" --version | awk 'NR == 1 { print $NF }')"
expect "web server at boot" disabled "$(systemctl is-enabled httpd || true)"
[ -x "${HTTPD:-/usr/sbin/httpd}" ] || fail "the web server for the plots is missing."
[ -s "$hail/requirements.txt" ] || fail "the list of the Python packages, $hail/requirements.txt, is missing."

work=$(mktemp -d)
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

if [ "$R_KERNEL" = true ]; then
  R_LIBS="${R_LIBRARY:-/opt/R/library}" Rscript -e 'cat("IRkernel:", format(packageVersion("IRkernel")), "\n")' || fail "the R kernel does not load."
  python 'import json, sys; assert json.load(open(sys.argv[1]))["argv"][0] == "R"' "${JUPYTER_KERNELS:-/usr/local/share/jupyter/kernels}/ir/kernel.json" ||
    fail "no Jupyter would find the R kernel."
fi

if [ "$VEP_VERSION" != none ]; then
  found=$("$vep/ensembl-vep/vep" --help | awk '$1 == "ensembl-vep" { print $3 }')
  expect "VEP" "$VEP_VERSION" "${found%%.*}"
  PERL5LIB="$vep/ensembl-vep" perl -MBio::DB::HTS -MJSON -e 1 || fail "VEP cannot read its cache or write JSON."
  for build in GRCh37 GRCh38; do
    fasta="$vep/fasta/Homo_sapiens.$build.dna.primary_assembly.fa.gz"
    loftee="$vep/loftee-data/$build"
    case $build in
      GRCh37) files=(human_ancestor.fa.gz human_ancestor.fa.gz.fai human_ancestor.fa.gz.gzi phylocsf_gerp.sql GERP_scores.final.sorted.txt.gz GERP_scores.final.sorted.txt.gz.tbi) ;;
      GRCh38) files=(human_ancestor.fa.gz human_ancestor.fa.gz.fai human_ancestor.fa.gz.gzi loftee.sql gerp_conservation_scores.homo_sapiens.GRCh38.bw) ;;
    esac
    for file in "$vep/cache/homo_sapiens/${VEP_VERSION}_$build/info.txt" "$fasta.fai" "$fasta.gzi" "${files[@]/#/$loftee/}"; do
      [ -f "$file" ] || fail "what VEP reads for $build is not whole: $file is missing."
    done
    PERL5LIB="$vep/ensembl-vep:$vep/loftee/$build:$vep/perl5/lib/perl5" perl -MDBD::SQLite -MLoF -e 1 || fail "LOFTEE for $build does not load."
    echo "LOFTEE for $build: $(git -C "$vep/loftee/$build" rev-parse HEAD)"
  done
fi
