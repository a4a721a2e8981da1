#!/usr/bin/env bash
# Everything that reads the code without running it. A linter that is not there is named, not passed over in silence.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
bin=.venv/bin
failed=0
run() {
    echo "check: $1"
    shift
    "$@" || { failed=1; echo "  FAILED: $*"; }
}
# shellcheck disable=SC2329 # called through run
quietly() {
    local out
    out=$("$@" 2>&1) || { echo "$out"; return 1; }
}
run ruff "$bin/ruff" check .
run mypy "$bin/mypy" --strict common gateway services monitoring bench
run "import contracts" quietly "$bin/lint-imports" --no-cache
run "sizes: files over 300 lines, functions over 50, and why" "$bin/python" -m tests.sizes
run shellcheck "$bin/shellcheck" services/base/make.sh services/worker/install-cpu.sh services/worker/install-cuda.sh services/local/install.sh services/local/compose.sh services/tools/quantize/install.sh \
    nginx/entrypoint.sh nginx/pool.sh services/redis/start.sh monitoring/alertmanager/start.sh tests/check.sh .ci/run .ci/docker.sh
run "nginx: gixy and nginx -t" "$bin/python" -m tests.lint_nginx
if command -v docker >/dev/null && docker compose version >/dev/null 2>&1; then
    run "compose config (cpu)" env ACCELERATOR=cpu docker compose config --quiet
    run "compose config (cuda)" env ACCELERATOR=cuda docker compose config --quiet
else
    echo "check: compose config SKIPPED (no docker compose here)"
fi
for dockerfile in gateway/Dockerfile nginx/Dockerfile services/*/Dockerfile; do
    run "hadolint $dockerfile" "$bin/hadolint" --ignore DL3042 --ignore DL3013 --ignore DL3025 "$dockerfile"
done
run "dashboards and SLO rules as generated" "$bin/python" -m monitoring --check
run "docs/redis.md as generated" "$bin/python" -m tests.redis_page --check
run "openapi.json as generated" quietly "$bin/python" -W ignore -m tests.openapi_page --check
if command -v node >/dev/null; then
    for script in nginx/console/assets/*.js; do
        run "node --check $script" sh -c "node --check --input-type=module - <$script"
    done
else
    echo "check: the console's scripts SKIPPED (no node here; the browser test runs them)"
fi
if command -v promtool >/dev/null; then
    run "promtool" "$bin/python" -m tests.lint_prometheus
else
    echo "check: promtool SKIPPED (not on PATH)"
fi
exit $failed
