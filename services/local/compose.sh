#!/bin/sh
# Changes the containers of a stack while it serves.
#   apply    models.yaml as it is now (make apply-compose): what is new comes up beside the old, then the old drains
#   restart  the gateway and every worker anew, one after the other (make restart-compose); nginx reads its certificate
#            again. After `docker compose build` this is how new images come into use without a pause.
# On a GPU, which has no memory for two, the old goes first.
set -eu
exec 9<"$0"
cd "$(dirname "$0")/../.."
say() { echo "owngpt: $*"; }
fail() {
    say "$*" >&2
    exit 1
}
flock -n 9 || fail "another make apply-compose or restart-compose is at work"

on_gpus() { docker compose config "$@" | grep -q 'driver: nvidia'; }
go() { docker compose --profile restart --profile without-models-yaml rm -sf "$@"; }
# Without --no-deps, and never by --force-recreate: both leave a container that the next `docker compose up` makes anew.
come_up() { docker compose --profile restart up -d --no-recreate "$@"; }

apply() {
    GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)} .venv-tools/bin/python -m services.local.compose
    if on_gpus; then
        go worker
    else
        docker compose up -d --wait
        go worker
    fi
    docker compose config --services | grep -qx trainer || go trainer  # nothing can be trained any more
    docker compose up -d --wait --remove-orphans
}

# When a service's container was started, and nothing if it does not run (is not "healthy").
started() {
    for id in $(docker compose --profile restart ps -q --status running "$1"); do
        docker inspect -f '{{.State.Health.Status}} {{.State.StartedAt}}' "$id" | sed -n "s/^${2-.*} //p"
    done
}

restart_gateway() {
    was=$(started gateway) next=$(started gateway-next healthy)  # before that it has not taken over
    [ -n "$was$next" ] || fail "the gateway does not run; first: docker compose up -d --wait"
    # Who started last has the socket. A gateway-next that has it was left by a restart that did not come to its end.
    if [ -z "$next" ] || [ "$(printf '%s\n' "$was" "$next" | sort | tail -1)" != "$next" ]; then
        say "gateway: the next one comes up"
        go gateway-next
        come_up --wait gateway-next || {
            docker compose --profile restart logs --tail 20 gateway-next
            go gateway-next
            fail "the next gateway does not start; the old one goes on"
        }
    fi
    go gateway
    come_up --wait gateway || fail "the gateway does not start (docker compose logs gateway); gateway-next answers for it"
    go gateway-next
}

# Until a container is healthy; not when it has ended, once, or is not after 30 minutes.
healthy() {
    for _ in $(seq 1800); do
        state=$(docker inspect -f '{{.State.Status}} {{.State.Health.Status}} {{.RestartCount}}' "$1") || return 1
        case $state in
            "running healthy "*) return 0 ;;
            "running "*" 0" | "created "*) sleep 1 ;;
            *) return 1 ;;
        esac
    done
    return 1
}

# Removes what came up and was not to stay.
undo() {
    for id in $(docker compose ps -aq "$service"); do
        case $kept in *"$id"*) ;; *) docker rm -f "$id" >/dev/null ;; esac
    done
    fail "$service: $1"
}

restart_beside() {
    docker compose rm -f "$service"  # what has ended would be started again
    old=$(docker compose ps -q "$service")
    count=$(echo "$old" | wc -w)
    for container in $old; do
        say "$service: one comes up, then one ends"
        kept=$(docker compose ps -aq "$service")
        trap 'undo "interrupted"' INT TERM
        come_up --scale "$service=$((count + 1))" "$service" || undo "it cannot be started"
        for id in $(docker compose ps -aq "$service"); do
            case $kept in *"$id"*) ;; *) healthy "$id" || {
                docker logs --tail 20 "$id"
                undo "the new one does not come up; the old ones go on"
            } ;; esac
        done
        trap - INT TERM
        docker stop -t 150 "$container" >/dev/null
        docker rm "$container" >/dev/null
    done
}

restart() {
    docker compose kill -s HUP nginx >/dev/null 2>&1 || say "nginx does not run"  # of HUP compose says "Killed"
    docker compose run --rm fetch  # says what is wrong with models.yaml before anything is touched
    restart_gateway
    for service in $(docker compose config --services | grep '^worker' | sort); do
        if on_gpus "$service"; then
            say "$service: ends, then comes up"
            count=$(docker compose ps -aq "$service" | wc -w)
            go "$service"
            come_up --wait --scale "$service=$((count > 0 ? count : 1))" "$service" ||
                fail "$service does not come up: docker compose logs $service"
        else
            restart_beside
        fi
    done
    say "done"
}

case ${1-} in
    apply | restart) "$1" ;;
    *) fail "apply or restart?" ;;
esac
