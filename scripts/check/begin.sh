# What checks of whole programs begin with: figures.sh, the programs, their model, and federations of them. Sourced, from the
# repository's root.

source scripts/check/figures.sh

say "== building (minutes on a fresh machine: burn)"
cargo build --release >&2
PATH=$built:$PATH

# The model that the configurations name.
model=$(sed -n 's/^path = "\(.*\)"/\1/p' configs/check-train.toml)
[ -e "$model" ] || coordinator fetch smollm2-135m-instruct --to models/ >&2

# experiment NAME [SED COMMAND...]: configs/check-train.toml under another name and with other settings; prints its
# path.
experiment() {
    local name=$1 command arguments=(-e "s/^name = .*/name = \"$1\"/")
    shift
    for command; do arguments+=(-e "$command"); done
    sed "${arguments[@]}" configs/check-train.toml > "$work/$name.toml"
    echo "$work/$name.toml"
}

# federate CONFIG DIR DATA...: runs an experiment, every party a process of its own, a participant named after its data
# file. Leaves DIR/home, DIR/runs/<name>, what the coordinator printed in DIR/rows.jsonl, and everyone's DIR/*.log.
federate() {
    local config=$1 dir=$2 data name
    shift 2
    mkdir -p "$dir"
    coordinator init "$dir/home" --address "127.0.0.1:$(free_port)" >&2
    for data; do
        name=$(basename "$data" .jsonl)
        coordinator invite "$dir/home" "$name" --out "$dir/$name.invite" >&2
    done
    coordinator run "$config" --home "$dir/home" --runs "$dir/runs" --json \
        > "$dir/rows.jsonl" 2> "$dir/coordinator.log" &
    for data; do
        name=$(basename "$data" .jsonl)
        participant join "$dir/$name.invite" --data "$data" --state "$dir/$name.state" \
            > "$dir/$name.log" 2>&1 &
    done
    # The first party that fails ends the check: the others would wait for it.
    while [ -n "$(jobs -p)" ]; do
        wait -n || { say "a party failed:"; tail -n 5 "$dir"/*.log >&2; exit 1; }
    done
}

free_port() {
    python3 - << 'END'
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.bind(("127.0.0.1", 0))
    print(udp.getsockname()[1])
END
}
