#!/bin/sh
# Builds test programs of cuda_on_host:  build.sh MODE PROGRAM...  ->  build/cuda_on_host/MODE/PROGRAM
#   plain  optimised
#   asan   AddressSanitizer and UndefinedBehaviorSanitizer
#   race   every access of the kernels goes through the race checker
# Needs g++ on x86-64 and nothing else: no CUDA toolkit, no torch.
set -eu
mode=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
out=$(cd "$here/../.." && pwd)/build/cuda_on_host/$mode
mkdir -p "$out"
common="-std=c++17 -g -I$here/.. -Wall -Wextra -Werror -Wno-psabi -Wno-unknown-pragmas -ffp-contract=off"
runtime='' link=''
case $mode in
  plain) flags='-O2' kernel='' ;;
  asan)
    flags='-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined' kernel=''
    link=$flags
    ;;
  race)
    flags='-O1' kernel='-fno-threadsafe-statics -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -Wno-tsan'
    runtime='clocks race'
    ;;
  *) echo "build.sh: no mode $mode: plain, asan or race" >&2; exit 2 ;;
esac

newest=$(find "$here" "$here/../common" "$here"/../*/ -maxdepth 2 \( -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -printf '%T@\n' |
  sort -n | tail -1)
stale() {  # object source: whether the object is missing or older than its source or any header
  [ ! -e "$1" ] || [ "$2" -nt "$1" ] || [ "$(printf '%s\n%s\n' "$newest" "$(stat -c %.10Y "$1")" | sort -n | tail -1)" = "$newest" ]
}
compile() { stale "$2" "$1" || return 0; shift_flags=$3; echo "g++ $common $flags $shift_flags -x c++ -c $1 -o $2"; }

objects=''
jobs=$(
  for name in fiber schedule sync shared_memory bulk_copy matrix $runtime; do
    compile "$here/$name.cpp" "$out/$name.o" ''
  done
  for program in "$@"; do
    for source in "$here/tests/$program.cpp" "$here/$program.cu"; do
      [ ! -e "$source" ] || compile "$source" "$out/$program.o" "$kernel"
    done
  done
)
[ -z "$jobs" ] || printf '%s\n' "$jobs" | xargs -P "$(nproc)" -I{} sh -c '{} || exit 255'
for name in fiber schedule sync shared_memory bulk_copy matrix $runtime; do objects="$objects $out/$name.o"; done
for program in "$@"; do
  # shellcheck disable=SC2086
  [ "$out/$program" -nt "$out/$program.o" ] || g++ -no-pie $link $objects "$out/$program.o" -o "$out/$program"
done
