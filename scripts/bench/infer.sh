#!/usr/bin/env bash
# Measures a model's tokens against llama.cpp, on the same files: SmolLM2-135M as `coordinator export` writes it, in Q4_0,
# Q4_1, Q8_0, Q4_K_M, Q6_K and TQ2_0.
#
#   scripts/bench/infer.sh [--json] [--quick] [--only FIGURE]
#
#   3  tokens/s one after another and of a prompt of 512, on one thread and two, and with both held to AVX2; share of the
#      memory's speed; load time; resident memory
#   4  the likeliest next token is llama.cpp's, behind 2,000 tokens of text; greedy text from F16 is that of f32
#
# The programs take turns, each measurement a process of its own; nothing else should run meanwhile. Fifteen minutes on two
# cores, under five with --quick (one round, without AVX2), after the build. llama.cpp is built from llama-cpp-python's
# source distribution in .venv-llama/, twice, some ten minutes each; LLAMA_PYTHON names a Python that has it already, and
# LLAMA_AVX2 a directory of its libraries built for AVX2.

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/begin.sh

if [ -z "${LLAMA_PYTHON:-}" ]; then
    say "== llama.cpp, in .venv-llama/"
    wanted=$(grep -E '^(llama-cpp-python|numpy|safetensors)==' scripts/check/requirements.txt)
    if [ "$(cat .venv-llama/installed.txt 2> /dev/null)" != "$wanted" ]; then
        python3 -m venv .venv-llama
        echo '*' > .venv-llama/.gitignore
        options="-DLLAVA_BUILD=OFF -DCMAKE_BUILD_TYPE=Release"
        CMAKE_ARGS="$options -DGGML_NATIVE=ON" .venv-llama/bin/pip install --no-binary llama-cpp-python $wanted >&2
        if [ "$(uname -m)" = x86_64 ]; then
            avx2="-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
            CMAKE_ARGS="$options $avx2" .venv-llama/bin/pip install --no-binary llama-cpp-python --no-cache-dir --no-deps \
                --target .venv-llama/avx2 "$(grep '^llama' <<< "$wanted")" >&2
        fi
        echo "$wanted" > .venv-llama/installed.txt
    fi
    LLAMA_PYTHON=$PWD/.venv-llama/bin/python
    LLAMA_AVX2=$PWD/.venv-llama/avx2/llama_cpp/lib
fi

say "== the model's files"
# One round of two steps, so that there is a run to export. Codes cost the same, whoever chose them, and in TQ2_0 a model
# that was not trained for it makes no sense, which the export would refuse.
config=$(experiment infer "s/^rounds = .*/rounds = 1/" "s/^local_steps = .*/local_steps = 2/" "s/^warmup_steps = .*/warmup_steps = 0/")
participant device-log --out "$work/data" >&2
federate "$config" "$work/federation" "$work/data/press-1.jsonl"
coordinator export "$work/federation/runs/infer" --quantizer reference --no-check --out "$work/exports" \
    --format gguf:q4_0,gguf:q4_1,gguf:q8_0,gguf:q4_k_m,gguf:q6_k,gguf:tq2_0,gguf:f16 >&2

PYTHONPATH=scripts/check${PYTHONPATH:+:$PYTHONPATH} "$LLAMA_PYTHON" scripts/bench/infer.py --files "$work/exports" \
    --participant "$built/participant" ${LLAMA_AVX2:+--llama-avx2 "$LLAMA_AVX2"} ${only:+--only "$only"} \
    ${quick:+--quick} $json
