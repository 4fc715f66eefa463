#!/bin/sh
# Every way to install: sdist, wheel from it, `pip install .`, editable, and without build isolation or network.
# Each lands in a fresh environment that borrows torch from the first one, as a user's environment has it.
set -eu
bin=$1
root=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

fresh() {  # name -> an environment that sees the packages of the first one except vico_ext itself
  "$bin/python" -m venv --without-pip "$work/$1"
  target=$("$work/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  for entry in "$site"/*; do
    case $(basename "$entry") in vico_ext*|_vico_ext*|__pycache__) ;; *) ln -s "$entry" "$target/" ;; esac
  done
}
timed() {
  start=$(date +%s); "$@" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  echo "  $(( $(date +%s) - start )) s"
}
works() {
  (cd "$work" && "$work/$1/bin/python" -c 'import torch, vico_ext
assert vico_ext.functional.pixel_shuffle(torch.zeros(1, 17, 4), 2).shape == (1, 4, 16)
print("  imports and runs:", vico_ext.__version__)')
}

git clone --quiet . "$work/clone"
cd "$work/clone"
echo "sdist and wheel:"
timed "$bin/python" -m build --sdist --outdir "$work/dist" .
fresh wheel
timed "$work/wheel/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$work"/dist/*.tar.gz
timed "$work/wheel/bin/python" -m pip install --quiet --no-deps "$work"/dist/*.whl
works wheel
if "$work/wheel/bin/python" -m zipfile -l "$work"/dist/*.whl | grep -E 'csrc|cuda_on_host'; then
  echo "the wheel holds sources or test programs"; exit 1
fi
echo "pip install . (isolated build; under a minute on two cores, without downloading torch):"
fresh plain
timed "$work/plain/bin/python" - "$work/plain/bin/python" -m pip install --no-deps . <<'PY'
# Its processor time, which a busy machine stretches less: two cores' minute holds 120 seconds of it. It was 78 once on
# a quiet machine and 150 on one that was slow at everything: what is over the minute is said, what fails is twice of it.
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
seconds = used.ru_utime + used.ru_stime
print(f"{seconds:.0f} s of processor time")
print("  over its minute, on this machine at this time" if seconds >= 120 else "  within its minute")
assert seconds < 240, "pip install . is far over its minute"
PY
grep 'processor time' "$work/log" | sed 's/^/  /'
if grep -iqE '(download|collect)ing torch' "$work/log"; then echo "pip install . fetched torch"; exit 1; fi
works plain
echo "pip install -e .:"
fresh editable
timed "$work/editable/bin/python" -m pip install --quiet --no-deps -e .
works editable
echo "--no-build-isolation --no-deps, no index:"
fresh offline
"$work/offline/bin/python" -m pip install --quiet --no-deps scikit-build-core pybind11 ninja cmake pathspec packaging
timed env PIP_NO_INDEX=1 PATH="$work/offline/bin:$PATH" "$work/offline/bin/python" -m pip install --quiet \
  --no-build-isolation --no-deps .
works offline
cd "$root"
