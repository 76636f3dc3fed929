#!/usr/bin/env bash
# Hail and what is used beside it, in /opt/hail, an environment of its own: EMR replaces packages of the system's
# Python when it provisions a node (numpy is the known case).
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

prefix="${PREFIX:-/opt/hail}"
requirements="$SOURCES/requirements/hail-$HAIL_VERSION.txt"
[ -f "$requirements" ] || fail "Hail $HAIL_VERSION has no pinned packages: requirements/hail-$HAIL_VERSION.txt is missing. packer/readme.md tells how it is made."

# pyspark is built from source, in an environment whose build tools follow the same pins.
"python$PYTHON_VERSION" -m venv "$prefix"
PIP_CONSTRAINT="$requirements" "$prefix/bin/python" -m pip install --disable-pip-version-check --no-cache-dir --progress-bar off --requirement "$requirements" ||
  fail "Hail $HAIL_VERSION cannot be installed from PyPI."

# Where spark.jars and the class paths of the clusters point, whatever the version of Python.
jar=$("$prefix/bin/python" -c 'import importlib.util as u, pathlib as p; print(p.Path(u.find_spec("hail").origin).parent / "backend" / "hail-all-spark.jar")')
[ -f "$jar" ] || fail "the wheel of Hail $HAIL_VERSION has no $jar."
ln -sfn "$jar" "$prefix/hail-all-spark.jar"
