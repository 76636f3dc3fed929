variable "ami_name" {
  type        = string
  description = "The whole name of the AMI; the buildspec makes it unique."
}

variable "hail_version" {
  type = string
}

variable "vep_version" {
  type        = string
  description = "An Ensembl release, or none."
}

variable "emr_release_label" {
  type = string
}

variable "spark_version" {
  type = string
}

variable "python_version" {
  type = string
}

variable "packer_version" {
  type = string
}

variable "htslib_version" {
  type = string
}

variable "samtools_version" {
  type = string
}

variable "hail_revision" {
  type        = string
  description = "The commit that hail_version stands for where it is a git ref; empty where it is a version on PyPI."
  default     = ""
}

variable "r_kernel" {
  type        = string
  description = "true or false."
  default     = "false"
}

variable "build_project" {
  type        = string
  description = "The CodeBuild project; what may be done with an AMI is told by this tag of it."
  default     = ""
}

variable "build_id" {
  type    = string
  default = ""
}

variable "architecture" {
  type        = string
  description = "x86_64 or arm64; that of the clusters."
}

variable "region" {
  type = string
}

variable "vpc_id" {
  type = string
}

variable "subnet_id" {
  type = string
}

variable "ssh_interface" {
  type        = string
  description = "public_ip, or private_ip where the build itself runs in the VPC."
}

variable "instance_profile" {
  type        = string
  description = "Lets the build instance read the VEP cache; empty without VEP."
  default     = ""
}

variable "hail_bucket" {
  type    = string
  default = ""
}

variable "open_data_bucket" {
  type    = string
  default = ""
}

variable "kms_key_id" {
  type        = string
  description = "Encrypts the volume, and so the image, with this key; empty leaves it to the account's default."
  default     = ""
}

variable "root_volume_size" {
  type        = number
  description = "GiB. EMR takes 15 to 100."
}

locals {
  tags = {
    Name              = var.ami_name
    hail-version      = var.hail_version
    hail-revision     = var.hail_revision
    vep-version       = var.vep_version
    emr-release-label = var.emr_release_label
    spark-version     = var.spark_version
    python-version    = var.python_version
    htslib-version    = var.htslib_version
    samtools-version  = var.samtools_version
    packer-version    = var.packer_version
    r-kernel          = var.r_kernel
    architecture      = var.architecture
    root-volume-size  = var.root_volume_size
    source-ami        = "{{ .SourceAMI }}"
    source-ami-name   = "{{ .SourceAMIName }}"
    build-project     = var.build_project
    build-id          = var.build_id
  }
}

source "amazon-ebs" "hail" {
  ami_name        = var.ami_name
  ami_description = "Hail ${var.hail_version} for ${var.emr_release_label}"
  region          = var.region
  instance_type   = var.architecture == "arm64" ? "m7g.xlarge" : "m7i.xlarge"

  # The newest of the kernel that EMR 7 runs; which one it was is in the tag source-ami.
  source_ami_filter {
    filters = {
      name                = "al2023-ami-2023.*-kernel-6.1-${var.architecture}"
      architecture        = var.architecture
      root-device-type    = "ebs"
      virtualization-type = "hvm"
    }
    owners      = ["amazon"]
    most_recent = true
  }

  vpc_id                                    = var.vpc_id
  subnet_id                                 = var.subnet_id
  ssh_interface                             = var.ssh_interface
  associate_public_ip_address               = var.ssh_interface == "public_ip"
  temporary_security_group_source_public_ip = var.ssh_interface == "public_ip"
  iam_instance_profile                      = var.instance_profile
  ssh_username                              = "ec2-user"

  # Amazon Linux 2023 takes no ssh-rsa any more.
  temporary_key_pair_type = "ed25519"

  # The instance and the clusters made from the image answer to IMDSv2 only.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  imds_support = "v2.0"

  # EMR takes an image with this one volume and no other.
  launch_block_device_mappings {
    device_name           = "/dev/xvda"
    volume_type           = "gp3"
    iops                  = 3000
    throughput            = 125
    volume_size           = var.root_volume_size
    delete_on_termination = true

    # Encrypted from its first block, so that the image need not be copied to become so (encrypt_boot).
    encrypted  = var.kms_key_id == "" ? null : true
    kms_key_id = var.kms_key_id == "" ? null : var.kms_key_id
  }

  # A snapshot of an image with VEP takes longer than the 30 minutes that Packer waits of itself.
  aws_polling {
    delay_seconds = 30
    max_attempts  = 180
  }

  # By these build-ami finds what a build leaves that is stopped before Packer can clean up.
  run_tags = {
    Name          = "packer ${var.ami_name}"
    build-project = var.build_project
    build-id      = var.build_id
  }
  run_volume_tags = {
    Name          = "packer ${var.ami_name}"
    build-project = var.build_project
    build-id      = var.build_id
  }
  tags          = local.tags
  snapshot_tags = local.tags
}

build {
  sources = ["source.amazon-ebs.hail"]

  provisioner "file" {
    sources     = ["scripts", "requirements", "versions.env", "compatibility.json"]
    destination = "/tmp/"
  }

  provisioner "shell" {
    environment_vars = [
      "HAIL_VERSION=${var.hail_version}",
      "HAIL_REVISION=${var.hail_revision}",
      "SPARK_VERSION=${var.spark_version}",
      "R_KERNEL=${var.r_kernel}",
      "VEP_VERSION=${var.vep_version}",
      "PYTHON_VERSION=${var.python_version}",
      "HAIL_BUCKET=${var.hail_bucket}",
      "OPEN_DATA_BUCKET=${var.open_data_bucket}",
      "AWS_DEFAULT_REGION=${var.region}",
    ]
    execute_command = "sudo env {{ .Vars }} bash -e '{{ .Path }}'"
    inline = [
      for script in ["vep-cache", "system", "hail", "samtools", "r", "vep", "tests", "clean"] :
      "echo hail-ami: ${script}; bash /tmp/scripts/${script}.sh"
    ]
  }

  post-processor "manifest" {
    output     = "manifest.json"
    strip_path = true
  }
}
