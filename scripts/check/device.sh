#!/usr/bin/env bash
# Checks what a device's own answers promise: many adapters on one base, deadlines, and a server that survives its callers.
#
#   scripts/check/device.sh [--json] [--quick] [--only FIGURE]
#
#   5  64 adapters on one base cost their own bytes, changing between them nothing; logits are the merged model's
#   6  20 ms for an answer, two CPU hogs beside it: none is missing, at most one in a thousand later than 25 ms
#   7  the HTTP server answers everybody else while it is sent garbage, gigabytes, and requests that never end
#
# SmolLM2 on as many threads as there are cores, quantized as Q4_0 (figure 5's logits: F32). Nothing else should run beside
# figure 6. Nine minutes after the build; --quick: three, with a fifth of the requests.

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/begin.sh

say "== an adapter on all linear layers, after a few steps"
participant device-log --out "$work/data" >&2
cat "$work"/data/*.jsonl > "$work/all.jsonl"
targets='"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"'
config=$(experiment device "s/^targets = .*/targets = [$targets]/")
participant train "$config" --data "$work/all.jsonl" --steps 12 --out "$work/adapter" --json > "$work/train.jsonl"
quantize() { coordinator quantize "$model" --no-check --calibrate none --out "$work/$1" "${@:2}" >&2; }
quantize base --format gguf:q4_0,gguf:f32
quantize merged --format gguf:f32 --adapter "$work/adapter"

if wanted 5; then
    say "== 5: adapters"
    printf '{"text": "%s"}\n' "press-1> status of hydraulic pump 2?" "The quick brown fox jumps over the lazy dog." \
        "Once upon a time there was a machine that" > "$work/prompts.jsonl"
    # Keys and values in f32: in f16 sums that differ in their last bit are rounded now to one side and now to the other, which
    # is the same for an adapter and for another order of summing, and says nothing about adapters.
    logits() { participant logits --prompts "$work/prompts.jsonl" --out "$work/$1" "${@:2}" >&2; }
    logits beside.safetensors --model "$work/base/model-f32.gguf" --engine integer --cache f32 --adapter "$work/adapter"
    logits merged.safetensors --model "$work/merged/model-f32.gguf" --engine integer --cache f32
    logits float.safetensors --model "$work/merged/model-f32.gguf" --engine float
    participant bench adapters --model "$work/base/model-q4_0.gguf" --adapter "$work/adapter" --count 64 --json \
        > "$work/adapters.json"
    for engine in integer float; do
        participant evaluate --model "$work/base/model-q4_0.gguf" --engine $engine --adapter "$work/adapter" \
            --data "$work/data/press-1.jsonl" --json > "$work/loss-$engine.json"
    done
    python3 scripts/check/device.py adapters "$work"
fi
if wanted 6; then
    say "== 6: deadlines"
    requests=${quick:+1000}
    requests=${requests:-5000}
    deadline() {
        participant bench infer --model "$work/base/model-q4_0.gguf" --deadline 20ms --hogs 2 --requests "$requests" \
            --json "${@:2}" > "$work/deadline-$1.json"
    }
    # A turn of a conversation, whose beginning has been read before.
    deadline kept --prefix-tokens 112 --prompt-tokens 8
    for prompt in 16 512; do
        deadline $prompt --prompt-tokens $prompt
        # The long prompt takes longer than the deadline: a thousand answers of nothing say enough.
        requests=1000
    done
    python3 scripts/check/device.py deadlines "$work"
fi
if wanted 7; then
    say "== 7: the server"
    requests=${quick:+400}
    python3 scripts/check/device.py server "$work" "${requests:-2000}"
fi
