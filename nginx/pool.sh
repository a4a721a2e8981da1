#!/bin/sh
# shellcheck disable=SC2016 # the dollars are for nginx
# Prints the part of nginx's configuration that keeps connections to workers open.
#   pool.sh host:port ...
# vLLM closes an idle connection after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), so nginx lets go after 4.
set -eu
echo 'map $upstream_http_x_worker $worker_target {'
echo '    volatile;'   # a second try of the same request has another worker
echo '    default $upstream_http_x_worker;'
for address in "$@"; do
    echo "    $address worker_$(echo "$address" | tr ':' '_');"
done
echo '}'
for address in "$@"; do
    echo "upstream worker_$(echo "$address" | tr ':' '_') { server $address; keepalive 64; keepalive_timeout 4s; }"
done
