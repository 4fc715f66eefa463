#!/bin/sh
# The op tests through the doors and the CUDA kernels, without a GPU: VICO_EXT_CUDA=HOST builds the extension so that CPU
# tensors go to the CUDA kernels, run by csrc/cuda_on_host.
#   .ci/cuda_host_doors.sh BIN    BIN: the folder of the environment's programs
set -eu
bin=$1
build=build/cuda_host
start=$(date +%s)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

[ -x "$bin/cmake" ] && [ -x "$bin/ninja" ] ||
  "$bin/python" -m pip install --quiet --disable-pip-version-check cmake ninja pybind11
launcher=''
command -v ccache >/dev/null && launcher=-DCMAKE_CXX_COMPILER_LAUNCHER=ccache
PATH="$bin:$PATH" cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$bin/python" -DVICO_EXT_WERROR=ON \
  -DVICO_EXT_CUDA=HOST $launcher >/dev/null
PATH="$bin:$PATH" cmake --build "$build" >"$work/log" || { tail -40 "$work/log"; exit 1; }
cp -r vico_ext "$work/vico_ext"
rm -f "$work"/vico_ext/*.so
cp "$build"/_C*.so "$work/vico_ext/"
echo "  built: $(($(date +%s) - start)) s"

cp -r python_tests pyproject.toml "$work/"
cd "$work/python_tests"  # away from the sources, which have no compiled ops
export PYTHONPATH="$work"
"$bin/python" -c 'from vico_ext import _C; assert _C.cuda == "host", _C.cuda'
# opcheck, compile and export exercise torch rather than the kernels. Two halves side by side, for two cores.
half() {
  OMP_NUM_THREADS=1 "$bin/python" -m pytest -q -x -p no:cacheprovider --basetemp="$work/tmp-$1" --durations=3 "$@" \
    -k 'not (compile or export or opcheck or distributed or copies or peak_memory or keeps_the_mean)'
}
half test_doors.py test_pixel_shuffle.py test_normalized_shuffle.py test_bias_gelu.py test_pack_tokens.py \
  test_routing_plan.py test_merge_tokens.py test_tokens.py test_projection.py test_shuffled_projection.py >"$work/first" 2>&1 &
first=$!
bad=0
half test_attention_pool.py test_skinny_linear.py test_compress_sequence.py test_connector.py test_router.py \
  test_consistency.py test_consistency_kernels.py test_connect.py test_folded_connector.py || bad=1
wait $first || bad=1
cat "$work/first"
echo "  cuda_host_doors: $(($(date +%s) - start)) s"
exit $bad
