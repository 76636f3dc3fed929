#!/usr/bin/env bash
# Hail and what is used beside it, in /opt/hail, an environment of its own: EMR replaces packages of the system's
# Python when it provisions a node (numpy is the known case).
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

prefix="${PREFIX:-/opt/hail}"
requirements="$SOURCES/requirements"
work=$(mktemp -d)

pip() { # environment arguments...
  "$1/bin/python" -m pip install --disable-pip-version-check --no-cache-dir --progress-bar off "${@:2}"
}

# As hail-is/hail's documentation of other Spark clusters has it: Java 11, a C++ compiler, lz4 and BLAS.
build_from_source() {
  local java=/usr/lib/jvm/java-11-amazon-corretto
  dnf install -y java-11-amazon-corretto-devel lz4-devel rsync ||
    fail "the packages that Hail is built with cannot be installed."
  checkout "$HAIL_REPOSITORY" "$HAIL_REVISION" "$work/source"

  # Hail's Makefile calls `python3 -m build` and uv.
  "python$PYTHON_VERSION" -m venv "$work/tools"
  pip "$work/tools" --requirement "$requirements/source-build.txt" || fail "the tools that Hail is built with cannot be installed from PyPI."

  # The locale: sources of Hail have names that are not ASCII.
  PATH="$work/tools/bin:$java/bin:$PATH" JAVA_HOME=$java LC_ALL=C.UTF-8 \
    logged "$work/make.log" make -C "$work/source/hail" wheel HAIL_RELEASE_MODE=1 HAIL_BUILD_MODE=Release \
    HAIL_COMPILE_NATIVES=1 SCALA_VERSION="$HAIL_SOURCE_SCALA" SPARK_VERSION="$HAIL_SOURCE_SPARK" ||
    fail "Hail at $HAIL_VERSION ($HAIL_REVISION) cannot be built from its source; make's words are above."
}

"python$PYTHON_VERSION" -m venv "$prefix"
if [[ $HAIL_VERSION =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]]; then
  what="Hail $HAIL_VERSION" hail="hail==$HAIL_VERSION"
else
  build_from_source
  what="Hail at $HAIL_VERSION ($HAIL_REVISION)"
  hail=$(find "$work/source/hail/build/deploy/dist" -name 'hail-*.whl' 2>/dev/null | head -n 1 || true)
  [ -n "$hail" ] || fail "$what was built, and there is no wheel in build/deploy/dist."
fi

pins="$requirements/hail-$HAIL_VERSION.txt"
if [ ! -f "$pins" ]; then
  # No file, no pins; but the Spark has to be the cluster's.
  echo "hail-ami WARNING: the packages beside $what are not pinned; /opt/hail/requirements.txt will tell which ones they are."
  pins="$work/requirements.txt"
  {
    cat "$requirements/hail.in"
    echo "$hail"
    echo "pyspark==${SPARK_VERSION%.*}.*"
  } >"$pins"
fi
# pyspark is built from source, in an environment whose build tools follow the same pins.
grep -E '^setuptools[<=]' "$pins" >"$work/constraints.txt"
PIP_CONSTRAINT="$work/constraints.txt" pip "$prefix" --requirement "$pins" ||
  fail "$what cannot be installed on Python $PYTHON_VERSION with Spark ${SPARK_VERSION%.*}; pip's words are above."

# Where spark.jars and the class paths of the clusters point, whatever the version of Python.
jar=$("$prefix/bin/python" -c 'import importlib.util as u, pathlib as p; print(p.Path(u.find_spec("hail").origin).parent / "backend" / "hail-all-spark.jar")')
[ -f "$jar" ] || fail "the wheel of $what has no $jar."
ln -sfn "$jar" "$prefix/hail-all-spark.jar"
"$prefix/bin/python" -m pip freeze --disable-pip-version-check --all >"$prefix/requirements.txt"
