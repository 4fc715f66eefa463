#!/bin/sh
# Rules that no linter knows: torch headers stay in the op doors, kernels stay torch-free, files stay readable.
set -u
bad=0
say() { printf '%s\n%s\n' "$1" "$2"; bad=1; }

torchy=$(grep -rlE '#include *<(torch|ATen|c10)/' csrc |
  grep -vE '(_op\.cpp|^csrc/registration\.cpp|^csrc/door/[a-z_]+\.(h|cpp))$')
[ -n "$torchy" ] && say 'torch headers outside the op doors:' "$torchy"

unstable=$(grep -rnE '#include *<(ATen|c10)/|#include *<torch/(extension|torch|library)\.h>' csrc)
[ -n "$unstable" ] && say 'headers outside the stable ABI:' "$unstable"

# Every source but the wrappers' own: macros, inline assembly in any spelling, shared memory that is not VICO_SHARED.
bare=$(grep -rnE '(^|[^A-Za-z0-9_])(asm|__asm|__asm__)([^A-Za-z0-9_]|$)|__shared__' csrc \
    --include='*.cu' --include='*.cuh' --include='*.cpp' --include='*.h' |
  grep -vE '^csrc/(common|cuda_on_host)/' | grep -vE '^[^:]*:[0-9]*: *//')
[ -n "$bare" ] && say 'bare asm or __shared__ outside the wrappers:' "$bare"

pickled=$(grep -rnE 'torch\.load\(|import pickle|pickle\.loads?\(' vico_ext examples)
[ -n "$pickled" ] && say 'something is unpickled:' "$pickled"

long=$(git ls-files 'csrc/*' 'vico_ext/*' 'examples/*' 'python_tests/*' 'bench/*' | grep -E '\.(py|h|hpp|cc|cpp|cu|cuh)$' |
  xargs wc -l | awk '$2 != "total" && $1 > 500 {print $1, $2}')
[ -n "$long" ] && say 'files over 500 lines:' "$long"

exit $bad
