#!/usr/bin/env bash
# Train the embedded models anew, part by part: scripts/train_tiny.sh DIR. The model folders are DIR/tiny and, having
# learned its guidance, DIR/tiny-fast/model. Two cores need about ten hours; each part is resumed by running this again.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install "" run

out="${1:?give a folder for checkpoints, such as /tmp/tiny}"
# Large tensors come and go in each step: keep glibc from giving their pages back (1.5x faster steps).
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=200000000
compile=""
if command -v g++ >/dev/null; then compile="--compile"; fi
for part in vae decoder text latents dit; do
    "$bin/longvid" train "$part" --out "$out" --resume $compile
done
[ -d "$out/tiny" ] || "$bin/longvid" train pack --out "$out" --model "$out/tiny"
[ -d "$out/tiny-fast/model" ] ||
    "$bin/longvid" train dit --out "$out/tiny-fast" --model "$out/tiny" --data "$out/latents" --resume $compile \
        --teacher-guidance 3 --method rolling-fast --steps 800 --optimizer muon --learning-rate 1e-3 \
        --lr-warmup-steps 20 --ema-decay 0.98 --opening-share 0.25
