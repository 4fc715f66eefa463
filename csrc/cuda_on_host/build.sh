#!/bin/sh
# Builds test programs of cuda_on_host:  build.sh MODE[,MODE...] [PROGRAM...]  ->  build/cuda_on_host/MODE/PROGRAM
#   plain  optimised
#   asan   AddressSanitizer and UndefinedBehaviorSanitizer
#   race   every access of the kernels goes through the race checker
# Without names: every program of tests/. What has not changed is not built again (rules.mk); ccache is used if it is
# there. Needs make and g++ on x86-64, and neither a CUDA toolkit nor torch.
set -eu
modes=$(echo "$1" | tr , ' ')
shift
cd "$(dirname "$0")"
if [ $# = 0 ]; then
  for source in tests/self_test_*.cpp tests/test_*.cpp; do set -- "$@" "$(basename "$source" .cpp)"; done
fi
targets=''
for mode in $modes; do
  for program in "$@"; do targets="$targets $mode/$program"; done
done
# shellcheck disable=SC2086
exec make -s --no-print-directory -f rules.mk -j "${VICO_COH_JOBS:-$(nproc)}" $targets
