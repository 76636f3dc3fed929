#!/usr/bin/env bash
# Turns on the web server that the AMI brings, for the plots and nothing else: whoever may reach port 80 of
# this node must not see the rest of it.
set -euo pipefail

conf="${ROOT:-}/etc/httpd/conf.d/hail-plots.conf"

if ! [ -x "${ROOT:-}/usr/sbin/httpd" ]; then
  echo "$0: the plots cannot be served, since this node has no /usr/sbin/httpd; use an AMI that hail-ami built." >&2
  exit 1
fi

# The main configuration grants all of /var/www; a Location is merged after every Directory, so this one wins.
# Following links stays off, or a session could link any file that httpd may read into its folder.
sudo tee "$conf" >/dev/null <<'CONF'
ServerTokens Prod
TraceEnable Off
<Location "/">
    Require all denied
</Location>
<Location "/plots/">
    Require all granted
</Location>
<Directory "/var/www/html/plots">
    Options None
    AllowOverride None
</Directory>
CONF

sudo systemctl enable httpd
if ! sudo systemctl reload-or-restart httpd; then
  echo "$0: httpd did not start; what listens on port 80 is shown by 'sudo ss -ltnp', the cause by 'journalctl -u httpd'." >&2
  exit 1
fi

# The folder itself answers 403, since nothing lists it: any answer at all is what is waited for.
if ! curl --silent --show-error --output /dev/null --max-time 5 --retry 12 --retry-delay 5 --retry-connrefused http://127.0.0.1/plots/; then
  echo "$0: httpd was started and does not answer on port 80 within a minute; see 'journalctl -u httpd'." >&2
  exit 1
fi
echo "$0: httpd serves /plots/ and nothing else."
