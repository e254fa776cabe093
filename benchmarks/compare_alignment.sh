#!/usr/bin/env bash
# compare_alignment.sh phones|weights|codes [OPTION ...]: compare where alignment goes, on the demo's recordings by the
# preset demo-long. An arm takes three to seven minutes on a CPU core (OMP_NUM_THREADS=1, two side by side). The same
# command goes on after an interruption. Runs and reports go to runs/compare-NAME. OPTION: of `agrepa compare`, such as
# --dry-run. SHARDS, in the environment: where the shards are or will be, instead of data/short or data/codes.
#
#   phones   all ways to choose layers, by time-means; FoG-A's by soft choice, too, and four of them by frames as well;
#            tokens of speech are phones, which carry the words: 13 arms
#   weights  these, and total weights of 0.1 and 1 by time-means and by frames, in the same folder: 4 more arms
#   codes    three selectors, weight 1 and frames; tokens are 32 codes, and half of the clips train without them, so
#            that a teacher has more to add: 5 arms
#
# The preset's clips of 8 s allow no batch below 1600 frames: with clips of up to 4.5 s and 800 frames, three seeds end.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?one of phones, weights, codes}
shift
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python

path=data/short
[ "$name" = codes ] && path=data/codes
path=${SHARDS:-$path}
settings=(data.path="$path" data.max_seconds=4.5 'data.bucket_seconds=[1.5,2.0,3.0]' data.teacher_rate=12.5)
metrics=('metrics.only=[wer,mos,mel]')
out=runs/compare-$name
frames=align.objective=frames
case $name in
phones | weights)
  out=runs/compare-phones
  arms=(--strategies none,foga --strategies "frames-weight-0.3:align.strategy=foga,$frames"
    --strategies shallow,middle,deep,random,lasp,gradnorm --strategies foga-soft:align.strategy=foga,align.choice=soft)
  for strategy in middle deep lasp; do
    arms+=(--strategies "frames-$strategy:align.strategy=$strategy,$frames")
  done
  weights=()
  [ "$name" = phones ] || weights=(0.1 1)
  for weight in "${weights[@]}"; do
    arms+=(--strategies "foga-weight-$weight:align.strategy=foga,align.weight=$weight")
    arms+=(--strategies "frames-weight-$weight:align.strategy=foga,$frames,align.weight=$weight")
  done
  ;;
codes)
  settings+=(data.speech_tokens=kmeans data.codebook=32)
  metrics=('metrics.only=[mos,mel]') # 32 codes carry no words
  arms=(--strategies none,foga,shallow --strategies foga-weight-1:align.strategy=foga,align.weight=1
    --strategies "frames-weight-0.3:align.strategy=foga,$frames")
  ;;
*)
  echo "compare_alignment.sh: $name: one of phones, weights, codes" >&2
  exit 2
  ;;
esac

[ -f "$path/index.json" ] || "$python" -m agrepa_fast.cli prepare demo --preset demo-long "${settings[@]}"
[ "$name" = codes ] && settings+=(flow.drop_tokens=0.5)
# align.bitc_*: lasp asks BiT-C's projections. Their optimizer is AdamW, so a small weight trains them as well.
exec "$python" -m agrepa_fast.cli compare --out "$out" --seeds 0,1,2 "${arms[@]}" --preset demo-long --warmup 300 \
  "${settings[@]}" align.weight=0.3 align.bitc_speech=0.1 align.bitc_audio=0.1 train.batch_frames=800 train.steps=550 \
  train.val_every=250 train.save_every=550 eval.clips=6 flow.steps=8 \
  probe.storage_clips=16 "${metrics[@]}" metrics.clips=12 "$@"
