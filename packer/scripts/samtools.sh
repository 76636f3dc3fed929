#!/usr/bin/env bash
# htslib (with bgzip and tabix) and samtools, in /usr/local.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

prefix="${PREFIX:-/usr/local}"
work=$(mktemp -d)
cd "$work"

compile() { # folder configure-options...
  cd "$1" &&
    ./configure --prefix="$prefix" "${@:2}" &&
    make -j "$(nproc)" &&
    make install
}

build() { # name version sha256 configure-options...
  local name=$1 version=$2
  fetch "https://github.com/samtools/$name/releases/download/$version/$name-$version.tar.bz2" "$3" "$name.tar.bz2"
  tar -xjf "$name.tar.bz2"
  logged "$name.log" compile "$name-$version" "${@:4}" || fail "$name $version cannot be built."
}

build htslib "$HTSLIB_VERSION" "$HTSLIB_SHA256"
build samtools "$SAMTOOLS_VERSION" "$SAMTOOLS_SHA256" --with-htslib="$prefix" LDFLAGS="-Wl,-rpath,$prefix/lib"

if [ "$prefix" = /usr/local ]; then
  echo /usr/local/lib >/etc/ld.so.conf.d/local.conf
  ldconfig
fi
