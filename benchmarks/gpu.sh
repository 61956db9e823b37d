#!/bin/sh
# All that is to be measured on a GPU, each step apart since each takes minutes; results land in benchmarks/results.
#
#   sh benchmarks/gpu.sh tests      every family on the GPU against the CPU, and the kernels over pages; needs pytest
#   sh benchmarks/gpu.sh kernels    compare the Triton kernels with the formula, then time attention alone
#   sh benchmarks/gpu.sh tiles      time the prefill kernel with many tiles, which is what to choose them from
#   sh benchmarks/gpu.sh model      LLaVA-1.5-7B's shape as a whole, at 89 and 195 tokens, batches of 1, 8 and 32
#   sh benchmarks/gpu.sh encoder    CLIP-L/336 in bfloat16, sizes as a mask and as channels
#   sh benchmarks/gpu.sh layer      one decoder layer from 576 to 30,000 image tokens
#
# It needs triton and what dymu depends on; dymu itself need not be installed. PYTHON names another interpreter.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

case ${1:-} in
tests) TRITON_INTERPRET=0 "$python" -m pytest -q tests/test_gpu.py tests/test_paged.py ;;
kernels) "$python" -m benchmarks.gpu_attention ;;
tiles) "$python" -m benchmarks.gpu_attention --sweep ;;
model)
  "$python" -c 'from dymu.cli.main import main; main()' bench llava-1.5-7b -b 89 -b 195 --batch 1 --batch 8 --batch 32 \
    --backend sdpa --backend triton --repeats 5 --limit 60 -o benchmarks/results/bench-llava-1.5-7b-gpu.json
  ;;
encoder)
  for way in mask channels; do
    "$python" -m benchmarks.encoder clip-l --batches 1,8,32 --dtype bfloat16 --way "$way" --name "encoder_gpu_$way"
  done
  ;;
layer) "$python" -m benchmarks.roofline --name roofline_gpu ;;
*)
  sed -n '2,11p' "$0"
  exit 2
  ;;
esac
