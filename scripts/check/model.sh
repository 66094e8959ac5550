#!/usr/bin/env bash
# Checks the model against programs that share no code with it: Hugging Face transformers and PEFT, and llama.cpp.
#
#   scripts/check/model.sh [--json] [--quick] [--only FIGURE]
#
#   1  logits equal transformers' in float32 on the same dequantized weights
#   3  fifty losses of fine-tuning equal PEFT's, from the same initial adapter on the same batches (--quick: fifteen)
#   5  exports: PEFT loads the adapter, transformers the directory, llama.cpp the GGUF files, and all say what we say
#
# The oracles go into a virtual environment of their own, .venv-check/, once: some 6 GB with PyTorch's default build, and
# llama.cpp is compiled, 10 to 15 minutes on two cores.

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/begin.sh

say "== the oracles, in .venv-check/"
if [ ! -e .venv-check/installed.txt ] || ! cmp -s .venv-check/installed.txt scripts/check/requirements.txt; then
    python3 -m venv .venv-check
    echo '*' > .venv-check/.gitignore
    # PyTorch's CPU build is a tenth of the size: set TORCH_INDEX_URL to its index where that is within reach.
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        torch=$(grep '^torch==' scripts/check/requirements.txt)
        .venv-check/bin/pip install --index-url "$TORCH_INDEX_URL" "$torch" >&2
    fi
    CMAKE_ARGS=-DLLAVA_BUILD=OFF .venv-check/bin/pip install --requirement scripts/check/requirements.txt >&2
    cp scripts/check/requirements.txt .venv-check/installed.txt
fi
# oracle SCRIPT ARGUMENTS: one of the Python files beside this one, in that environment.
oracle() { TQDM_DISABLE=1 PYTHONWARNINGS=ignore .venv-check/bin/python "scripts/check/$1.py" "${@:2}"; }

# Ours, and the reference beside them: logits NAME MODEL..., compare FIGURE NAME MODEL...
logits() { participant logits --prompts "$work/prompts.jsonl" --out "$work/$1.safetensors" "${@:2}" >&2; }
compare() { oracle logits compare --figure "$1" --prompts "$work/prompts.jsonl" --ours "$work/$2.safetensors" "${@:3}"; }

participant device-log --out "$work/data" >&2
oracle logits prompts "$work/prompts.jsonl"

if wanted 1; then
    say "== figure 1: logits against transformers"
    logits base --model "$model"
    compare "1 base" base --model "$model"
fi

if wanted 3; then
    say "== figure 3: losses against PEFT"
    config=$(experiment losses ${quick:+"s/^local_steps = .*/local_steps = 15/"})
    participant init-adapter "$config" --out "$work/initial" >&2
    participant train "$config" --data "$work/data/all.jsonl" --dump-batches "$work/batches.jsonl" \
        --out "$work/trained" --json > "$work/losses.jsonl"
    oracle losses --experiment "$config" --adapter "$work/initial" --batches "$work/batches.jsonl" \
        --ours "$work/losses.jsonl"
fi

if wanted 5; then
    say "== figure 5: exports"
    # A run of ten steps in two rounds, so that an aggregated adapter is what is exported.
    config=$(experiment exported "s/^rounds = .*/rounds = 2/" "s/^local_steps = .*/local_steps = 5/")
    federate "$config" "$work/federation" "$work/data/press-1.jsonl"
    exports=$work/exports
    formats=hf,peft,gguf:f32,gguf:f16,gguf:q8_0
    coordinator export "$work/federation/runs/exported" --format "$formats" --out "$exports" >&2

    logits adapted --model "$model" --adapter "$exports/peft"
    logits merged --model "$exports/hf"
    compare "5 peft" adapted --model "$model" --adapter "$exports/peft"
    compare "5 hf" merged --model "$exports/hf"
    # Merging the adapter is the same as applying it.
    compare "5 hf as peft" adapted --model "$exports/hf"

    oracle greedy prompts | while IFS= read -r prompt; do
        participant generate --model "$exports/model-f16.gguf" --prompt "$prompt" --raw --max-tokens 32 --json < /dev/null
    done > "$work/greedy.jsonl"
    oracle greedy compare --f16 "$exports/model-f16.gguf" --q8_0 "$exports/model-q8_0.gguf" \
        --ours "$work/greedy.jsonl" --tokens 32
fi
