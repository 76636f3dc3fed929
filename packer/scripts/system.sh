#!/usr/bin/env bash
# What comes from Amazon Linux itself. Its repositories are locked to the release of the source AMI, so the
# packages are as old as that and stay so.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

# amazon-efs-utils is for /efs. EMR installs the same Java again; here it serves the test of the image. Hail wants BLAS
# and LAPACK on every node.
dnf install -y \
  amazon-efs-utils httpd java-17-amazon-corretto-headless "python$PYTHON_VERSION" "python$PYTHON_VERSION-devel" \
  bzip2 bzip2-devel gcc gcc-c++ git lapack-devel libcurl-devel make ncurses-devel openblas-devel openssl-devel tar \
  xz-devel zlib-devel ||
  fail "the packages of Amazon Linux cannot be installed; the subnet needs a way out to the internet."

# Off, and with nothing to show, until a cluster's plot step has restricted it to the plots.
systemctl disable --now httpd
rm -f /etc/httpd/conf.d/welcome.conf
