#!/usr/bin/env bash
# compare_alignment.sh phones|codes|weights [OPTION ...]: compare where alignment goes, on the demo's recordings by the
# preset demo-long. Each takes one to two hours on a CPU core (OMP_NUM_THREADS=1, two side by side); the same command goes
# on after an interruption. Runs and reports go to runs/compare-NAME. OPTION: of `agrepa compare`, --dry-run for one.
#
#   phones   all selectors; tokens of speech are phones, which carry the words
#   codes    selectors, weight 1 and frames; tokens are 32 codes, and half of the clips train without them, so that a
#            teacher has more to add
#   weights  FoG-A's layers at total weights 0.1, 0.3 and 1, time-means and frames; phones
#
# The preset's clips of 8 s allow no batch below 1600 frames: clips of up to 4.5 s and 800 frames let three seeds finish.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?one of phones, codes, weights}
shift
agrepa=agrepa
[ -x .venv/bin/agrepa ] && agrepa=.venv/bin/agrepa

path=data/short
[ "$name" = codes ] && path=data/codes
settings=(data.path="$path" data.max_seconds=4.5 'data.bucket_seconds=[1.5,2.0,3.0]' data.teacher_rate=12.5)
metrics=('metrics.only=[wer,mos,mel]')
case $name in
phones)
  arms=(--strategies none,foga,shallow --strategies foga-soft:align.strategy=foga,align.choice=soft
    --strategies deep,lasp,random,middle,gradnorm)
  ;;
codes)
  settings+=(data.speech_tokens=kmeans data.codebook=32)
  metrics=('metrics.only=[mos,mel]') # 32 codes carry no words
  arms=(--strategies none,foga,shallow --strategies foga-weight-1:align.strategy=foga,align.weight=1
    --strategies foga-frames:align.strategy=foga,align.objective=frames)
  ;;
weights)
  arms=(--strategies none)
  for objective in pooled frames; do
    for weight in 0.1 0.3 1; do
      arms+=(--strategies "$objective-$weight:align.strategy=foga,align.objective=$objective,align.weight=$weight")
    done
  done
  ;;
*)
  echo "compare_alignment.sh: $name: one of phones, codes, weights" >&2
  exit 2
  ;;
esac

[ -f "$path/index.json" ] || "$agrepa" prepare demo --preset demo-long "${settings[@]}"
[ "$name" = codes ] && settings+=(flow.drop_tokens=0.5)
# align.bitc_*: lasp asks BiT-C's projections. Their optimizer is AdamW, so a small weight trains them as well.
exec "$agrepa" compare --out "runs/compare-$name" --seeds 0,1,2 "${arms[@]}" --preset demo-long --warmup 300 \
  "${settings[@]}" align.weight=0.3 align.bitc_speech=0.1 align.bitc_audio=0.1 train.batch_frames=800 train.steps=550 \
  train.val_every=250 train.save_every=550 eval.clips=6 "${metrics[@]}" metrics.clips=12 "$@"
