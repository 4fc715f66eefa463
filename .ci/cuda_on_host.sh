#!/bin/sh
# The CUDA kernels on the CPU: plain, sanitized and race-checked builds, the harness's own tests, conformance of the
# wrappers, and nvcc if it is there.
#   .ci/cuda_on_host.sh BIN    BIN: the folder of the environment's programs
set -eu
start=$(date +%s)
sh csrc/cuda_on_host/build.sh plain,asan,race
echo "  built: $(($(date +%s) - start)) s"
"$1/pytest" -q --durations=5 python_tests/test_cuda_on_host.py python_tests/test_cuda_conformance.py
total=$(($(date +%s) - start))
echo "  cuda_on_host: $total s of 720"
[ "$total" -le 720 ] || echo "  over its budget of 12 minutes, on this machine at this time"
