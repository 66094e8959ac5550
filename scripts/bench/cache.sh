#!/usr/bin/env bash
# What keeping keys and values in q8_0 gives and costs beside f16: SmolLM2-135M on the integer engine.
#
#   scripts/bench/cache.sh [--json] [--quick] [--only FIGURE]
#
#   3  tokens/s one after another, and of a prompt, behind 2,000 and 7,500 tokens, on one thread and two; bytes of keys
#      and values, and resident memory
#   4  perplexity on this repository's prose, in pieces of up to 4,096 tokens, of f32, f16 and q8_0
#
# The two take turns, each measurement a process of its own; nothing else should run meanwhile. Ten minutes on two cores
# after the build, under five with --quick (one round).

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/begin.sh

PYTHONPATH=scripts/check${PYTHONPATH:+:$PYTHONPATH} python3 scripts/bench/cache.py --model "$model/model.gguf" \
    --participant "$built/participant" ${only:+--only "$only"} ${quick:+--quick}
