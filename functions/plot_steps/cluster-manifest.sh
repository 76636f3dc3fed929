#!/usr/bin/env bash
# Arguments: the Hail bucket. Writes down what this cluster was made of, so that an analysis can be repeated
# after the cluster is gone.
set -euo pipefail

bucket="${1:?the name of the Hail bucket is missing}"
hail="${ROOT:-}/opt/hail/bin/python"
job_flow="${ROOT:-}/mnt/var/lib/info/job-flow.json"

fail() {
  echo "$0: the cluster manifest was not written: $*" >&2
  exit 1
}

[ -x "$hail" ] || fail "this node has no Hail in /opt/hail; use an AMI that hail-ami built."
id=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["jobFlowId"])' "$job_flow") ||
  fail "$job_flow does not tell the id of this cluster."

metadata=http://169.254.169.254/latest
token=$(curl --silent --show-error --fail --max-time 5 --request PUT --header "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/api/token") ||
  fail "the instance metadata service gives no token."
INSTANCE=$(curl --silent --show-error --fail --max-time 5 --header "X-aws-ec2-metadata-token: $token" "$metadata/dynamic/instance-identity/document") ||
  fail "the instance metadata service does not describe this instance."
AWS_DEFAULT_REGION=$(python3 -c 'import json, sys; print(json.loads(sys.argv[1])["region"])' "$INSTANCE") ||
  fail "the instance metadata service does not tell the region."
export AWS_DEFAULT_REGION INSTANCE

CLUSTER=$(aws emr describe-cluster --cluster-id "$id" --output json) ||
  fail "cluster $id cannot be described; its instance profile needs elasticmapreduce:DescribeCluster."
PACKAGES=$("$hail" -m pip list --format json --disable-pip-version-check) ||
  fail "the packages of /opt/hail cannot be listed."
export CLUSTER PACKAGES

manifest=$(
  python3 - <<'PYTHON'
import json
import os

cluster = json.loads(os.environ["CLUSTER"])["Cluster"]
instance = json.loads(os.environ["INSTANCE"])
packages = {p["name"]: p["version"] for p in json.loads(os.environ["PACKAGES"])}
print(json.dumps({
    "ClusterId": cluster["Id"],
    "ClusterName": cluster["Name"],
    "ReleaseLabel": cluster.get("ReleaseLabel"),
    "AmiId": instance["imageId"],
    "HailVersion": packages["hail"],
    "Applications": {a["Name"]: a.get("Version") for a in cluster.get("Applications", [])},
    "Configurations": cluster.get("Configurations", []),
    "Tags": {t["Key"]: t.get("Value") for t in cluster.get("Tags", [])},
    "PrimaryInstance": instance,
    "PythonPackages": packages,
}, indent=2))
PYTHON
) || fail "what is known of cluster $id cannot be put together."

name=$(python3 -c 'import json, sys; print(json.loads(sys.argv[1])["ClusterName"])' "$manifest" | tr -c 'A-Za-z0-9._\n-' '-')
target="s3://$bucket/cluster-manifests/$name-$id.json"
aws s3 cp - "$target" --content-type application/json --only-show-errors <<<"$manifest" ||
  fail "$target cannot be put; the instance profile needs s3:PutObject on it."
echo "$0: $target"
