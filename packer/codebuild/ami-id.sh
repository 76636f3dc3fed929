#!/usr/bin/env bash
# Arguments: Packer's manifest. Prints the id of the AMI that the last run made.
set -euo pipefail

python3 - "${1:?the manifest is missing}" <<'PYTHON'
import json
import sys

manifest = json.load(open(sys.argv[1]))
artifacts = [b["artifact_id"] for b in manifest["builds"] if b["packer_run_uuid"] == manifest["last_run_uuid"]]
amis = [a.split(":")[1] for a in artifacts if ":ami-" in a]
if len(amis) != 1:
    sys.exit(f"hail-ami error: {sys.argv[1]} names {len(amis)} AMIs of the last run and should name one.")
print(amis[0])
PYTHON
