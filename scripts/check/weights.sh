#!/usr/bin/env bash
# Checks what narrower weights cost in training: the same run with f32, bf16 and int8 weights, unsplit, 200 steps.
#
#   scripts/check/weights.sh [--json] [--quick]
#
#   4  the loss curve with bf16 weights is within 0.5 % of the one with f32 weights, with int8 within 1 % (--quick: 40 steps)
#
# Compared are means over a quarter of the run, the worst quarter counts: a single batch's loss is noise. The base is
# SmolLM2, dequantized; bf16 and int8 round it once more.

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/begin.sh

steps=${quick:+40}
steps=${steps:-200}
participant device-log --out "$work/data" >&2
cat "$work"/data/*.jsonl > "$work/all.jsonl"
config=$(experiment weights "s/^local_steps = .*/local_steps = $steps/")
for weights in f32 bf16 int8; do
    say "== $steps steps, $weights weights"
    participant train "$config" --data "$work/all.jsonl" --weights $weights --out "$work/$weights" --json \
        > "$work/$weights.jsonl"
done
python3 scripts/check/weights.py "$work"
