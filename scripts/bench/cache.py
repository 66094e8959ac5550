"""cache.sh's measurements: q8_0 and f16 in turn, every measurement a process of its own.

    cache.py --participant PROGRAM --model FILE [--only FIGURE] [--quick]

Tells what it measures on the error stream and records figures as scripts/check/figures.py does. A ratio is that of
neighbours in time, and what counts is the median of the rounds' ratios.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import figures

DEPTHS = (2000, 7500)
# Characters of a piece of prose: about as many tokens as the longest takes.
PIECE = 14_000
PROSE = ("README.md", "shared/wire/PROTOCOL.md", "shared/quant/FORMAT.md")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--participant", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--only")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.only in (None, "3"):
        speed(arguments)
    if arguments.only in (None, "4"):
        perplexity(arguments)


def run(arguments, command, *options):
    command = [arguments.participant, *command, "--model", arguments.model, *map(str, options), "--json"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout)


def speed(arguments):
    rounds = 1 if arguments.quick else 3
    decode, prompt = [], []
    for threads in (1, 2):
        for depth in DEPTHS:
            options = ("--depth", depth, "--prompt-tokens", 256, "--tokens", 48, "--rounds", 2, "--threads", threads)
            pairs = []
            for _ in range(rounds):
                pairs.append([run(arguments, ("bench", "infer"), *options, "--cache", cache) for cache in ("q8_0", "f16")])
            for what, ratios in (("decode", decode), ("prompt", prompt)):
                key = f"{what}_tokens_per_s"
                ratio = statistics.median(ours[key] / theirs[key] for ours, theirs in pairs)
                ours, theirs = (statistics.median(pair[side][key] for pair in pairs) for side in (0, 1))
                figures.told(f"   {what} behind {depth}, {threads} threads: {ours:.1f} / {theirs:.1f} tokens/s = {ratio:.2f}")
                ratios.append(ratio)
                figures.noted(f"3 {what} behind {depth} tokens, {threads} threads", ours, "tokens/s")
                figures.noted(f"3 {what} behind {depth} tokens, {threads} threads, of f16's", ratio, "x speed")
    ours, theirs = pairs[0]
    figures.at_least("3 least decode, of f16's", min(decode), 1.0, "x speed")
    figures.at_least("3 least prompt, of f16's", min(prompt), 0.95, "x speed")
    figures.at_most(f"3 keys and values, of f16's {theirs['kv_bytes'] / 1e6:.0f} MB", ours["kv_bytes"] / theirs["kv_bytes"], 0.532, "x bytes")
    if ours["peak_rss_bytes"]:
        saved = (theirs["peak_rss_bytes"] - ours["peak_rss_bytes"]) / (theirs["kv_bytes"] - ours["kv_bytes"])
        figures.at_least("3 resident memory that is saved, of the bytes that are", saved, 0.95, "share")


def perplexity(arguments):
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory, "prose.jsonl")
        text = "".join(Path(file).read_text(encoding="utf-8") for file in PROSE)
        pieces = [text[at : at + PIECE] for at in range(0, len(text) - PIECE // 2, PIECE)]
        data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
        options = ("--data", data, "--engine", "integer", "--sequence-tokens-max", 4096)
        of = {cache: run(arguments, ("evaluate",), *options, "--cache", cache) for cache in ("f32", "f16", "q8_0")}
    for cache, measured in of.items():
        figures.noted(f"4 perplexity, {cache}, {measured['tokens']} tokens", measured["perplexity"])
    for cache, goal in (("f16", 0.1), ("q8_0", 0.5)):
        change = abs(of[cache]["perplexity"] / of["f32"]["perplexity"] - 1)
        figures.at_most(f"4 change of perplexity by {cache}", 100 * change, goal, "%")


if __name__ == "__main__":
    main()
