"""quality.sh's measurements: quantizes each model with both programs and has llama-perplexity compare all files with F32.

    quality.py --llama DIR --keep DIR [--quick] [--only FIGURE] [--model NAME]

Needs coordinator and participant on the PATH, and gguf, numpy and safetensors. Records figures as scripts/check/figures.py
does. A loss is the mean KL divergence of a file's predictions from those of F32, in nats per token.
"""

import argparse
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import figures

MIXES = (
    "q8_0 q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m q4_k_s q4_1 q4_0 iq4_nl q3_k_l q3_k_m q3_k_s q2_k".split()
)
# With and without a matrix, what a mix must lose less than llama-quantize's, in parts of it.
MUCH = {"q4_k_m", "q4_0", "q3_k_m", "q2_k"}
ALSO_OPEN = "f32 f16 bf16 q2_k_s tq2_0 tq1_0".split()
LEGACY = "q8_0 q4_0 q4_1 q5_0 q5_1".split()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama", required=True, type=Path)
    parser.add_argument("--keep", required=True, type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--model", help="the only one to measure figure 2 on: stories15M, wide, or SmolLM2+LoRA")
    arguments = parser.parse_args()
    bench = Bench(arguments.llama, arguments.keep / "files")
    keep = arguments.keep
    stories = Model("stories15M", keep / "stories15M.gguf", 256)
    stories.own_texts(chunks=10 if arguments.quick else 40)
    wide = Model("wide", keep / "wide.gguf", 256)
    models = [stories, wide]
    if not arguments.quick and arguments.model in (None, "SmolLM2+LoRA"):
        smol = Model("SmolLM2+LoRA", keep / "smollm2.gguf", 512)
        smol.repository_texts(keep)
        models.append(smol)
    mixes = sorted(MUCH) if arguments.quick else MIXES
    if arguments.only in (None, "1"):
        opens_everywhere(bench, stories if arguments.quick else wide, mixes)
    if arguments.only in (None, "2"):
        for model in models:
            if arguments.model not in (None, model.name):
                continue
            loses_less(bench, model, mixes, arguments.quick)


class Model:
    def __init__(self, name, path, context):
        self.name, self.path, self.context = name, path, context
        self.text = path.with_suffix(".txt")
        self.calibration = path.with_suffix(".calibration.txt")

    def own_texts(self, chunks):
        """Samples of the model itself, in f32: it was trained on no text that is at hand."""
        self.text = self.path.with_suffix(f".{chunks}.txt")
        for path, seeds in [(self.text, range(1000, 1000 + chunks + 2)), (self.calibration, range(2000, 2030))]:
            if path.exists():
                continue
            figures.told(f"   {path.name}: {self.name} writes {len(seeds)} texts")
            command = ["participant", "generate", "--model", self.path, "--prompt", "", "--raw", "--max-tokens", 250,
                       "--temperature", 1, "--seed"]  # fmt: skip
            path.write_text("\n".join(run(*command, seed).stdout.strip() for seed in seeds) + "\n")

    def repository_texts(self, keep):
        """To measure: this repository's prose. To calibrate: what the adapter was trained on."""
        prose = [Path("README.md"), *sorted(Path("shared").glob("*/*.md"))]
        self.text.write_text("\n".join(path.read_text() for path in prose)[:24_000])
        records = (json.loads(line) for line in (keep / "data" / "all.jsonl").read_text().splitlines())
        self.calibration.write_text("\n".join(" ".join(map(str, record.values())) for record in records)[:60_000])


class Bench:
    def __init__(self, llama, files):
        self.llama, self.files = llama, files

    def ours(self, model, mixes, label, *options):
        """Quantizes with our program: all mixes at once."""
        out = self.files / model.name / label
        run("coordinator", "quantize", model.path, "--format", ",".join(f"gguf:{mix}" for mix in mixes), "--out", out,
            "--force", "--no-check", *options)  # fmt: skip
        return {mix: out / f"model-{mix}.gguf" for mix in mixes}

    def theirs(self, model, mixes, label, imatrix=None):
        # From a file of our writer, whose metadata both then have.
        source = self.ours(model, ["f32"], "f32")["f32"]
        out = self.files / model.name / label
        out.mkdir(parents=True, exist_ok=True)
        for mix in mixes:
            options = ["--imatrix", imatrix] if imatrix else []
            run(self.llama / "llama-quantize", *options, source, out / f"model-{mix}.gguf", mix, "2")
        return {mix: out / f"model-{mix}.gguf" for mix in mixes}

    def base(self, model, chunks):
        base = self.files / model.name / f"base-{chunks}.kld"
        base.parent.mkdir(parents=True, exist_ok=True)
        run(*self.perplexity(model, model.path, base, chunks))
        return base

    def perplexity(self, model, path, base, chunks):
        return (self.llama / "llama-perplexity", "-m", path, "-f", model.text, "-c", model.context, "-b", model.context,
                "-t", 2, "--chunks", chunks, "--kl-divergence-base", base)  # fmt: skip

    def loss(self, model, path, base, chunks):
        """KL in nats and the ratio of perplexities."""
        patterns = {"kl": r"Mean +KLD: +(\S+)", "ratio": r"Mean PPL\(Q\)/PPL\(base\) +: +(\S+)", "ppl": r"Mean PPL\(Q\) +: +(\S+)"}
        # On a busy machine llama.cpp may end before its logger has written the last lines.
        for _ in range(3):
            told = run(*self.perplexity(model, path, base, chunks), "--kl-divergence")
            found = {name: re.search(pattern, told.stdout + told.stderr) for name, pattern in patterns.items()}
            if all(found.values()):
                return {name: float(match[1]) for name, match in found.items()}
        sys.exit(f"llama-perplexity did not measure {path}:\n{(told.stdout + told.stderr)[-2000:]}")


def loses_less(bench, model, mixes, quick):
    chunks = 8 if quick else 16
    base = bench.base(model, chunks)
    imatrix = bench.files / model.name / "imatrix.gguf"
    run("participant", "calibrate", "--model", model.path, "--data", model.calibration, "--out", imatrix)
    contenders = {
        "theirs": bench.theirs(model, mixes, "llama"),
        "ours": bench.ours(model, mixes, "ours"),
        "theirs, matrix": bench.theirs(model, mixes, "llama-matrix", imatrix),
        "ours, matrix": bench.ours(model, mixes, "ours-matrix", "--imatrix", imatrix),
    }
    figures.told(f"\n   {model.name}: KL to F32 in nats, perplexity ratio, and MB")
    figures.told(f"   {'mix':8}" + "".join(f"{name:>28}" for name in contenders) + "   ours/theirs, with matrix")
    for mix in mixes:
        losses = {name: bench.loss(model, files[mix], base, chunks) for name, files in contenders.items()}
        sizes = {name: files[mix].stat().st_size for name, files in contenders.items()}
        cells = "".join(f"{losses[n]['kl']:12.5f} {losses[n]['ratio']:7.4f} {sizes[n] / 1e6:7.2f}" for n in contenders)
        ratios = [losses[f"ours{w}"]["kl"] / losses[f"theirs{w}"]["kl"] for w in ("", ", matrix")]
        figures.told(f"   {mix:8}{cells}   {ratios[0]:.3f} {ratios[1]:.3f}")
        for which, ratio, much in (("", ratios[0], 0.85), (", same matrix", ratios[1], 0.95)):
            with_matrix = ", matrix" if which else ""
            if sizes[f"ours{with_matrix}"] > sizes[f"theirs{with_matrix}"]:
                ratio = math.inf
            # Two files of Q8_0 are equal; what differs is rounding in the last digit that is printed.
            goal = much if mix in MUCH else 1.0005
            figures.at_most(f"2 {model.name} {mix}{which}: KL of llama-quantize's", ratio, goal)


def opens_everywhere(bench, model, mixes):
    import gguf
    import numpy as np

    chunks = 4
    base = bench.base(model, chunks)
    mixes = [*ALSO_OPEN[:1], *mixes, *ALSO_OPEN[1:]]
    files = bench.ours(model, mixes, "opens")
    worst, opened = 0.0, 0
    for mix, path in files.items():
        reader = gguf.GGUFReader(path)
        assert reader.tensors and all(np.isfinite(gguf.quants.dequantize(t.data, t.tensor_type)).all() for t in reader.tensors)
        theirs = bench.loss(model, path, base, chunks)["ppl"]
        ours = perplexity(model, path, base, "integer")
        exact = perplexity(model, path, base, "float")
        figures.told(f"   {mix:8} perplexity by llama.cpp {theirs:.4f}, by ours {ours:.4f}: {100 * (ours / theirs - 1):+.3f} %"
                     f" (without rounding activations {exact:.4f}: {100 * (exact / theirs - 1):+.3f} %)")  # fmt: skip
        worst, opened = max(worst, abs(ours / theirs - 1)), opened + 1
    figures.exactly("1 mixes that llama.cpp and gguf open", opened, len(mixes))
    figures.at_most("1 perplexity, the integer engine's against llama.cpp's, largest difference", 100 * worst, 0.2, "%")

    reference = bench.ours(model, LEGACY, "reference", "--quantizer", "reference", "--calibrate", "none")
    theirs = bench.theirs(model, LEGACY, "llama-legacy")
    same = 0
    for mix in LEGACY:
        ours, other = ({t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors} for path in (reference[mix], theirs[mix]))  # fmt: skip
        same += ours == other
    figures.exactly("1 legacy types with llama-quantize's bytes", same, len(LEGACY), "of 5")


def perplexity(model, path, base, engine):
    """By our program, with the integer engine, which devices run, or the float one, and over the very tokens that
    llama-perplexity scored: the second half of each window."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    head = base.read_bytes()[: 20 + 4 * model.context * 64]
    context, _, chunks = struct.unpack("3i", head[8:20])
    tokens = np.frombuffer(head, np.int32, context * chunks, 20).reshape(chunks, context)
    prompts, logits = path.with_suffix(".jsonl"), path.with_suffix(".logits")
    nats, count = 0.0, 0
    # Where a text begins with a token of its own, each window's first one is replaced by it, though the file says otherwise.
    fields = gguf.GGUFReader(model.path).fields
    if "tokenizer.ggml.add_bos_token" in fields and fields["tokenizer.ggml.add_bos_token"].contents():
        tokens = tokens.copy()
        tokens[:, 0] = fields["tokenizer.ggml.bos_token_id"].contents()
    for window in tokens:
        prompts.write_text(json.dumps({"tokens": window.tolist()}) + "\n")
        run("participant", "logits", "--engine", engine, "--model", path, "--prompts", prompts, "--out", logits)
        scored = load_file(logits)["logits.0"][context // 2 : context - 1].astype(np.float64)
        scored -= scored.max(-1, keepdims=True)
        targets = window[context // 2 + 1 :]
        nats += (np.log(np.exp(scored).sum(-1)) - scored[np.arange(len(targets)), targets]).sum()
        count += len(targets)
    prompts.unlink()
    logits.unlink()
    return math.exp(nats / count)


def run(*command):
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(command)}\n{(done.stdout + done.stderr)[-2000:]}")
    return done


if __name__ == "__main__":
    main()
