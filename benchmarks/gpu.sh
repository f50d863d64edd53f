#!/usr/bin/env bash
# All benchmarks and tests that need a GPU, in 12 minutes.   benchmarks/gpu.sh [STAGE ...]
#
#   decoding   GPT decoding against its peers, in both precisions, batches of 1 to 256
#   training_gpt    a GPT step against its peers, eager and compiled
#   training_vqgan  a VQGAN step against the textbook's, eager and compiled
#   updates    optimizer steps per second of the CIFAR-10 VQ-VAE: plain, compiled, and with CUDA graphs
#   headline   CIFAR-10: a VQGAN tokenizer, its codes, a GPT over them, 10,000 samples and their evaluation
#   tests      the tests marked gpu; at the same time as the headline, since neither is a timing
#   sanitizer  waits of a training and a sampling for the GPU (benchmarks/waits.py)
#   plan       the predictions of stage2_prior.plan for these trainings
#
# Without a STAGE: all of them in this order. Each has its own limit of seconds; if one fails or
# runs out of time, the next one starts. Results go to $OUT (default: gpu/): STAGE.log, results/*.json, runs/.
#
# PYTHON    the interpreter                          DATA      the folder of CIFAR-10 as torchvision keeps it
# WEIGHTS   a folder with lpips_alex_features.safetensors and efficientnet_lite0_fp16.safetensors, for the headline
# LIMIT     seconds for each stage in place of its own     SMALL=1  a test of all stages in minutes, on a CPU too
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-gpu}
python=${PYTHON:-python}
images=(--data.root "${DATA:-data/cifar10}")
weights=${WEIGHTS:-data/weights}
small=() short=()
declare -A seconds=([decoding]=80 [training_gpt]=150 [training_vqgan]=100 [updates]=110 [headline]=280 [tests]=200 [sanitizer]=60 [plan]=20)
update_steps=600 update_batch=256 samples=10000
if [ -n "${SMALL:-}" ]; then
    small=(--small)
    update_steps=6 update_batch=16 samples=40
    short=(--batch_size 16 --steps 4)
    images=(--data.kind shapes --data.train_images 256 --data.validation_images 64)
fi
mkdir -p "$out/results" "$out/runs"

bench() { "$python" -m benchmarks.run "$@" "${small[@]}" --out "$out/results"; }

# Without other installed plugins: some of them warn, and a warning is an error here.
stage_tests() { PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$python" -m pytest -m gpu -q -p no:cacheprovider --durations=5 \
    tests/machines/test_gpu.py tests/stage1_tokenizer/data/test_image_tensor.py tests/stage2_prior/gpt/test_layer.py; }

stage_decoding() { bench gpt_decoding; }

stage_training_gpt() { bench prior_training; }

stage_training_vqgan() { bench training_step; }

stage_updates() {
    local way backend mode name
    for way in "no default" "inductor default" "inductor reduce-overhead"; do
        read -r backend mode <<<"$way"
        name=updates-$backend-$mode
        env ACCELERATE_DYNAMO_BACKEND="$backend" ACCELERATE_DYNAMO_MODE="$mode" \
            "$python" stage1_tokenizer/train.py --config configs/stage1/cifar10_vqvae.yaml "${images[@]}" \
            --out "$out/runs/$name" --steps "$update_steps" --batch_size "$update_batch" --no-report \
            --validate_every 1000000 --save_every 1000000 --log_every "$((update_steps / 10 + 1))" &&
            "$python" -m benchmarks.updates "$out/runs/$name" "$update_batch" "$way"
    done
}

stage_headline() {
    local tokenizer=$out/runs/cifar10_vqgan_gpu priors=(cifar10_gpt_gpu cifar10_gpt_small)
    "$python" stage1_tokenizer/train.py --config configs/stage1/cifar10_vqgan_gpu.yaml "${images[@]}" \
        --perceptual.weights "$weights/lpips_alex_features.safetensors" --out "$tokenizer" \
        "${short[@]}" --no-report || return
    local prior
    for prior in "${priors[@]}"; do # at the same time, because one alone does not keep the GPU busy
        "$python" stage2_prior/train.py --tokenizer "$tokenizer" --config "configs/stage2/$prior.yaml" \
            --out "$out/runs/$prior" "${short[@]}" --no-report &
    done
    wait
    for prior in "${priors[@]}"; do
        "$python" sampling/evaluate.py --prior "$out/runs/$prior" -n "$samples" --sampling.batch_size 500 \
            --extractor.kind efficientnet_lite0 --extractor.weights "$weights/efficientnet_lite0_fp16.safetensors" \
            --references "$out/runs/references" --out "$out/results/$prior"
    done
    "$python" sampling/evaluate.py --tokenizer "$tokenizer" --perceptual.net alex \
        --perceptual.weights "$weights/lpips_alex_features.safetensors" \
        --extractor.kind efficientnet_lite0 --extractor.weights "$weights/efficientnet_lite0_fp16.safetensors" \
        --out "$out/results/cifar10_vqgan_gpu"
}

stage_sanitizer() { CUDA_LAUNCH_BLOCKING=1 "$python" -m benchmarks.waits; }

stage_plan() {
    "$python" -m stage2_prior.plan --config configs/stage2/cifar10_gpt_gpu.yaml --shape 8,8,1,1024 --classes 10 --device h100
    "$python" -m stage2_prior.plan --prior.layers 12 --prior.width 512 --prior.heads 8 --prior.feed_forward 1368 \
        --shape 16,16,1,1024 --classes 10 --device h100 --batch_size 64
}

run() {
    local began=$SECONDS
    echo "== $1"
    # In a separate shell, so that `timeout` ends all processes of the stage.
    timeout --kill-after=5 "${LIMIT:-${seconds[$1]}}" bash "${BASH_SOURCE[0]}" --inside "$1" >"$out/$1.log" 2>&1
    echo "== $1: exit code $?, $((SECONDS - began)) s" | tee -a "$out/$1.log"
    tail -n 25 "$out/$1.log"
}

if [ "${1:-}" = --inside ]; then
    "stage_$2"
    exit
fi
if [ $# = 0 ]; then
    for stage in decoding training_gpt training_vqgan updates; do run "$stage"; done
    run tests &
    run headline
    wait
    set -- sanitizer plan
fi
for stage in "$@"; do run "$stage"; done
