#!/usr/bin/env bash
# Gives the sessions a place for their plots. On EMR they run as the user livy unless impersonation was
# switched on, so the folder is livy's; the web server only reads it.
set -euo pipefail

plots="${ROOT:-}/var/www/html/plots"

if ! id livy >/dev/null 2>&1; then
  echo "$0: $plots cannot be given to Livy, since this node has no user livy; add the application Livy to the cluster." >&2
  exit 1
fi

sudo install -d -o livy -g livy -m 0755 "$plots"

# A month after it was written a plot goes; systemd looks every day. It would go with the cluster anyway.
echo "d /var/www/html/plots 0755 livy livy m:30d" |
  sudo install -D -m 0644 /dev/stdin "${ROOT:-}/etc/tmpfiles.d/hail-plots.conf"
echo "$0: $plots belongs to livy."
