#!/bin/sh
# Everything a machine with a GPU is for, in nine minutes: build; conformance of the PTX wrappers, the whole test suite
# with CUDA required and compute-sanitizer, all at a time; then, alone, benchmarks. Results go to bench/results/ (and to
# $OUT where that is set), a summary comes last. Needs python3 with torch >= 2.11 for CUDA, pytest, hypothesis, pybind11, cmake and ninja, nvcc; no network.
#
#   sh bench/gpu/run.sh              all of it
#   VICO_GPU_BUILD=DIR sh ...        takes DIR/_C*.so, built for this Python, instead of building
#   DEVICE=cpu sh ...                the same steps without a GPU, tiny: does this script work?
#   STEPS="build bench" sh ...       only these: build conformance tests memcheck racecheck alone bench
set -u
cd "$(dirname "$0")/../.."
root=$(pwd)
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
steps=${STEPS:-build conformance tests memcheck racecheck alone bench}
results=${RESULTS:-$root/bench/results}
package=$root/build/gpu/package
seconds=${SECONDS_IN_ALL:-530}
start=$(date +%s)
logs=$root/build/gpu/logs
mkdir -p "$logs" "$results"
summary=$logs/summary.txt
failed=$logs/failed
rm -f "$failed"

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, and never past the end of the nine minutes
step() {
  name=$1 limit=$2
  shift 2
  case " $steps " in *" $name "*) ;; *) return ;; esac
  left=$((start + seconds - $(date +%s)))
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -le 5 ]; then
    printf '%-12s NOT RUN: no time left\n' "$name" >>"$summary"
    touch "$failed"
    return
  fi
  echo "=== $name (at most $limit s)"
  began=$(date +%s)
  timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  took=$(($(date +%s) - began))
  case $code in
    0) verdict=ok ;;
    124 | 137) verdict='FAILED: out of time' ;;
    *) verdict="FAILED: exit $code" ;;
  esac
  [ "$code" = 0 ] || touch "$failed"
  printf '=== %s: %s\n%s\n' "$name" "$verdict" "$(tail -n 15 "$logs/$name.log")"
  printf '%-12s %s, %d s: %s\n' "$name" "$verdict" "$took" "$(tail -n 1 "$logs/$name.log" | cut -c1-150)" >>"$summary"
}

build() {
  if [ -n "${VICO_GPU_BUILD:-}" ]; then
    from=$VICO_GPU_BUILD
  else
    from=$root/build/gpu/cmake
    mode=ON
    [ "$device" = cuda ] || mode=HOST
    cmake -S . -B "$from" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DVICO_EXT_CUDA=$mode &&
      cmake --build "$from" || return 1
  fi
  rm -rf "$package" && mkdir -p "$package" && cp -r vico_ext "$package/" && rm -f "$package"/vico_ext/*.so &&
    cp "$from"/_C*.so "$package/vico_ext/" &&
    (cd "$package" && "$python" -c 'from vico_ext import _C; print("built for", _C.cuda)')
}
conformance() {
  if [ ! -e csrc/cuda_on_host/conformance.sh ]; then echo "no conformance program in this version"; return 1; fi
  if [ "$device" = cuda ]; then sh csrc/cuda_on_host/conformance.sh record; else sh -n csrc/cuda_on_host/conformance.sh; fi
}
workers() {  # options that spread tests over processes, where pytest-xdist is there
  count=$(nproc)
  [ "$count" -le 12 ] || count=12
  "$python" -c 'import xdist' 2>/dev/null && echo "-n ${WORKERS:-$count} --dist worksteal"
}
tests() {
  cd python_tests || return 1
  what=.
  [ "$device" = cuda ] || what='test_doors.py test_pixel_shuffle.py'
  # shellcheck disable=SC2046,SC2086
  "$python" -m pytest -v -p no:cacheprovider --tb=short --durations=10 $(workers) $what
}
alone() {  # what needs the GPU for itself
  cd python_tests || return 1
  if [ "$device" != cuda ]; then "$python" -m pytest -q --collect-only test_cuda.py -k all_memory; return; fi
  "$python" -m pytest -q -p no:cacheprovider test_cuda.py -k all_memory
}
sanitize() {
  cd python_tests || return 1
  # racecheck ends in an error of its own in the tests that use cuBLAS.
  [ "$1" = memcheck ] && which=bit_equal || which='bit_equal and not (torch or True or consistency)'
  if [ "$device" != cuda ]; then "$python" -m pytest -q --collect-only test_cuda.py -k "$which"; return; fi
  tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --error-exitcode 9 --kernel-name kns=vico "$python" -m pytest -q \
    -p no:cacheprovider test_cuda.py -k "$which"
}
bench() {
  options=''
  [ "$device" = cuda ] || options='--smoke'
  # shellcheck disable=SC2086
  "$python" bench/gpu/measure.py --device "$device" --out "$results/gpu.json" --seconds "$(($1 - 15))" $options
}

case ${1:-} in  # a step's own process
  build | conformance | tests | alone) "$1"; exit ;;
  memcheck | racecheck) sanitize "$1"; exit ;;
  bench) bench "$2"; exit ;;
esac

: >"$summary"
export VICO_TEST_DEVICE="$device" PYTHONPATH="$package${PYTHONPATH:+:$PYTHONPATH}" DEVICE="$device" RESULTS="$results"
me=$root/bench/gpu/run.sh
step build 170 sh "$me" build
step conformance 90 sh "$me" conformance &
step memcheck 90 sh "$me" memcheck &
step racecheck 90 sh "$me" racecheck &
step tests 200 sh "$me" tests &
wait
step alone 30 sh "$me" alone
left=$((start + seconds - $(date +%s)))
step bench "$left" sh "$me" bench "$left"

[ ! -e "$results/gpu.json" ] || "$python" bench/report.py --show-gpu "$results/gpu.json" || touch "$failed"
if [ -n "${OUT:-}" ]; then
  tar -czf "$OUT/logs.tar.gz" -C "$logs" . || touch "$failed"
  [ ! -e "$results/gpu.json" ] || cp "$results/gpu.json" "$OUT/" || touch "$failed"
  for golden in python_tests/golden/*onformance*; do [ ! -e "$golden" ] || cp "$golden" "$OUT/" || touch "$failed"; done
fi
echo "=== summary: $(($(date +%s) - start)) s"
cat "$summary"
[ ! -e "$failed" ]
