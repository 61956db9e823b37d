#!/usr/bin/env bash
# Starts a server of the demo model, asks it, and ends it: `examples/serve.sh` or `examples/serve.sh vllm`.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v dymu >/dev/null || PATH=$PWD/.venv/bin:$PATH # of `make setup`; another environment must be active
server=${1:-serve} port=${PORT:-8123}
flags=(models/demo -b 0.3 --port "$port" --dtype float32)
if [ "$server" = vllm ]; then
  flags+=(--max-model-len 1024 --enforce-eager)
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB, where vLLM runs on a CPU
fi
dymu "$server" "${flags[@]}" &
trap 'kill $!' EXIT
until curl -fsS "http://127.0.0.1:$port/health" >/dev/null 2>&1; do
  kill -0 $! || exit 1
  sleep 1
done
python examples/client.py "http://127.0.0.1:$port/v1"
