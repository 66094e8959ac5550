"""Stock llama.cpp on our exported GGUF files: they load, and its greedy text equals that of `participant generate`.

    greedy.py prompts
        prints the five prompts, one a line
    greedy.py compare --f16 FILE --q8_0 FILE --ours LINES.jsonl --tokens N
        LINES.jsonl holds what `participant generate --raw --json` printed for each prompt
"""

import argparse
import json

import figures

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colors are",
    "The opposite of hot is",
    "A coordinator is someone who",
]


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prompts")
    compare = commands.add_parser("compare")
    for name in ("--f16", "--q8_0", "--ours"):
        compare.add_argument(name, required=True)
    compare.add_argument("--tokens", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.command == "prompts":
        print("\n".join(PROMPTS))
    else:
        check(arguments)


def check(arguments):
    with open(arguments.ours, encoding="utf-8") as file:
        ours = [json.loads(line)["tokens"] for line in file]
    if len(ours) != len(PROMPTS):
        raise SystemExit(f"expected {len(PROMPTS)} answers, found {len(ours)}")
    f16 = answers(arguments.f16, arguments.tokens)
    for prompt, (text, expected, leads), found in zip(PROMPTS, f16, ours):
        figures.told(f"   {prompt!r} → {text!r}")
        if found != expected:
            same = next(at for at, pair in enumerate(zip(found + [None], expected + [None])) if pair[0] != pair[1])
            figures.told(f"      DIFFERS after {same} tokens: ours {found[same:]}, llama.cpp {expected[same:]}")
            figures.told(f"      there llama.cpp's first choice led its second by {leads[same]:.4f}")
    equal = sum(found == expected for found, (_, expected, _) in zip(ours, f16))
    figures.exactly("5 gguf:f16: greedy texts equal to llama.cpp's", equal, len(PROMPTS), "prompts")
    q8_0 = answers(arguments.q8_0, arguments.tokens)
    figures.told(f"   q8_0 answers {sum(a[1] == b[1] for a, b in zip(q8_0, f16))} of {len(PROMPTS)} prompts as f16 does")
    figures.exactly("5 gguf:q8_0: texts from llama.cpp", sum(text != "" for text, _, _ in q8_0), len(PROMPTS), "prompts")


def answers(path, tokens_max):
    """Each prompt's greedy continuation: its text, its token ids without the end token, and by how much each led."""
    from llama_cpp import Llama, llama_get_logits_ith

    # `type_k` and `type_v` 0 keep keys and values in float32, as ours are; all else is llama.cpp's own choice.
    llama = Llama(path, n_ctx=256, n_gpu_layers=0, flash_attn=False, type_k=0, type_v=0, verbose=False)
    result = []
    for prompt in PROMPTS:
        llama.reset()
        ids, leads = [], []
        for token in llama.generate(llama.tokenize(prompt.encode()), temp=0.0, repeat_penalty=1.0):
            second, first = sorted(llama_get_logits_ith(llama.ctx, -1)[: llama.n_vocab()])[-2:]
            leads.append(first - second)
            if token == llama.token_eos() or len(ids) == tokens_max:
                break
            ids.append(token)
        result.append((llama.detokenize(ids).decode(errors="replace"), ids, leads))
    return result


if __name__ == "__main__":
    main()
