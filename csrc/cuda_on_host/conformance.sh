#!/bin/sh
# What every wrapper of the kernels does with given bits, as a safetensors file (docs/cuda_on_host.md):
#   conformance.sh record [FILE]   on a GPU (sm_90): writes the golden file that the host bodies are held to
#   conformance.sh host FILE       on the CPU, under cuda_on_host
#   conformance.sh check           on a GPU: what it does is what the golden file says, and both are as documented
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
golden=$root/python_tests/golden/cuda_conformance.safetensors
out=$root/build/cuda_on_host

on_gpu() {
  mkdir -p "$out"
  "${NVCC:-nvcc}" -std=c++17 -O2 -gencode=arch=compute_90a,code=sm_90a -I"$root/csrc" \
    "$here/conformance/conformance.cu" -o "$out/conformance_gpu"
  "$out/conformance_gpu" "$1.partial" || { echo "what did not fail is in $1.partial" >&2; return 1; }
  mv "$1.partial" "$1"
}

case ${1:-} in
  record) on_gpu "${2:-$golden}" ;;
  host)
    sh "$here/build.sh" plain conformance
    "$out/plain/conformance" "$2"
    ;;
  check)
    on_gpu "$out/gpu.safetensors"
    VICO_CONFORMANCE=$out/gpu.safetensors "${PYTHON:-python3}" -m pytest -q -c "$root/pyproject.toml" \
      "$root/python_tests/test_cuda_conformance.py"
    ;;
  *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac
