#!/bin/sh
# The op tests under AddressSanitizer and UBSan: the extension is built with both (for the baseline instruction set, which
# the ordinary test run does not take where AVX2 is to be had), Python itself is not.
set -eu
bin=$1
build=build/sanitize
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$bin/python" -m pip install --quiet --disable-pip-version-check cmake ninja pybind11
PATH="$bin:$PATH" cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$bin/python" -DVICO_EXT_WERROR=ON \
  -DVICO_EXT_BASELINE_ONLY=ON -DVICO_EXT_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=None >/dev/null
PATH="$bin:$PATH" cmake --build "$build" >/dev/null
cp -r vico_ext "$work/vico_ext"
rm -f "$work"/vico_ext/*.so
PATH="$bin:$PATH" cmake --install "$build" --prefix "$work" >/dev/null

cp -r python_tests pyproject.toml "$work/"
cd "$work"  # away from the sources, which have no compiled ops

preload=$(c++ -print-file-name=libasan.so):$(c++ -print-file-name=libstdc++.so)
# leaks: Python and torch keep memory to the end of the process on purpose
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
export PYTHONPATH="$work"
LD_PRELOAD="$preload" "$bin/python" - <<'PY'
import vico_ext, vico_ext._C as c
assert c.cpu_arch() == "baseline", c.cpu_arch()
print("sanitized ops from", vico_ext.__path__[0].split("/")[-1], c.cpu_arch())
PY
cd "$work/python_tests"
# opcheck, compile and export exercise torch rather than the kernels, and are slow under the sanitizers
ATEN_CPU_CAPABILITY=default LD_PRELOAD="$preload" "$bin/python" -m pytest -q -x -p no:cacheprovider \
  test_pixel_shuffle.py test_normalized_shuffle.py test_bias_gelu.py test_pack_tokens.py test_attention_pool.py \
  test_skinny_linear.py test_routing_plan.py test_merge_tokens.py test_compress_sequence.py test_tokens.py test_connector.py test_router.py \
  test_connect.py test_shuffled_projection.py test_consistency_kernels.py \
  -k 'not compile and not export and not opcheck and not distributed and not copies'
