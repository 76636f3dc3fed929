#!/usr/bin/env bash
# What can be known to be wrong before an instance runs: asked here, within a minute, and told in one sentence. Prints
# the commit that HAIL_VERSION stands for where it is a git ref, and nothing where it is a version on PyPI.
set -euo pipefail
# shellcheck source=packer/versions.env
. ./versions.env
# shellcheck source=packer/codebuild/fail.sh
. codebuild/fail.sh

work=$(mktemp -d)
trap 'ended "$BASH_COMMAND"' EXIT

ask() { # arguments of the AWS CLI...
  aws "$@" --output text 2>"$work/error"
}

# The last line of what the AWS CLI said.
why() {
  grep -v '^$' "$work/error" | tail -n 1
}

hail_release() {
  local url="https://pypi.org/pypi/hail/$HAIL_VERSION/json" status
  status=$(curl --silent --show-error --location --retry 3 --max-time 20 --output /dev/null --write-out '%{http_code}' "$url") ||
    fail "PyPI cannot be asked for Hail $HAIL_VERSION; the build needs a way out to the internet."
  case $status in
    200) ;;
    404) fail "HAIL_VERSION is '$HAIL_VERSION', and PyPI has no such version of Hail; https://pypi.org/project/hail/#history lists them." ;;
    *) fail "PyPI answers $status where it is asked for Hail $HAIL_VERSION; start the build again when it is well." ;;
  esac
}

hail_commit() {
  if [[ $HAIL_VERSION =~ ^[0-9a-f]{40}$ ]]; then
    git init --quiet "$work/hail"
    git -C "$work/hail" fetch --quiet --depth 1 --filter=tree:0 "$HAIL_REPOSITORY" "$HAIL_VERSION" >&2 ||
      fail "HAIL_VERSION is '$HAIL_VERSION', and $HAIL_REPOSITORY has no such commit."
    echo "$HAIL_VERSION"
    return
  fi
  # A tag before a branch of the same name, as git itself has it; of an annotated tag the commit (^{}).
  git ls-remote "$HAIL_REPOSITORY" "refs/tags/$HAIL_VERSION^{}" "refs/tags/$HAIL_VERSION" "refs/heads/$HAIL_VERSION" >"$work/refs" ||
    fail "$HAIL_REPOSITORY cannot be asked for '$HAIL_VERSION'; the build needs a way out to the internet."
  local commit
  commit=$(sort -k 2 -r "$work/refs" | awk 'NR == 1 { print $1 }')
  [ -n "$commit" ] ||
    fail "HAIL_VERSION is '$HAIL_VERSION', and $HAIL_REPOSITORY has no such branch or tag; a commit is named by all of its 40 digits."
  echo "$commit"
}

subnet() {
  local vpc
  vpc=$(ask ec2 describe-subnets --subnet-ids "$SUBNET_ID" --query 'Subnets[0].VpcId') ||
    fail "SUBNET_ID is '$SUBNET_ID', which cannot be looked at: $(why)"
  [ "$vpc" = "$VPC_ID" ] || fail "SUBNET_ID is '$SUBNET_ID', which is in $vpc and not in VPC_ID, '$VPC_ID'."

  # The table, and where its default route leads. A subnet without a table of its own follows the main one of its VPC.
  local way out="RouteTables[0].[RouteTableId, Routes[?DestinationCidrBlock=='0.0.0.0/0' && State!='blackhole']
    .[GatewayId || NatGatewayId || TransitGatewayId || VpcPeeringConnectionId || NetworkInterfaceId || CoreNetworkArn][] | [0]]"
  way=$(ask ec2 describe-route-tables --filters "Name=association.subnet-id,Values=$SUBNET_ID" --query "$out") ||
    fail "The routes of $SUBNET_ID cannot be looked at: $(why)"
  [ "$way" != None ] ||
    way=$(ask ec2 describe-route-tables --filters "Name=vpc-id,Values=$VPC_ID" Name=association.main,Values=true --query "$out") ||
    fail "The routes of $VPC_ID cannot be looked at: $(why)"
  way=${way##*[[:space:]]}
  # Without a public address, an internet gateway is no way out.
  case $SSH_INTERFACE,$way in
    public_ip,igw-*) ;;
    public_ip,*) fail "The subnet $SUBNET_ID has no way out: its routes have no default route (0.0.0.0/0) to an internet gateway; name a public subnet, or add the route." ;;
    private_ip,None | private_ip,igw-*) fail "The subnet $SUBNET_ID has no way out: its routes have no default route (0.0.0.0/0) to a NAT gateway or the like, which SSH_INTERFACE=private_ip needs; name another subnet, or add the route." ;;
  esac
}

kms_key() {
  local state
  state=$(ask kms describe-key --key-id "$KMS_KEY_ID" --query "KeyMetadata.join(' ', [KeyState, KeySpec, KeyUsage])") ||
    fail "KMS_KEY_ID is '$KMS_KEY_ID', which the role of the build may not look at: $(why)"
  [ "$state" = "Enabled SYMMETRIC_DEFAULT ENCRYPT_DECRYPT" ] ||
    fail "KMS_KEY_ID is '$KMS_KEY_ID', which is $state; a volume is encrypted with a key that is Enabled SYMMETRIC_DEFAULT ENCRYPT_DECRYPT."
  # What EBS does first with a key; a key's own policy may forbid what that of the role allows.
  ask kms generate-data-key-without-plaintext --key-id "$KMS_KEY_ID" --key-spec AES_256 --query KeyId >&2 ||
    fail "KMS_KEY_ID is '$KMS_KEY_ID', which the role of the build may not use: $(why)"
}

echo "hail-ami: looking at Hail $HAIL_VERSION, $SUBNET_ID${KMS_KEY_ID:+ and $KMS_KEY_ID}." >&2
if [[ $HAIL_VERSION =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]]; then hail_release; else hail_commit; fi
subnet
if [ -n "${KMS_KEY_ID:-}" ]; then kms_key; fi
