#!/usr/bin/env bash
# Stand-ins for the official base images, out of Debian packages, for a network without an image registry:
#   make base-images    (needs root, debootstrap and a Docker engine)
# Brings the host's CA bundle, pip settings and local wheels along, because such networks often have all three.
# Prints the .env lines that make compose use them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=ca-certificates,curl,gettext-base,libgomp1,libnuma1,nginx-light,python3,python3-pip,python3-venv,redis-server

echo "debootstrap bookworm (about half a minute)" >&2
debootstrap --variant=minbase --include="$packages" bookworm "$work/root" >"$work/log" 2>&1 ||
    { tail -n 20 "$work/log" >&2; exit 1; }
rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/lib/apt/lists/*
cp -L /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/ca-certificates.crt"

{
    echo "[global]"
    echo "cert = /etc/ssl/certs/ca-certificates.crt"
    echo "disable-pip-version-check = true"
    for folder in $(python3 -m pip config list 2>/dev/null | sed -n "s/.*find-links='\(.*\)'/\1/p" | sort -u); do
        [ -d "$folder" ] || continue
        mkdir -p "$work/root/opt/wheels"
        cp "$folder"/torch-2.13.0+cpu-cp311-* "$work/root/opt/wheels/" 2>/dev/null || true
        echo "find-links = /opt/wheels"
    done
    python3 -m pip config list 2>/dev/null | sed -n "s/^.*\.\(index-url\|trusted-host\)='\(.*\)'/\1 = \2/p"
} >"$work/root/etc/pip.conf"

tar -C "$work/root" -c . | docker import -c 'ENV LANG=C.UTF-8' - owngpt-base:bookworm >/dev/null
# The monitoring profile's images that Debian has programs for; Grafana, Loki, Alloy and Tempo it has not.
for image in prometheus:prometheus:/usr/bin/prometheus alertmanager:prometheus-alertmanager:/usr/bin/prometheus-alertmanager \
    redis-exporter:prometheus-redis-exporter:/usr/bin/prometheus-redis-exporter \
    nginx-exporter:prometheus-nginx-exporter:/usr/bin/prometheus-nginx-exporter; do
    IFS=: read -r name package program <<<"$image"
    docker build -q -t "owngpt-$name:bookworm" - >/dev/null <<EOF
FROM owngpt-base:bookworm
RUN apt-get -qq update && apt-get -qq install -y --no-install-recommends $package >/dev/null && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /prometheus /alertmanager && chown 65534:65534 /prometheus /alertmanager
RUN ln -s $program /usr/local/bin/$name
ENTRYPOINT ["$program"]
EOF
    echo "$(echo "$name" | tr 'a-z-' 'A-Z_')_IMAGE=owngpt-$name:bookworm"
done
echo "PYTHON_IMAGE=owngpt-base:bookworm"
echo "NGINX_IMAGE=owngpt-base:bookworm"
echo "REDIS_IMAGE=owngpt-base:bookworm"
