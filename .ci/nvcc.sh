#!/bin/sh
# Compiles every CUDA kernel with nvcc, for all the architectures of a wheel and with warnings as errors, and loads the
# result beside a torch that may well have no CUDA: a CUDA build serves CPU tensors there as any other does.
#   .ci/nvcc.sh BIN    BIN: the folder of the environment's programs
set -eu
bin=$1
build=build/nvcc
start=$(date +%s)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
command -v nvcc >/dev/null || { echo "  no nvcc on the PATH: the CUDA kernels were not compiled"; exit 0; }

[ -x "$bin/cmake" ] && [ -x "$bin/ninja" ] ||
  "$bin/python" -m pip install --quiet --disable-pip-version-check cmake ninja pybind11
PATH="$bin:$PATH" cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$bin/python" -DVICO_EXT_WERROR=ON \
  -DVICO_EXT_CUDA=ON >/dev/null
PATH="$bin:$PATH" cmake --build "$build" >"$work/log" || { tail -40 "$work/log"; exit 1; }
cp -r vico_ext "$work/vico_ext"
rm -f "$work"/vico_ext/*.so
cp "$build"/_C*.so "$work/vico_ext/"
(cd "$work" && PYTHONPATH="$work" "$bin/python" -c 'import torch, vico_ext
from vico_ext import _C
assert "90" in _C.cuda, _C.cuda
assert vico_ext.functional.pixel_shuffle(torch.zeros(1, 17, 4), 2).shape == (1, 4, 16)
print("  built for", _C.cuda, "and runs on the CPU")')
du -h "$build"/_C*.so | cut -f1 | sed 's/^/  size of the module: /'
echo "  nvcc: $(($(date +%s) - start)) s"
