#!/bin/sh
# Becomes redis-server. Before that, says in one line when the state in /data was written by a server that this one
# cannot read: a newer one of its kind, or one of another kind (services/local/state_server.py knows the same rule).
set -eu
# shellcheck disable=SC2012 # the newest; the names are redis' own
base=$(ls -t "${DATA:-/data}"/appendonlydir/*.base.rdb 2>/dev/null | head -n 1)
if [ -n "$base" ]; then
    writer=$(head -c 64 "$base" | tr -c '[:print:]' ' ' | sed -n 's/^[A-Z0-9]* *\(redis\|valkey\)-ver *\([0-9]*\.[0-9]*\).*/\1 \2/p')
    own=$(redis-server --version | sed -n 's/^\([A-Za-z]*\) server v=\([0-9]*\.[0-9]*\).*/\1 \2/p' | tr '[:upper:]' '[:lower:]')
    newest=$(printf '%s\n%s\n' "${writer#* }" "${own#* }" | sort -V | tail -n 1)
    forked=$(printf '%s\n7.4\n' "${writer#* }" | sort -V | head -n 1)
    readable=no
    if [ -z "$writer" ]; then
        readable=yes
    elif [ "${writer% *}" = "${own% *}" ]; then
        [ "$newest" != "${own#* }" ] || readable=yes
    elif [ "${own% *}" = valkey ] && [ "$forked" != 7.4 ]; then
        readable=yes
    fi
    if [ $readable = no ]; then
        echo "owngpt: the state on this volume was written by $writer; this image has $own, which cannot read it." \
            "Set REDIS_IMAGE to an image with $writer or a newer one of its kind." >&2
        exit 1
    fi
fi
exec redis-server "$@"
