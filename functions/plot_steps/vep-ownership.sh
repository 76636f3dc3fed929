#!/usr/bin/env bash
# VEP writes beside its cache and people add plugins and caches to it, as hadoop. An AMI without VEP has nothing
# to hand over.
set -euo pipefail

vep="${ROOT:-}/opt/vep"

if ! [ -d "$vep" ]; then
  echo "$0: this AMI has no VEP."
  exit 0
fi
sudo chown -R hadoop:hadoop "$vep"
echo "$0: $vep belongs to hadoop."
