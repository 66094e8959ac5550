"""Our logits against those of Hugging Face transformers, on the same weights and the same eight prompts.

    logits.py prompts PROMPTS.jsonl                                   writes the prompts, for `participant logits`
    logits.py compare --figure NAME --model MODEL [--adapter DIR] --prompts PROMPTS.jsonl --ours OURS.safetensors
"""

import argparse
import json

import torch
from safetensors.torch import load_file

import figures
import reference

# Prose, code, digits, a log, other scripts, one token alone, a conversation, and more tokens than training ever sees.
PROMPTS = [
    "The capital of France is",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n        return n\n',
    "In 1969 the 3rd stage fired at 16:16:16 and the pressure fell from 1013 hPa to 0.25 hPa, i.e. by 99.975 %.",
    "2024-05-01T08:15:00Z press-1 temperature=61.5 pressure=210 state=running\n" * 3,
    "Grüße aus Köln — naïve café, Привет, 你好 🙂",
    "Once",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "The history of the steam engine begins long before the steam engine. " * 30,
]


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts")
    prompts.add_argument("prompts")
    compare = commands.add_parser("compare")
    for name in ("--figure", "--model", "--prompts", "--ours"):
        compare.add_argument(name, required=True)
    compare.add_argument("--adapter")
    arguments = parser.parse_args()
    if arguments.command == "prompts":
        with open(arguments.prompts, "w", encoding="utf-8") as file:
            for text in PROMPTS:
                file.write(json.dumps({"text": text}) + "\n")
    else:
        check(arguments)


@torch.inference_mode()
def check(arguments):
    """Three figures: prompts tokenized differently, the largest difference of a logit, positions with another top-1."""
    ours = load_file(arguments.ours)
    model = reference.load(arguments.model, arguments.adapter)
    tokenizer = reference.tokenizer(arguments.model)
    with open(arguments.prompts, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]

    cut_differently, difference, other_top, positions = 0, 0.0, 0, 0
    for index, text in enumerate(texts):
        ids = ours[f"tokens.{index}"]  # [tokens]
        cut_differently += ids.tolist() != tokenizer(text, add_special_tokens=False).input_ids
        expected = model(ids[None]).logits[0]  # [tokens, vocabulary]
        found = ours[f"logits.{index}"]
        if found.shape != expected.shape:
            raise SystemExit(f"prompt {index}: logits are {list(found.shape)}, expected {list(expected.shape)}")
        worst = (found - expected).abs().max().item()
        others = (found.argmax(-1) != expected.argmax(-1)).sum().item()
        figures.told(f"   prompt {index}: {len(ids):4} tokens, logits differ by at most {worst:.2e}, {others} other top-1")
        # `max` drops a value that is not a number; this keeps it.
        difference = worst if worst != worst else max(difference, worst)
        other_top += others
        positions += len(ids)

    figures.exactly(f"{arguments.figure}: tokenized differently", cut_differently, 0, f"of {len(texts)} prompts")
    figures.at_most(f"{arguments.figure}: logits, largest difference", difference, 1e-3)
    figures.exactly(f"{arguments.figure}: another top-1", other_top, 0, f"of {positions} positions")


if __name__ == "__main__":
    main()
