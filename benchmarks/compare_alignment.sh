#!/usr/bin/env bash
# compare_alignment.sh phones|selectors|codes [OPTION ...]: compare where alignment goes, on the demo's recordings by the
# preset demo-long. An arm takes five to seven minutes on a CPU core (OMP_NUM_THREADS=1, two side by side); the same command
# goes on after an interruption. Runs and reports go to runs/compare-NAME. OPTION: of `agrepa compare`, --dry-run for one.
#
#   phones     FoG-A's layers by hard and soft choice, at total weights 0.1, 0.3 and 1, by time-means and by frames, beside
#              the first layers; tokens of speech are phones, which carry the words: 9 arms
#   selectors  the other ways to choose layers, likewise: 6 arms
#   codes      selectors, weight 1 and frames; tokens are 32 codes, and half of the clips train without them, so that a
#              teacher has more to add: 5 arms
#
# The preset's clips of 8 s allow no batch below 1600 frames: clips of up to 4.5 s and 800 frames let three seeds finish.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?one of phones, selectors, codes}
shift
agrepa=agrepa
[ -x .venv/bin/agrepa ] && agrepa=.venv/bin/agrepa

path=data/short
[ "$name" = codes ] && path=data/codes
settings=(data.path="$path" data.max_seconds=4.5 'data.bucket_seconds=[1.5,2.0,3.0]' data.teacher_rate=12.5)
metrics=('metrics.only=[wer,mos,mel]')
case $name in
phones)
  arms=(--strategies none,foga,shallow --strategies foga-soft:align.strategy=foga,align.choice=soft)
  for weight in 0.1 1; do
    arms+=(--strategies "foga-weight-$weight:align.strategy=foga,align.weight=$weight")
  done
  for weight in 0.1 0.3 1; do
    arms+=(--strategies "frames-weight-$weight:align.strategy=foga,align.objective=frames,align.weight=$weight")
  done
  ;;
selectors)
  arms=(--strategies none,middle,deep,random,lasp,gradnorm)
  ;;
codes)
  settings+=(data.speech_tokens=kmeans data.codebook=32)
  metrics=('metrics.only=[mos,mel]') # 32 codes carry no words
  arms=(--strategies none,foga,shallow --strategies foga-weight-1:align.strategy=foga,align.weight=1
    --strategies foga-frames:align.strategy=foga,align.objective=frames)
  ;;
*)
  echo "compare_alignment.sh: $name: one of phones, selectors, codes" >&2
  exit 2
  ;;
esac

[ -f "$path/index.json" ] || "$agrepa" prepare demo --preset demo-long "${settings[@]}"
[ "$name" = codes ] && settings+=(flow.drop_tokens=0.5)
# align.bitc_*: lasp asks BiT-C's projections. Their optimizer is AdamW, so a small weight trains them as well.
exec "$agrepa" compare --out "runs/compare-$name" --seeds 0,1,2 "${arms[@]}" --preset demo-long --warmup 300 \
  "${settings[@]}" align.weight=0.3 align.bitc_speech=0.1 align.bitc_audio=0.1 train.batch_frames=800 train.steps=550 \
  train.val_every=250 train.save_every=550 eval.clips=6 flow.steps=8 \
  probe.storage_clips=16 "${metrics[@]}" metrics.clips=12 "$@"
