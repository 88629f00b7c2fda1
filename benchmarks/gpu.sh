#!/usr/bin/env bash
# Everything that needs a GPU, in one command and in well under 9 minutes: the native kernel tests, then the gpu-layer tables.
# Needs torch, triton, transformers, pytest and numpy only; nothing is installed. Rows go to benchmarks/results/gpu-layer.csv.
# With OUT set, that file and the logs are copied there. TUNE=1 tunes block sizes instead (about 8 minutes) and writes kernels/tuned/.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
python=${PYTHON:-python3}
out=${OUT:-$(mktemp -d)}

"$python" - <<'EOF' || exit 1
import torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
EOF

if [ "${TUNE:-0}" = 1 ]; then
  timeout 540 "$python" benchmarks/run.py tune-kernels 2>&1 | tee "$out/tune.log" | tail -20
  status=${PIPESTATUS[0]}
  cp -r kernels/tuned benchmarks/results/tune-kernels.csv "$out/"
  exit "$status"
fi

echo "== native kernel tests"
timeout 200 "$python" -m pytest -q -x -p no:cacheprovider -o addopts= -o filterwarnings= \
  --ignore tests/kernels/test_kernel_resources.py tests/kernels tests/test_layer_compile.py 2>&1 | tee "$out/tests.log" | tail -15
tests=${PIPESTATUS[0]}

echo "== gpu-layer"
timeout 420 "$python" benchmarks/run.py gpu-layer --repeats "${REPEATS:-12}" 2>&1 | tee "$out/gpu-layer.log" | tail -80
bench=${PIPESTATUS[0]}

[ -f benchmarks/results/gpu-layer.csv ] && cp benchmarks/results/gpu-layer.csv "$out/"
echo "tests: $tests, gpu-layer: $bench"
exit $((tests || bench))
