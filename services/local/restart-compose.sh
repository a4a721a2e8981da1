#!/bin/sh
# `make restart-compose`: the gateway and every worker anew, one after the other, while the stack serves; nginx reads its
# certificate again. After `docker compose build` this is how new images come into use without a pause.
set -eu
cd "$(dirname "$0")/../.."
say() { echo "owngpt: $*"; }

drop_next() { docker compose --profile restart rm -sf gateway-next; }
say "gateway: the next one comes up"
docker compose --profile restart up -d --wait --no-deps --force-recreate gateway-next || {
    drop_next
    say "the next gateway does not start (docker compose logs gateway-next); the old one goes on" >&2
    exit 1
}
docker compose up -d --wait --no-deps --force-recreate gateway || {
    say "the gateway does not start again; gateway-next answers in its place until it does" >&2
    exit 1
}
drop_next

for service in $(docker compose ps --services | grep '^worker' || true); do
    old=$(docker compose ps -q "$service")
    count=$(echo "$old" | wc -l)
    if [ -e /dev/nvidia0 ]; then  # a card has no memory for two
        say "$service: ends first, then comes up"
        docker compose up -d --wait --no-deps --force-recreate --scale "$service=$count" "$service"
        continue
    fi
    for container in $old; do
        say "$service: one comes up, then one ends"
        docker compose up -d --wait --no-deps --no-recreate --scale "$service=$((count + 1))" "$service"
        docker stop -t 150 "$container" >/dev/null
        docker rm "$container" >/dev/null
    done
done
docker compose kill -s HUP nginx
