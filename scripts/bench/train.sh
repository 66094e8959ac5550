#!/usr/bin/env bash
# Measures a training step against PyTorch with PEFT, on identical shapes and weights: SmolLM2-135M, all blocks, LM head
# and loss, LoRA of rank 8, forward and backward and AdamW.
#
#   scripts/bench/train.sh [--json] [--quick] [--only THREADS:BATCH:TARGETS]
#
#   1  speed against PyTorch in f32 as installed, with MKL's fast path forced, in bf16, and held to AVX2
#   2  share of this machine's measured peak of matrix products
#   3  peak memory against PyTorch's
#
# Contenders take turns, each measurement a process of its own, five rounds: two hours on two cores; nothing else should
# run meanwhile. --quick: one shape, three rounds, under five minutes after the build. --only: one of the eight shapes,
# such as 2:8x256:all or 1:4x128:q_proj,v_proj. PyTorch goes into the virtual environment of scripts/check/model.sh,
# .venv-check/.

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/begin.sh

say "== PyTorch, in .venv-check/"
if [ ! -e .venv-check/bin/python ]; then
    python3 -m venv .venv-check
    echo '*' > .venv-check/.gitignore
fi
grep -v '^llama-cpp' scripts/check/requirements.txt > "$work/requirements.txt"
# PyTorch's CPU build is a tenth of the size: set TORCH_INDEX_URL to its index where that is within reach.
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    .venv-check/bin/pip install --quiet --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' "$work/requirements.txt")" >&2
fi
.venv-check/bin/pip install --quiet --requirement "$work/requirements.txt" >&2

# MKL asks this function whether the CPU is Intel's before it uses its best code.
echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' > "$work/mkl.c"
cc -shared -fPIC -o "$work/mkl.so" "$work/mkl.c"

say "== the same weights as a Hugging Face directory"
PYTHONPATH=scripts/check .venv-check/bin/python -c \
    "import reference; reference.save(reference.load('$model'), '$work/model')" >&2

say "== steps"
PYTHONPATH=scripts/check python3 scripts/bench/train.py --participant "$built/participant" \
    --python .venv-check/bin/python --model "$model" --torch-model "$work/model" --mkl "$work/mkl.so" \
    ${quick:+--quick} ${only:+--only "$only"} $json
