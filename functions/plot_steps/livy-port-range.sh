#!/usr/bin/env bash
# Livy takes one port of this range per session, and its default, 10000~10010, ends at the eleventh session
# with "Unable to connect to provided ports". The default also holds the port of HiveServer2.
set -euo pipefail

conf="${ROOT:-}/etc/livy/conf/livy-client.conf"
key="livy.rsc.launcher.port.range"
wanted="$key = 10500~10999"

if ! [ -d "${conf%/*}" ]; then
  echo "$0: the port range cannot be set, since this node has no ${conf%/*}; add the application Livy to the cluster." >&2
  exit 1
fi

# A restart ends the sessions that run, so there is one only when something changed.
if ! sudo grep -qxF "$wanted" "$conf" 2>/dev/null; then
  others=$(sudo grep -vF "$key" "$conf" 2>/dev/null || true)
  printf '%s\n' "$others" "$wanted" | sed '/^$/d' | sudo tee "$conf" >/dev/null
  sudo systemctl restart livy-server
  echo "$0: $wanted; Livy was restarted."
fi

if ! curl --silent --show-error --fail --output /dev/null --max-time 10 --retry 60 --retry-delay 2 --retry-connrefused http://127.0.0.1:8998/sessions; then
  echo "$0: Livy does not answer on port 8998 two minutes after it was told its port range; see /var/log/livy/." >&2
  exit 1
fi
echo "$0: Livy answers."
