#!/usr/bin/env bash
# Starts a Docker engine with Compose v2 and buildx on a Debian machine, as root. Harmless when one is running.
# Compose and buildx are static programs out of Debian trixie's packages: they need only libc >= 2.34.
set -euo pipefail
work=${1:?usage: docker.sh WORKDIR}
mkdir -p "$work"

if ! docker compose version >/dev/null 2>&1 || ! docker buildx version >/dev/null 2>&1; then
    root="$work/trixie"
    mkdir -p "$root"/{lists/partial,archives/partial,state}
    key=/usr/share/keyrings/debian-archive-keyring.gpg
    mirror=$({ sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\).*/\2/p' \
        /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources 2>/dev/null || true; } | grep '/debian/\?$' | head -n 1)
    echo "deb [signed-by=$key] $mirror trixie main" >"$root/sources.list"
    apt_private() {
        apt-get -o Dir::Etc::sourcelist="$root/sources.list" -o Dir::Etc::sourceparts=- \
            -o Dir::State::lists="$root/lists" -o Dir::Cache::archives="$root/archives" \
            -o Dir::Etc::preferencesparts=- -o APT::Sandbox::User=root -qq "$@"
    }
    apt_private update
    (cd "$root" && apt_private download docker-compose docker-buildx)
    for package in "$root"/*.deb; do dpkg -x "$package" "$root/files"; done
    mkdir -p ~/.docker/cli-plugins
    find "$root/files" -type f \( -name docker-compose -o -name docker-buildx \) -path '*cli-plugins*' \
        -exec install -m 0755 {} ~/.docker/cli-plugins/ \;
fi

if ! docker info >/dev/null 2>&1; then
    echo "starting dockerd"
    nohup dockerd >"$work/dockerd.log" 2>&1 </dev/null &
    echo $! >"$work/dockerd.pid"
    for _ in $(seq 60); do
        docker info >/dev/null 2>&1 && break
        sleep 0.5
    done
fi
docker info --format 'Docker engine {{.ServerVersion}}' || { tail -n 20 "$work/dockerd.log"; exit 1; }
docker compose version
docker buildx version
