#!/usr/bin/env bash
# Arguments: the id of the file system. Mounts it at /efs of the primary node, now and after a reboot.
set -euo pipefail

file_system="${1:?the id of the EFS file system is missing}"
folder="${ROOT:-}/efs"
fstab="${ROOT:-}/etc/fstab"

if ! [ -x "${ROOT:-}/usr/sbin/mount.efs" ] && ! [ -x "${ROOT:-}/sbin/mount.efs" ]; then
  echo "$0: $file_system cannot be mounted, since this node has no amazon-efs-utils; use an AMI that hail-ami built." >&2
  exit 1
fi

# What is mounted shows as 127.0.0.1 because of the TLS tunnel, so fstab is what tells which file system it is.
others=$(awk -v folder="$folder" -v mine="$file_system:/" '$2 == folder && $1 != mine { print $1 }' "$fstab")
if [ -n "$others" ]; then
  echo "$0: $file_system cannot be mounted at $folder, where $fstab has $others; take that line out first." >&2
  exit 1
fi
if ! grep -qF "$file_system:/ $folder " "$fstab"; then
  echo "$file_system:/ $folder efs _netdev,tls 0 0" | sudo tee -a "$fstab" >/dev/null
fi

sudo mkdir -p "$folder"
if ! mountpoint -q "$folder" && ! sudo mount "$folder"; then
  echo "$0: $file_system cannot be mounted at $folder; it needs a mount target in this node's subnet whose security group lets port 2049 in from here." >&2
  exit 1
fi
echo "$0: $file_system is mounted at $folder."
