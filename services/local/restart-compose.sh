#!/bin/sh
# `make restart-compose`: the gateway and every worker anew, one after the other, while the stack serves; nginx reads its
# certificate again. After `docker compose build` this is how new images come into use without a pause.
set -eu
exec 9<"$0"
cd "$(dirname "$0")/../.."
say() { echo "owngpt: $*"; }

# Without --no-deps, and never by --force-recreate: both leave a container that the next `docker compose up` makes anew.
come_up() { docker compose --profile restart up -d --wait --no-recreate "$@"; }
go() { docker compose --profile restart rm -sf "$@"; }

flock -n 9 || { say "another make restart-compose is at work" >&2; exit 1; }
[ -n "$(docker compose ps -q --status running gateway)" ] || {
    say "the gateway does not run; first: docker compose up -d --wait" >&2
    exit 1
}
say "gateway: the next one comes up"
go gateway-next  # what an earlier restart may have left
come_up gateway-next || {
    go gateway-next
    say "the next gateway does not start (docker compose logs gateway-next); the old one goes on" >&2
    exit 1
}
go gateway
come_up gateway || {
    say "the gateway does not start again; gateway-next answers in its place (docker compose logs gateway)" >&2
    exit 1
}
go gateway-next

for service in $(docker compose ps --services | grep '^worker' || true); do
    old=$(docker compose ps -q "$service")
    count=$(echo "$old" | wc -l)
    if [ -e /dev/nvidia0 ]; then  # a card has no memory for two
        say "$service: ends first, then comes up"
        go "$service"
        come_up --scale "$service=$count" "$service"
        continue
    fi
    for container in $old; do
        say "$service: one comes up, then one ends"
        come_up --scale "$service=$((count + 1))" "$service"
        docker stop -t 150 "$container" >/dev/null
        docker rm "$container" >/dev/null
    done
done
docker compose kill -s HUP nginx >/dev/null 2>&1  # compose says "Killed" of it
say "done"
