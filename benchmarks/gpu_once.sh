#!/usr/bin/env bash
# gpu_once.sh [TRITON_CACHE]: pack what a bare GPU machine lacks into .gpu_once/, and print the one command to run there.
#
# Such a machine has Linux on x86-64, Python 3.12, PyTorch 2.11 for CUDA, Triton 3.6, pytest, matplotlib, tensorboard and
# no network. It gets this checkout, with .gpu_once/. The pack holds the other packages, as installed in this environment,
# and the demo's shards, which are made if data/demo has none. SHARDS, in the environment: pack these shards instead, of
# compare_alignment.sh, and print the command of compare_once.sh. TRITON_CACHE: compiled kernels of an earlier visit
# (triton.tar.gz among its results, unpacked) or of another machine with the same Python and Triton.
set -euo pipefail
cd "$(dirname "$0")/.."
shards=${SHARDS:-data/demo}
[ -n "${SHARDS:-}" ] || [ -f data/demo/index.json ] || agrepa prepare demo

pure="deepspeed hjson pydantic annotated-types typing-inspection typing-extensions webdataset braceexpand tenacity"
pure="$pure soundfile pycparser pytest-xdist execnet"
pure="$pure f5-tts x-transformers einops einx frozendict torch-einops-utils loguru"  # part fuse
compiled="pydantic-core cffi"  # for the GPU machine's Python, not for this one
rm -rf .gpu_once
mkdir -p .gpu_once/site
python - .gpu_once/site $pure <<'PY'
"""Copy installed packages into a folder."""
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

folder, *names = sys.argv[1:]
for file in (file for name in names for file in distribution(name).files):
    if ".." not in file.parts and "__pycache__" not in file.parts and (source := Path(file.locate())).is_file():
        target = Path(folder, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
PY
versions=$(python -c "import sys; from importlib.metadata import version
print(*(f'{name}=={version(name)}' for name in sys.argv[1:]))" $compiled)
# shellcheck disable=SC2086 # several words
python -m pip install -q --no-deps --no-compile --only-binary=:all: --target .gpu_once/site --upgrade \
  --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 $versions
cp -r "$shards" .gpu_once/demo
mkdir -p .gpu_once/triton
[ $# -eq 0 ] || cp -r "$1/." .gpu_once/triton
tar -czf .gpu_once.tar.gz -C .gpu_once site demo triton
rm -rf .gpu_once && mkdir .gpu_once && mv .gpu_once.tar.gz .gpu_once/once.tar.gz

megabytes=$(( ($(git ls-files -z | du -c --files0-from=- -b | tail -n 1 | cut -f1) + $(stat -c %s .gpu_once/once.tar.gz)) / 2**20 ))
[ "$megabytes" -lt 64 ] || { echo "gpu_once.sh: checkout and pack have $megabytes MB, more than 64" >&2; exit 1; }
echo "checkout and pack: $megabytes MB. In the checkout's root on the GPU machine, with the results in \$OUT:" >&2
if [ -n "${SHARDS:-}" ]; then
  echo "AGREPA_COMMIT=$(git rev-parse --short HEAD) benchmarks/compare_once.sh"
  exit
fi
cat <<RUN
set -o pipefail; export OUT=\${OUT:-runs/gpu_suite} AGREPA_COMMIT=$(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo -dirty); \
once=\$(mktemp -d) && mkdir -p \$OUT && tar -xzf .gpu_once/once.tar.gz -C \$once && \
export PYTHONPATH=\$once/site TRITON_CACHE_DIR=\$once/triton PYTHONUNBUFFERED=1 && \
python3 benchmarks/gpu_suite.py --shards \$once/demo --out \$OUT 2>&1 | tee \$OUT/log.txt; code=\$?; \
tar -czf \$OUT/triton.tar.gz -C \$once/triton . ; exit \$code
RUN
