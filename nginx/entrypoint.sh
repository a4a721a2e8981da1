#!/bin/sh
# Renders the configuration from the environment, checks it, and becomes nginx. `entrypoint.sh health` asks it.
set -eu
export RUN_DIR=/run/nginx
names=${SERVER_NAMES:-_}

if [ "${1:-}" = health ]; then
    exec curl -fsS -o /dev/null --max-time 1 -H "Host: ${names%% *}" http://127.0.0.1:8082/health
fi

# Known worker addresses: the part of the backend network that compose hands out to containers.
addresses=$(seq -f "$BACKEND_PREFIX.%g:8000" 2 127)
# shellcheck disable=SC2086 # one argument an address
/etc/owngpt/pool.sh $addresses >"$RUN_DIR/pool.conf"

CORS_MAP=
# shellcheck disable=SC2089,SC2090 # the quotes are meant for nginx
for origin in ${CORS_ORIGINS:-}; do CORS_MAP="$CORS_MAP \"$origin\" \$http_origin;"; done

LISTEN_OPTIONS=
TLS=
UNKNOWN_HOSTS=
tls=/etc/owngpt/tls
if [ -n "${TLS_DIR:-}" ] && { [ ! -r "$tls/fullchain.pem" ] || [ ! -r "$tls/privkey.pem" ]; }; then
    echo "nginx: TLS_DIR=$TLS_DIR: user 10001 cannot read fullchain.pem and privkey.pem there (certbot's are links: copy them)" >&2
    exit 1
fi
if [ -r "$tls/fullchain.pem" ]; then   # TLS_DIR
    LISTEN_OPTIONS=' ssl'
    # shellcheck disable=SC2016 # the dollars are for nginx
    TLS="ssl_certificate $tls/fullchain.pem; ssl_certificate_key $tls/privkey.pem; ssl_protocols TLSv1.2 TLSv1.3;"' ssl_session_cache shared:tls:10m; ssl_session_timeout 1h; error_page 497 =308 https://$http_host$request_uri;'
    version=$(nginx -v 2>&1 | sed -n 's/.*nginx.//p')
    oldest=$(printf '%s\n1.25.1\n' "$version" | sort -V | head -n 1)
    if [ "$oldest" = 1.25.1 ]; then TLS="$TLS http2 on;"; else LISTEN_OPTIONS=' ssl http2'; fi
fi
if [ "$names" != _ ]; then
    UNKNOWN_HOSTS='server { listen 8080 default_server; server_name _; return 444; }'
    [ -z "$TLS" ] || UNKNOWN_HOSTS='server { listen 8080 ssl default_server; server_name _; ssl_reject_handshake on; return 444; }'
fi
# shellcheck disable=SC2090
export CORS_MAP LISTEN_OPTIONS TLS UNKNOWN_HOSTS SERVER_NAMES="$names" LISTEN=8080 ACCESS_LOG=/dev/stdout
export MAX_BODY_BYTES="${MAX_BODY_BYTES:-4194304}" READ_TIMEOUT_S="${READ_TIMEOUT_S:-600}" GATEWAY_ADDRESS JOBS_ADDRESS
WORKER_TOKEN=$(cat "$WORKER_TOKEN_FILE")
export WORKER_TOKEN INNER_LISTEN=8082 INNER_PORT=8082
export LEDGER_ADDRESS GRAFANA_ADDRESS STATUS_LISTEN=8081 STATUS="stub_status;" STATUS_ALLOW="$BACKEND_PREFIX.0/24" CONSOLE_DIR=/etc/owngpt/console
export MAX_FILE_BYTES="${MAX_FILE_BYTES:-536870912}"
export MAX_UPLOAD_BYTES="$((MAX_FILE_BYTES + 65536))"

umask 077   # the worker token is in it
# shellcheck disable=SC2016 # names for envsubst, not for the shell
envsubst '${RUN_DIR} ${LISTEN} ${LISTEN_OPTIONS} ${TLS} ${SERVER_NAMES} ${UNKNOWN_HOSTS} ${CORS_MAP} ${GATEWAY_ADDRESS}
    ${JOBS_ADDRESS} ${LEDGER_ADDRESS} ${GRAFANA_ADDRESS} ${STATUS_LISTEN} ${STATUS} ${STATUS_ALLOW} ${INNER_LISTEN} ${INNER_PORT} ${WORKER_TOKEN} ${CONSOLE_DIR} ${MAX_FILE_BYTES} ${MAX_UPLOAD_BYTES} ${MAX_BODY_BYTES} ${READ_TIMEOUT_S} ${ACCESS_LOG}' </etc/owngpt/nginx.conf.template >"$RUN_DIR/nginx.conf"
exec nginx -p "$RUN_DIR" -e stderr -c "$RUN_DIR/nginx.conf"
