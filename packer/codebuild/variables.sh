# shellcheck shell=bash
# Sourced by the buildspec: refuses in the first minute what could only fail later, makes the name of the AMI
# unique, and hands everything to Packer as PKR_VAR_....

build_variables() {
  # shellcheck source=packer/versions.env
  . ./versions.env
  # shellcheck source=packer/codebuild/fail.sh
  . codebuild/fail.sh

  local name
  for name in AMI_NAME HAIL_VERSION VEP_VERSION EMR_RELEASE_LABEL VPC_ID SUBNET_ID ARCHITECTURE SSH_INTERFACE; do
    [ -n "${!name:-}" ] ||
      fail "$name is empty; set it on the CodeBuild project or with 'Start build with overrides'." || return
  done

  # EMR takes 15 to 100 GiB, and 15 is what it gives a cluster that asks for no size; what VEP reads needs the rest.
  if [ -z "${ROOT_VOLUME_SIZE:-}" ]; then
    if [ "$VEP_VERSION" = none ]; then ROOT_VOLUME_SIZE=15; else ROOT_VOLUME_SIZE=100; fi
  fi
  local region=${AWS_DEFAULT_REGION:-$AWS_REGION}

  expect_form AMI_NAME '[A-Za-z0-9][A-Za-z0-9.-]{0,99}' "at most 100 letters, digits, dots and hyphens, with a letter or digit at the front" &&
    expect_form HAIL_VERSION '[A-Za-z0-9][A-Za-z0-9._/-]{0,199}' "a version on PyPI, such as 0.2.139, or a branch, tag or full commit of Hail's repository" &&
    expect_form VEP_VERSION 'none|[1-9][0-9]{1,2}' "none or a release of Ensembl, such as 115" &&
    expect_form EMR_RELEASE_LABEL 'emr-[0-9]+\.[0-9]+\.[0-9]+' "a release label of EMR, such as emr-7.13.0" &&
    expect_form VPC_ID 'vpc-[0-9a-f]+' "the id of a VPC" &&
    expect_form SUBNET_ID 'subnet-[0-9a-f]+' "the id of a subnet" &&
    expect_form ARCHITECTURE 'x86_64|arm64' "x86_64 or arm64" &&
    expect_form SSH_INTERFACE 'public_ip|private_ip' "public_ip or private_ip" &&
    expect_form R_KERNEL 'true|false|' "true or false" &&
    expect_form ALLOW_UNTESTED_VERSIONS 'true|false|' "true or false" &&
    expect_form KMS_KEY_ID "arn:[a-z-]+:kms:$region:[0-9]{12}:key/[A-Za-z0-9-]+|" "empty or the ARN of a KMS key in $region" &&
    expect_form ROOT_VOLUME_SIZE '1[5-9]|[2-9][0-9]|100' "a number of GiB from 15 to 100, since EMR takes no other" || return

  local versions
  versions=$(python3 codebuild/compatibility.py) || return
  read -r PKR_VAR_spark_version PKR_VAR_python_version <<<"$versions"

  local build=${CODEBUILD_BUILD_ID##*:}
  AMI_NAME="$AMI_NAME-$(date -u +%Y%m%d)-${build:0:8}"

  export AMI_NAME PKR_VAR_spark_version PKR_VAR_python_version
  export PKR_VAR_ami_name=$AMI_NAME PKR_VAR_hail_version=$HAIL_VERSION PKR_VAR_vep_version=$VEP_VERSION
  export PKR_VAR_emr_release_label=$EMR_RELEASE_LABEL PKR_VAR_architecture=$ARCHITECTURE PKR_VAR_r_kernel=${R_KERNEL:-false}
  export PKR_VAR_packer_version=$PACKER_VERSION PKR_VAR_htslib_version=$HTSLIB_VERSION PKR_VAR_samtools_version=$SAMTOOLS_VERSION
  export PKR_VAR_region=$region PKR_VAR_vpc_id=$VPC_ID PKR_VAR_subnet_id=$SUBNET_ID PKR_VAR_ssh_interface=$SSH_INTERFACE
  export PKR_VAR_instance_profile=${INSTANCE_PROFILE:-} PKR_VAR_kms_key_id=${KMS_KEY_ID:-}
  export PKR_VAR_hail_bucket=${HAIL_BUCKET:-} PKR_VAR_open_data_bucket=${OPEN_DATA_BUCKET:-}
  export PKR_VAR_root_volume_size=$ROOT_VOLUME_SIZE
  export PKR_VAR_build_id=${CODEBUILD_BUILD_ID:-} PKR_VAR_build_project=${CODEBUILD_BUILD_ID%%:*}

  echo "hail-ami: $AMI_NAME, with Hail $HAIL_VERSION, VEP $VEP_VERSION, Spark $PKR_VAR_spark_version and Python $PKR_VAR_python_version, for $EMR_RELEASE_LABEL on $ARCHITECTURE."
}

expect_form() { # variable regular-expression what-it-should-be
  [[ ${!1:-} =~ ^($2)$ ]] || fail "$1 is '${!1:-}' and should be $3."
}

build_variables
