# shellcheck shell=bash
# Sourced by the buildspec: refuses in the first minute what could only fail later, makes the name of the AMI
# unique, and hands everything to Packer as PKR_VAR_....

build_variables() {
  local name
  for name in AMI_NAME HAIL_VERSION VEP_VERSION EMR_RELEASE_LABEL VPC_ID SUBNET_ID ARCHITECTURE SSH_INTERFACE; do
    if [ -z "${!name:-}" ]; then
      echo "$name is empty; set it on the CodeBuild project or with 'Start build with overrides'." >&2
      return 1
    fi
  done
  if ! [[ $AMI_NAME =~ ^[A-Za-z0-9.-]{1,100}$ ]]; then
    echo "AMI_NAME is '$AMI_NAME' and should be at most 100 letters, digits, dots and hyphens." >&2
    return 1
  fi

  local versions
  versions=$(
    python3 - compatibility.json "$EMR_RELEASE_LABEL" "$HAIL_VERSION" "$VEP_VERSION" <<'PYTHON'
import json
import sys

table_file, label, hail, vep = sys.argv[1:]
table = json.load(open(table_file))
release = table["emr_releases"].get(label)
if release is None:
    sys.exit(f"EMR_RELEASE_LABEL is '{label}' and should be one of: {', '.join(table['emr_releases'])}.")
if hail not in release["hail"]:
    sys.exit(f"HAIL_VERSION is '{hail}', which does not run on {label}; it should be one of: {', '.join(release['hail'])}.")
if vep != "none" and vep not in table["vep"]:
    sys.exit(f"VEP_VERSION is '{vep}' and should be none or one of: {', '.join(table['vep'])}.")
print(release["spark"], release["python"])
PYTHON
  ) || return 1
  read -r PKR_VAR_spark_version PKR_VAR_python_version <<<"$versions"

  # shellcheck source=packer/versions.env
  . ./versions.env
  local build=${CODEBUILD_BUILD_ID##*:}
  AMI_NAME="$AMI_NAME-$(date -u +%Y%m%d)-${build:0:8}"
  # EMR takes 15 to 100 GiB, and 15 is what it gives a cluster that asks for no size; two caches of VEP need the rest.
  if [ -z "${ROOT_VOLUME_SIZE:-}" ]; then
    if [ "$VEP_VERSION" = none ]; then ROOT_VOLUME_SIZE=15; else ROOT_VOLUME_SIZE=100; fi
  fi

  export AMI_NAME PKR_VAR_spark_version PKR_VAR_python_version
  export PKR_VAR_ami_name=$AMI_NAME PKR_VAR_hail_version=$HAIL_VERSION PKR_VAR_vep_version=$VEP_VERSION
  export PKR_VAR_emr_release_label=$EMR_RELEASE_LABEL PKR_VAR_build_inputs=${BUILD_INPUTS:-}
  export PKR_VAR_packer_version=$PACKER_VERSION PKR_VAR_htslib_version=$HTSLIB_VERSION PKR_VAR_samtools_version=$SAMTOOLS_VERSION
  export PKR_VAR_architecture=$ARCHITECTURE PKR_VAR_region=${AWS_DEFAULT_REGION:-$AWS_REGION}
  export PKR_VAR_vpc_id=$VPC_ID PKR_VAR_subnet_id=$SUBNET_ID PKR_VAR_ssh_interface=$SSH_INTERFACE
  export PKR_VAR_instance_profile=${INSTANCE_PROFILE:-} PKR_VAR_kms_key_id=${KMS_KEY_ID:-}
  export PKR_VAR_hail_bucket=${HAIL_BUCKET:-} PKR_VAR_open_data_bucket=${OPEN_DATA_BUCKET:-}
  export PKR_VAR_root_volume_size=$ROOT_VOLUME_SIZE
}

build_variables
