#!/usr/bin/env bash
# router.sh NAME [OPTIONS OF THE ROUTER]: smg, sglang-router, vllm-router or ray in front of the servers of
# two-servers.sh, on port 30000 (PORT), until Ctrl-C. Sends a prompt where most of it was seen. The first time it is
# installed into an environment of its own, build/routers/NAME.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?smg, sglang-router, vllm-router or ray}
shift
case $name in
    smg | sglang-router | vllm-router) packages=("$name") ;;
    ray) packages=('ray[serve]' pyarrow httpx) ;;
    *) echo "there is no example of $name: smg, sglang-router, vllm-router or ray" >&2 && exit 2 ;;
esac
home=build/routers/$name
[ -x "$home/bin/pip" ] || python3 -m venv "$home"
"$home/bin/pip" show --quiet "${packages[0]%%[*}" 2>/dev/null || "$home/bin/pip" install --quiet "${packages[@]}"
servers=${SERVERS:-http://127.0.0.1:30001 http://127.0.0.1:30002}
read -ra urls <<<"$servers"
options=(--host 127.0.0.1 --port "${PORT:-30000}" --policy cache_aware --worker-urls "${urls[@]}" "$@")
case $name in
    vllm-router) exec "$home/bin/$name" "${options[@]}" ;;
    ray) SERVERS=$servers PORT=${PORT:-30000} exec "$home/bin/python" deploy/ray_router.py ;;
    *) exec "$home/bin/$name" launch "${options[@]}" ;;
esac
