"""infer.sh's measurements: ours and llama.cpp in turn, every measurement a process of its own.

    infer.py --participant PROGRAM --files DIR [--llama-avx2 LIBRARIES] [--only FIGURE] [--quick] [--json]

DIR has model-q4_0.gguf and so on. Prints tables (to the error stream with --json) and records figures as
scripts/check/figures.py does. A round's numbers are the best of two passes of a process, a ratio is that of neighbours in
time, and what counts is the median of the rounds' ratios.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import figures
from greedy import PROMPTS

TYPES = ("q4_0", "q4_1", "q8_0", "q4_k_m", "q6_k", "tq2_0")
POSITIONS = 2000
# Characters of a piece of text: some 450 tokens.
PIECE = 1800


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--participant", required=True)
    parser.add_argument("--files", required=True, type=Path)
    parser.add_argument("--llama-avx2")
    parser.add_argument("--only")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    out = sys.stderr if arguments.json else sys.stdout
    cpu = features()
    print(f"{cpu['name']}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", file=out, flush=True)
    if arguments.only in (None, "3"):
        speed(arguments, cpu, out)
    if arguments.only in (None, "4"):
        agreement(arguments)
        greedy(arguments)


def features():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    wide = bool(flags & {"avx512_vnni", "avx512_bf16", "asimddp"})
    return {"name": fields.get("model name", platform.machine()), "wide": wide, "vnni": bool(flags & {"avx512_vnni", "asimddp"})}


def run(command, environment={}):
    process = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{process.stderr[-2000:]}")
    return process.stdout


def ours(arguments, file, threads, environment={}, options=("--rounds", "2")):
    command = [arguments.participant, "bench", "infer", "--model", file, "--threads", str(threads), *options, "--json"]
    return json.loads(run(command, environment))


def warm_load_ms(arguments, file, threads):
    """The best of three in a row: the first one behind another file's finds its pages cold."""
    least = ("--rounds", "1", "--prompt-tokens", "1", "--tokens", "1")
    return min(ours(arguments, file, threads, options=least)["load_ms"] for _ in range(3))


def llama(file, *options, environment={}):
    script = str(Path(__file__).with_name("llama_infer.py"))
    return json.loads(run([sys.executable, script, "--model", file, *options], environment))


def speed(arguments, cpu, out):
    rounds = 1 if arguments.quick else 3
    shapes = [("", threads, {}, {}) for threads in (1, 2)]
    if arguments.llama_avx2 and not arguments.quick:
        held = {"LLAMA_CPP_LIB_PATH": arguments.llama_avx2}
        shapes.append((" AVX2", 2, {"HEADWATER_KERNELS": "avx2"}, held))
    shares, loads, memory = [], [], []
    for held, threads, environment, of_llama in shapes:
        print(f"\n{threads} threads{held}: tokens/s, ours / llama.cpp; medians of {rounds}", file=out)
        for type_ in TYPES:
            file = arguments.files / f"model-{type_}.gguf"
            pairs = []
            for _ in range(rounds):
                mine = ours(arguments, file, threads, environment)
                theirs = llama(file, "--threads", str(threads), "--rounds", "2", environment=of_llama)
                pairs.append((mine, theirs))
            ratio = {}
            told = f"{type_:7}"
            for what in ("decode", "prompt"):
                key = f"{what}_tokens_per_s"
                ratio[what] = statistics.median(mine[key] / theirs[key] for mine, theirs in pairs)
                mine, theirs = (statistics.median(pair[side][key] for pair in pairs) for side in (0, 1))
                told += f"  {what} {mine:6.0f} / {theirs:6.0f} = {ratio[what]:.2f}"
            share = statistics.median(mine["bandwidth_share"] for mine, _ in pairs)
            best = pairs[0][0]
            print(f"{told}  {share:4.0%} of {best['bandwidth_gb_per_s']:.0f} GB/s, p99 {best['latency_ms']['p99']:.2f} ms", file=out, flush=True)
            if held:
                goals = {"decode": 1.5, "prompt": 1.5}
            else:
                shares.append(share)
                loads.append(warm_load_ms(arguments, file, threads))
                slow = 1.5 if type_ == "q8_0" and not cpu["vnni"] else 1.8
                goals = {"decode": slow, "prompt": 1.4 if cpu["wide"] else 1.8}
                if best["rss_bytes"]:
                    memory.append(max(m["peak_rss_bytes"] - m["file_bytes"] - m["kv_bytes"] for m, _ in pairs) / 1e6)
            for what, goal in goals.items():
                figures.at_least(f"3 {type_}{held}, {threads} threads, {what}", ratio[what], goal, "x llama.cpp")
    figures.at_least("3 least share of the memory's speed, decode", min(shares), 0.75, "share")
    figures.at_most("3 longest load", max(loads), 50, "ms")
    if memory:
        figures.at_most("3 most memory beyond file, keys and values", max(memory), 30, "MB")


def agreement(arguments):
    """Every engine's likeliest next token behind the same tokens, on text of this repository."""
    import numpy
    from safetensors import safe_open

    text = Path("README.md").read_text(encoding="utf-8") + Path("shared/wire/PROTOCOL.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        prompts, logits = Path(directory, "prompts.jsonl"), Path(directory, "logits.safetensors")
        tokens_file = Path(directory, "tokens.json")
        pieces = [text[at : at + PIECE] for at in range(0, 5 * PIECE, PIECE)]
        prompts.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
        for type_ in (*TYPES, "f16"):
            file = arguments.files / f"model-{type_}.gguf"
            chosen = {}
            for engine in ("integer", "float"):
                command = [arguments.participant, "logits", "--model", file, "--engine", engine]
                run([*command, "--prompts", prompts, "--out", logits])
                with safe_open(logits, framework="numpy") as found:
                    tokens = [found.get_tensor(f"tokens.{i}").tolist() for i in range(len(pieces))]
                    each = [found.get_tensor(f"logits.{i}").argmax(1).tolist() for i in range(len(pieces))]
                    chosen[engine] = sum(each, [])[:POSITIONS]
            tokens_file.write_text(json.dumps(tokens))
            theirs = [token for token, _ in llama(file, "--top-1", tokens_file)][:POSITIONS]

            def share(one, other):
                return sum(a == b for a, b in zip(one, other)) / len(one)

            # Both round activations to bytes: how often that alone decides, the exact weights with exact activations tell.
            exact = chosen["float"]
            figures.noted(f"4 {type_}: ours chooses as f32 does", share(chosen["integer"], exact), "share")
            figures.noted(f"4 {type_}: llama.cpp chooses as f32 does", share(theirs, exact), "share")
            figures.at_least(f"4 {type_}: ours chooses as llama.cpp does", share(chosen["integer"], theirs), 0.99, "share")
            if arguments.llama_avx2:
                # Rounding to bytes makes a byte's step of the smallest difference, and layers make more of it: what agreement
                # is to be had at all, llama.cpp's own with itself tells, built for other instructions.
                held = {"LLAMA_CPP_LIB_PATH": arguments.llama_avx2}
                theirs_held = [token for token, _ in llama(file, "--top-1", tokens_file, environment=held)][:POSITIONS]
                told = f"4 {type_}: llama.cpp built for AVX2 chooses as llama.cpp does"
                figures.noted(told, share(theirs_held, theirs), "share")


def greedy(arguments):
    file = arguments.files / "model-f16.gguf"
    same = 0
    for prompt in PROMPTS:
        command = [arguments.participant, "generate", "--model", file, "--prompt", prompt, "--raw", "--max-tokens", "32", "--json"]
        texts = [json.loads(run([*command, "--engine", engine]))["tokens"] for engine in ("integer", "float")]
        same += texts[0] == texts[1]
        if texts[0] != texts[1]:
            figures.told(f"   {prompt!r}: DIFFERS")
    figures.exactly("4 F16: greedy texts equal to f32's", same, len(PROMPTS), "prompts")


if __name__ == "__main__":
    main()
