#!/usr/bin/env bash
# Everything that wants a GPU, in stages of under 10 minutes each.   benchmarks/gpu.sh STAGE [OUT]
#
#   tests      the tests marked gpu
#   decoding   GPT decoding and PixelCNN sampling against their peers
#   tokenizer  encoding and decoding, the nearest code, large images
#   training   a VQGAN step and a GPT step against their peers
#   updates    the CIFAR-10 VQ-VAE's updates per second: plain, compiled, and with CUDA graphs
#   cifar10    200,000 updates of 256 of it with what was fastest (DYNAMO=...); call again to continue where it stopped
#   plan       what stage2_prior.plan says of these runs
#
# JSON goes to OUT/results (OUT defaults to the folder that $OUT names, else ./gpu), runs to OUT/runs. PYTHON chooses the
# interpreter, DATA a folder with CIFAR-10 as torchvision keeps it. SMALL=1 shrinks all of it to a trial, on a CPU too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stage=${1:?which stage? tests, decoding, tokenizer, training, updates, cifar10 or plan}
out=${2:-${OUT:-gpu}}
python=${PYTHON:-python}
data=${DATA:-data/cifar10}
config=configs/stage1/cifar10_vqvae.yaml
limit=${LIMIT:-540} # seconds of a stage
small=() steps=2000 updates=200000 batch=256
if [ -n "${SMALL:-}" ]; then small=(--small) steps=6 updates=12 batch=16; fi
mkdir -p "$out/results" "$out/runs"

bench() { timeout "$limit" "$python" -m benchmarks.run "$@" "${small[@]}" --out "$out/results"; }

# Trains the CIFAR-10 VQ-VAE in a folder: NAME STEPS BACKEND MODE
train() {
    local validate=$updates
    timeout "$limit" env ACCELERATE_DYNAMO_BACKEND="$3" ACCELERATE_DYNAMO_MODE="$4" \
        "$python" stage1_tokenizer/train.py --config "$config" --data.root "$data" --out "$out/runs/$1" \
        --steps "$2" --batch_size "$batch" --validate_every "$validate" --save_every 10000 --log_every 200
}

case $stage in
tests) timeout "$limit" "$python" -m pytest -m gpu -q tests ;;
decoding) bench gpt_decoding pixelcnn ;;
tokenizer) bench tokenizer quantizer ;;
training) bench training_step prior_training ;;
updates)
    for way in "no default" "inductor default" "inductor reduce-overhead"; do
        read -r backend mode <<<"$way"
        name=updates-$backend-$mode
        train "$name" "$steps" "$backend" "$mode"
        "$python" - "$out/runs/$name/metrics.jsonl" "$batch" "$way" <<'PYTHON'
import json, sys
log, batch, way = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rows = [row for row in map(json.loads, open(log)) if "train/images_per_second" in row]
# The log's rate counts from the start of the process; between two entries there is no compiling any more.
seen = [(row["step"] * batch, row["step"] * batch / row["train/images_per_second"]) for row in rows]
(images, began), (later, ended) = seen[len(seen) // 2 - 1] if len(seen) > 1 else (0, 0.0), seen[-1]
print(f"{way}: {(later - images) / (ended - began):,.0f} images/s, {(ended - began) / (later - images) * batch * 1e3:.2f} ms an update")
PYTHON
    done
    ;;
cifar10)
    read -r backend mode <<<"${DYNAMO:-inductor reduce-overhead}"
    train cifar10_vqvae "$updates" "$backend" "$mode" || [ $? -eq 124 ] # out of time: the next call continues
    tail -n 1 "$out/runs/cifar10_vqvae/metrics.jsonl"
    ;;
plan)
    "$python" -m stage2_prior.plan --config configs/stage2/cifar10_gpt.yaml --shape 8,8,1,512 --classes 10 --device h100
    ;;
*) echo "no stage $stage" >&2 && exit 2 ;;
esac
