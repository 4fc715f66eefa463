#!/bin/sh
# The InternVL tests against transformers 4.57, in an environment that borrows everything else from the first one.
set -eu
bin=$1
venv=$PWD/build/transformers457
rm -rf "$venv"
"$bin/python" -m venv --without-pip "$venv"
site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
target=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own='transformers|huggingface_hub|tokenizers'
for entry in "$site"/*; do
  printf '%s' "$(basename "$entry")" | grep -qE "^($own)(-|$)" || ln -s "$entry" "$target/"
done
# What is borrowed must stay as it is: pip would uninstall through the links.
"$bin/python" -m pip list --disable-pip-version-check --format=freeze |
  grep -vE '^(transformers|huggingface[_-]hub|tokenizers|vico[_-]ext)==' >"$venv/borrowed.txt"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$venv/borrowed.txt" 'transformers==4.57.*'
"$venv/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
cd python_tests  # away from the sources, which have no compiled ops
"$venv/bin/python" -m pytest -q -p no:cacheprovider test_internvl*.py test_convert.py
