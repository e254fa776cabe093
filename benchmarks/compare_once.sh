#!/usr/bin/env bash
# compare_once.sh [SECONDS [OPTION ...]]: `compare_alignment.sh weights` within SECONDS (570), on a machine with one GPU.
#
# The machine needs this checkout and either its virtual environment, .venv, with compare_alignment.sh's shards in data/short
# (34 MB), or the pack of `SHARDS=data/short benchmarks/gpu_once.sh` in .gpu_once/. No network, and no model of a metric:
# what is measured is the validation flow loss and the distance of mels. SHARDS, in the environment: those in another
# folder, and not a pack's. Seeds follow each other, and in each the baseline,
# FoG-A and its frames come first, so that every run that has finished at the limit has its partner. $OUT
# (runs/compare_once) gets the report, the tables, and the settings, curves and choices of each run, without weights and
# sound. OPTION: of `agrepa compare`. WARMUP, STEPS: of a branch's whole training, in the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-570}
shift || true
out=${OUT:-runs/compare_once}
warmup=${WARMUP:-300} steps=${STEPS:-1500}
mkdir -p "$out"
out=$(realpath "$out") # keep() leaves this folder
rm -f "$out"/{report.md,compare.csv,differences.csv,plan.json,compare.tar.gz} # of an earlier call
work=$(mktemp -d)
shards=${SHARDS:-data/short}
if [ -z "${SHARDS:-}" ] && [ -f .gpu_once/once.tar.gz ]; then
  tar -xzf .gpu_once/once.tar.gz -C "$work"
  export PYTHONPATH=$work/site TRITON_CACHE_DIR=$work/triton PYTHON=python3
  shards=$work/demo
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

keep() {
  cd "$work/compare"
  cp -f report.md compare.csv differences.csv plan.json "$out/" 2>/dev/null || true
  find . \( -name checkpoints -o -name wavs -o -name samples \) -prune -o -type f -size -1000k -print0 |
    tar --null -czf "$work/compare.tar.gz" -T -
  cd "$OLDPWD"
  mv "$work/compare.tar.gz" "$out/"
  rm -rf "$work"
}
mkdir -p "$work/compare"
trap keep EXIT

set +e
SHARDS=$(realpath "$shards") timeout --kill-after=45 $((seconds - 60)) benchmarks/compare_alignment.sh weights \
  --out "$work/compare" --warmup "$warmup" train.steps="$steps" train.val_every=250 train.save_every="$steps" \
  'metrics.only=[mel]' eval.vocoder=griffin-lim "$@" 2>&1 | tee "$out/log.txt"
code=${PIPESTATUS[0]}
case $code in
124 | 137)
  [ -f "$work/compare/report.md" ] || { echo "compare_once.sh: stopped at the limit, before a pair of runs had finished" >&2 && exit 1; }
  echo "compare_once.sh: stopped at the limit; the table has what had finished"
  ;;
*) exit "$code" ;;
esac
