#!/usr/bin/env bash
# The whole project in one command: builds it, fine-tunes a model split between a coordinator and participants, each a process of its
# own with its own data, exports the result and asks it a question.
#
#   scripts/demo.sh [EXPERIMENT]            configs/demo.toml unless told otherwise
#   scripts/demo.sh configs/smoke.toml      a tiny random model: no download, under a minute after the build
#
# Everything it makes lies in demo/, and models/ for what it downloads. The next demo replaces what this one left in demo/.

set -euo pipefail
cd "$(dirname "$0")/.."

case ${1-} in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*)
        printf 'demo: there is no option %s\n\n' "$1" >&2
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
experiment=${1:-configs/demo.toml}
die() { echo "demo: $*" >&2; exit 1; }
[ ! -d "$experiment" ] || { echo "demo: $experiment is a directory; name a TOML file" >&2; exit 2; }
[ -r "$experiment" ] || die "$experiment cannot be read: name an experiment, such as configs/demo.toml"

# What this script has to know of the experiment; the programs check the rest.
name=$(sed -n '/^name *=/{s/.*= *"\(.*\)".*/\1/p;q}' "$experiment")
cohort=$(sed -n 's/^cohort *= *\([0-9]*\).*/\1/p' "$experiment")
random_model=$(grep -E '^\[model\.random\]|^random *=' "$experiment" || true)
devices=(press-1 mill-1 packer-1 chiller-1)
[[ $cohort =~ ^[1-4]$ ]] || die "the demo has ${#devices[@]} devices, and $experiment asks for a cohort of ${cohort:-?}"
devices=("${devices[@]:0:cohort}")

# How long every phase takes.

phases=()
phase() {
    phase_ends
    running_phase=$1 phase_began=$SECONDS
    printf '\n== %s\n' "$1"
}
phase_ends() { [ -z "${running_phase-}" ] || phases+=("$(printf '%5d s  %s' $((SECONDS - phase_began)) "$running_phase")"); }

# start NAME COMMAND...: a process in the background that logs to demo/logs/NAME.log.
declare -A process_names
start() {
    "${@:2}" > "demo/logs/$1.log" 2>&1 &
    process_names[$!]=$1
}

# However the demo ends, none of its processes outlives it.
finish() {
    local status=$?
    trap - EXIT
    local children
    mapfile -t children < <(jobs -p)
    kill "${children[@]}" 2> /dev/null || true
    wait
    local logs=""
    # What an earlier demo left is removed before the first log is written.
    [ -z "${logs_are_ours-}" ] || logs="; logs are in demo/logs/"
    [ $status = 0 ] || echo "demo: stopped in the phase \"${running_phase-}\" with exit code $status$logs" >&2
    exit $status
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A port that no UDP socket of this machine has, below those that the system gives to clients.
free_udp_port() {
    local port tables
    tables=$(cat /proc/net/udp /proc/net/udp6 2> /dev/null || true)
    while port=$((20000 + RANDOM % 12000)); do
        grep -q "$(printf ':%04X ' "$port")" <<< "$tables" || { echo "$port"; return; }
    done
}

phase "what a build needs"
PATH=$PATH:$HOME/.cargo/bin
command -v cargo > /dev/null || die "cargo is missing: install Rust from https://rustup.rs and start this again"
if ! command -v cc > /dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends build-essential
    else
        die "a C compiler is missing: install one (Debian and Ubuntu: sudo apt-get install build-essential) and start this again"
    fi
fi
cargo --version

phase "building"
built=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target}")/release
compgen -G "$built/deps/libburn_flex-*.rlib" > /dev/null ||
    echo "burn, which does the tensor work, takes 9 to 17 minutes to compile on two cores. This happens once."
cargo build --release --workspace --locked
PATH=$built:$PATH

# Only what an earlier demo made.
rm -rf demo/{data,home,invites,state,cache,runs,exports,logs} demo/report.html
mkdir -p demo/{invites,state,logs}
logs_are_ours=yes

phase "making up the devices' logs"
participant device-log --out demo/data

if [ -z "$random_model" ]; then
    phase "fetching the model"
    coordinator fetch smollm2-135m-instruct --to models/
fi

phase "a coordinator and ${#devices[@]} invitations"
coordinator init demo/home --address "127.0.0.1:$(free_udp_port)"
for device in "${devices[@]}"; do
    coordinator invite demo/home "$device" --out "demo/invites/$device.invite"
done

phase "training, with every party a process of its own"
start coordinator coordinator run "$experiment" --home demo/home --runs demo/runs
coordinator_id=$!
for device in "${devices[@]}"; do
    start "$device" participant join "demo/invites/$device.invite" --data "demo/data/$device.jsonl" --state "demo/state/$device" --cache demo/cache
done
# What the coordinator logs is shown until it has ended.
tail -n +1 -s 0.2 -f --pid="$coordinator_id" demo/logs/coordinator.log &
tail_id=$!
# The first process that fails ends the demo: the others would wait for it.
while [ ${#process_names[@]} -gt 0 ]; do
    status=0
    wait -n -p ended "${!process_names[@]}" || status=$?
    if [ $status != 0 ]; then
        printf '\ndemo: %s failed with exit code %d; the end of demo/logs/%s.log:\n' \
            "${process_names[$ended]}" $status "${process_names[$ended]}" >&2
        tail -n 20 "demo/logs/${process_names[$ended]}.log" >&2
        exit 1
    fi
    unset "process_names[$ended]"
done
wait "$tail_id"

phase "the report"
coordinator report "demo/runs/$name" --out demo/report.html

phase "exporting"
coordinator export "demo/runs/$name" --format hf,peft,gguf:f32,gguf:f16,gguf:q8_0 --out demo/exports

# The question is the first in the log of a device, which never sent it to anyone.
phase "asking the result a question"
field() { sed -n "1s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" demo/data/press-1.jsonl; }
prompt=$(field prompt)
answer=$(participant generate --model demo/exports/model-q8_0.gguf --prompt "$prompt" --raw --max-tokens 40)
printf 'question:         %s\nthe model:       %s\nthe device log:  %s\n' "$prompt" "$answer" "$(field completion)"
[ -z "$random_model" ] || echo "(The model began as random numbers and had a few seconds to learn: it answers noise.)"

phase_ends
printf '\n== done: demo/report.html, demo/runs/%s, demo/exports\n' "$name"
printf '%s\n' "${phases[@]}"
