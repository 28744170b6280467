#!/usr/bin/env bash
# two-servers.sh [OPTIONS OF rootcellar serve]: two servers with the same options, on ports 30001 and 30002, until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."
pids=()
for port in 30001 30002; do
    .venv/bin/rootcellar serve --port "$port" "$@" &
    pids+=("$!")
done
trap 'kill "${pids[@]}" 2>/dev/null || true; wait' EXIT INT TERM
wait -n "${pids[@]}"
