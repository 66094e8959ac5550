#!/usr/bin/env bash
# Checks whole runs: every party a process of its own, real QUIC between them, the real model.
#
#   scripts/check/run.sh [--json] [--quick] [--only FIGURE] [--quality | --e2e | --strategies]
#
#   2  `participant train` and a run with one participant in `u` mode print the same fifty losses (--quick: ten)
#   4  it learns: configs/demo.toml; with --quality also configs/quality.toml against pooled and single-device training
#      (half an hour), with --e2e the same of configs/e2e.toml, on real text, with --strategies configs/quality.toml under
#      every aggregation strategy (hours)
#   6  a canary planted in a corpus is nowhere in the coordinator's files, at RUST_LOG=trace, and in no frame
#   8  the byte ledger agrees with QUIC's own statistics

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/begin.sh

check() { python3 "scripts/check/$1.py" "${@:2}"; }
participant device-log --out "$work/data" >&2

if wanted 2; then
    say "== figure 2: the same losses, split and unsplit"
    steps=$([ "$quick" ] && echo 10 || echo 50)
    for adapters in shared per_participant; do
        config=$(experiment "$adapters" "s/^adapters = .*/adapters = \"$adapters\"/" \
            "s/^local_steps = .*/local_steps = $steps/")
        # The name decides which records are held out and in which order the others come.
        local=$work/local-$adapters split=$work/split-$adapters
        participant train "$config" --data "$work/data/press-1.jsonl" --name press-1 --out "$local" --json > "$local.jsonl"
        federate "$config" "$split" "$work/data/press-1.jsonl"
        check same_losses "2 $adapters body" "$local.jsonl" "$split/runs/$adapters/metrics.jsonl" "$steps"
    done
fi

if wanted 4 || wanted 8; then
    say "== figures 4 and 8: the demo's four devices"
    federate configs/demo.toml "$work/demo" "$work"/data/{press,mill,packer,chiller}-1.jsonl
    coordinator report "$work/demo/runs/demo" --json > "$work/report.json"
    ! wanted 4 || check learning "$work/report.json"
    ! wanted 8 || check ledger "$work/report.json"
fi

# The longer experiment.
longer=configs/${corpus:-quality}.toml
devices=({press,mill,packer,chiller}-1)

# train_apart NAME DATA [SED COMMAND]: the longer experiment, unsplit and alone; the adapter goes to adapters/NAME.
train_apart() {
    sed -e "s/^name = .*/name = \"$1\"/" ${3:+-e "$3"} "$longer" > "$work/$1.toml"
    participant train "$work/$1.toml" --data "$2" --out "$work/adapters/$1" --json > "$work/$1.jsonl"
}

# train_together NAME [SED COMMAND]: the longer experiment by the four devices; the adapter goes to adapters/NAME.
train_together() {
    sed -e "s/^name = .*/name = \"$1\"/" ${2:+-e "$2"} "$longer" > "$work/$1.toml"
    federate "$work/$1.toml" "$work/$1" "$work"/train/*.jsonl
    coordinator export "$work/$1/runs/$1" --format peft --out "$work/$1/exports" >&2
    mv "$work/$1/exports/peft" "$work/adapters/$1"
}

# evaluate NAME: losses/NAME/DEVICE.json for every device's held-out file.
evaluate() {
    local file
    mkdir -p "$work/losses/$1"
    for file in "$work"/held-out/*.jsonl; do
        participant evaluate --engine float --model "$model" --adapter "$work/adapters/$1" --data "$file" --json \
            > "$work/losses/$1/$(basename "$file" .jsonl).json"
    done
}

# E2E NLG (Novikova, Dusek and Rieser 2017, CC BY-SA 4.0), in the form that LoRA and SplitLoRA train on.
fetch_e2e() {
    local file=models/e2e_nlg/train.txt
    local url=https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/e2e/train.txt
    local sum=eae319082237310913d9f37f6a891d48fb3f821f29d86870d2cb4f92ddd72c5a
    mkdir -p "${file%/*}"
    if [ ! -e "$file" ]; then
        curl -fsSL --retry 3 -o "$file.part" "$url" ||
            { say "$url is out of reach: get E2E NLG's train.txt elsewhere and put it at $file"; exit 1; }
        mv "$file.part" "$file"
    fi
    sha256sum --quiet --check <<< "$sum  $file" >&2 || { say "$file has other content: delete it"; exit 1; }
    echo "$file"
}

if [ "$long" ]; then
    # All contenders are evaluated on each device's held-out records, which none of them trained on.
    mkdir -p "$work"/{train,held-out,adapters,losses}
    if [ "$corpus" = e2e ]; then
        file=$(fetch_e2e)
        check e2e "$file" "$work" "${devices[@]}"
    else
        participant device-log --out "$work/long" --records 400 >&2
        for device in "${devices[@]}"; do
            head -n 360 "$work/long/$device.jsonl" > "$work/train/$device.jsonl"
            tail -n 40 "$work/long/$device.jsonl" > "$work/held-out/$device.jsonl"
        done
    fi
    train_together fedavg
    evaluate fedavg
fi

if [ "$long" = quality ]; then
    say "== figure 4, for longer: together, pooled, and each alone"
    cat "$work"/train/*.jsonl > "$work/pooled.jsonl"
    # Equal tokens twice: in as many steps, each of four micro-batches, or in four times as many steps. The better one
    # is the bar.
    steps=$(sed -n 's/^local_steps = //p' "$longer")
    train_apart pooled-batch4 "$work/pooled.jsonl" "s/^accumulate = .*/accumulate = 4/"
    train_apart pooled-steps4 "$work/pooled.jsonl" "s/^local_steps = .*/local_steps = $((4 * steps))/"
    for device in "${devices[@]}"; do train_apart "alone-$device" "$work/train/$device.jsonl"; done
    for name in pooled-steps4 pooled-batch4 "${devices[@]/#/alone-}"; do evaluate "$name"; done
    check quality "$work/losses" "${corpus:-device text}"
fi

if [ "$long" = strategies ]; then
    say "== figure 4: the gap per strategy"
    strategy() { train_together "$1" "s/^strategy = .*/strategy = { $2 }/"; evaluate "$1"; }
    strategy fedprox 'name = "fedprox", mu = 0.01'
    strategy fedavgm 'name = "fedavgm", learning_rate = 1.0, momentum = 0.5'
    strategy fedadam 'name = "fedadam", learning_rate = 0.003, beta1 = 0.9, beta2 = 0.99, tau = 0.001'
    strategy fedyogi 'name = "fedyogi", learning_rate = 0.003, beta1 = 0.9, beta2 = 0.99, tau = 0.001'
    strategy trimmed_mean 'name = "trimmed_mean", trim = 1'
    strategy median 'name = "median"'
    train_together product 's/^strategy = .*/average = "product"\n&/'
    evaluate product
    train_together freeze_a 's/^targets = .*/&\nfactors = "freeze_a"/'
    evaluate freeze_a
    check strategies "$work/losses"
fi

if wanted 6; then
    say "== figure 6: the canary"
    modes=$([ "$quick" ] && echo u || echo u forward_only whole)
    check canary plant "$work/canary.jsonl" --words "$work/words.jsonl"
    participant logits --model "$model" --prompts "$work/words.jsonl" --out "$work/words.safetensors" >&2
    for mode in $modes; do
        blocks=$([ $mode = whole ] && echo 0 || echo 1)
        config=$(experiment "canary-$mode" "s/^mode = .*/mode = \"$mode\"/" "s/_blocks = .*/_blocks = $blocks/" \
            "s/^local_steps = .*/local_steps = 5/" "s/^evaluate_every = .*/evaluate_every = 1/")
        RUST_LOG=trace federate "$config" "$work/canary-$mode" "$work/canary.jsonl"
        grep -q TRACE "$work/canary-$mode/coordinator.log" || { say "the coordinator logged no TRACE"; exit 1; }
        # What the coordinator wrote, and nothing of the participant's, which may well know its own sentence.
        check canary search --figure "6 $mode" --tokens "$work/words.safetensors" --control "$work/planted" \
            "$work/canary-$mode"/{home,runs,rows.jsonl,coordinator.log}
    done
    # Frames are searched where they can be read, between the processes' ends of a connection: in a test.
    cargo test --release --workspace canary > "$work/test.log" 2>&1 || { cat "$work/test.log" >&2; exit 1; }
    check canary tests "$work/test.log"
fi
