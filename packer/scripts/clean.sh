#!/usr/bin/env bash
# What only the build needed, and what must not be the same on two machines.
# shellcheck source=packer/scripts/common.sh
. "${SOURCES:=/tmp}/scripts/common.sh"

dnf clean all
rm -rf /root/.cache /root/.cpanm /root/.gradle /root/.ivy2 /root/.mill /var/tmp/* /home/ec2-user/.ssh/authorized_keys /root/.ssh/authorized_keys
rm -f /etc/ssh/ssh_host_* "$SOURCES/vep-data"
cloud-init clean --logs
truncate --size 0 /etc/machine-id
