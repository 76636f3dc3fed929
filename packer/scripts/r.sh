#!/usr/bin/env bash
# The R kernel, for a Jupyter on a node: R from Amazon Linux, IRkernel from one day's CRAN, in a library of its own.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

if [ "$R_KERNEL" != true ]; then
  echo "The R kernel was not asked for."
  exit 0
fi

library="${R_LIBRARY:-/opt/R/library}"
kernel="${JUPYTER_KERNELS:-/usr/local/share/jupyter/kernels}/ir"
dnf install -y R-core R-core-devel || fail "the R of Amazon Linux cannot be installed."

mkdir -p "$library" "$kernel"
# install.packages only warns of what it cannot do; that the package loads is what counts.
R_LIBS="$library" Rscript -e "install.packages('IRkernel', lib = '$library', repos = 'https://packagemanager.posit.co/cran/$CRAN_SNAPSHOT', Ncpus = $(nproc))" \
  -e "stopifnot(requireNamespace('IRkernel', lib.loc = '$library'))" ||
  fail "IRkernel cannot be installed from the CRAN of $CRAN_SNAPSHOT."

cat >"$kernel/kernel.json" <<JSON
{
  "argv": ["R", "--no-echo", "-e", "IRkernel::main()", "--args", "{connection_file}"],
  "display_name": "R",
  "language": "R",
  "env": {"R_LIBS": "$library"}
}
JSON
