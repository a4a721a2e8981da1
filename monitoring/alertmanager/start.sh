#!/bin/sh
# Puts ALERT_WEBHOOK_URL, whatever characters it has, into the configuration, and becomes Alertmanager.
set -eu
while IFS= read -r line; do
    case $line in
    *WEBHOOK_URL\"*) printf '%s%s%s\n' "${line%%WEBHOOK_URL*}" "$ALERT_WEBHOOK_URL" "${line#*WEBHOOK_URL}" ;;
    *) printf '%s\n' "$line" ;;
    esac
done </etc/alertmanager/alertmanager.yml >/alertmanager/alertmanager.yml
exec alertmanager --config.file=/alertmanager/alertmanager.yml --storage.path=/alertmanager/data --cluster.listen-address=
