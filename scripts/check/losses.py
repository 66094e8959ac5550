"""Our training against Hugging Face PEFT's: same initial adapter, same batches, its own AdamW, clipping and schedule.

    losses.py --experiment TOML --adapter INITIAL_DIR --batches BATCHES.jsonl --ours LOSSES.jsonl

BATCHES.jsonl is what `participant train --dump-batches` writes: a micro-batch per line, whole sequences one after the
other. Each sequence attends only to itself, so PyTorch computes them as the rows of a padded batch: causal attention
never looks right, where the padding is.
"""

import argparse
import itertools
import json
import tomllib

import torch
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

import figures
import reference

IGNORED = -100


def main():
    parser = argparse.ArgumentParser()
    for name in ("--experiment", "--adapter", "--batches", "--ours"):
        parser.add_argument(name, required=True)
    arguments = parser.parse_args()
    with open(arguments.experiment, "rb") as file:
        experiment = tomllib.load(file)
    training, federation = experiment["training"], experiment["federation"]
    steps = federation["rounds"] * federation["local_steps"]
    with open(arguments.ours, encoding="utf-8") as file:
        ours = [row for row in map(json.loads, file) if row.get("event") == "step"]
    with open(arguments.batches, encoding="utf-8") as file:
        batches = [list(rows) for _, rows in itertools.groupby(map(json.loads, file), key=lambda row: row["step"])]
    if not len(ours) == len(batches) == steps:
        raise SystemExit(f"expected {steps} steps, found {len(ours)} losses and the batches of {len(batches)} steps")

    model = reference.load(experiment["model"]["path"], arguments.adapter, trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (training["beta1"], training["beta2"])
    optimizer = torch.optim.AdamW(
        trained, training["learning_rate"], betas, training["epsilon"], weight_decay=training["weight_decay"]
    )
    schedule = get_scheduler(training["schedule"], optimizer, training["warmup_steps"], steps)

    difference = 0.0
    for step, (micro_batches, row) in enumerate(zip(batches, ours)):
        optimizer.zero_grad()
        targets = sum(target is not None for batch in micro_batches for target in batch["targets"])
        loss = 0.0
        for batch in micro_batches:
            nats = nats_of(model, batch) / targets
            nats.backward()
            loss += nats.item()
        if training["clip_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(trained, training["clip_norm"])
        optimizer.step()
        schedule.step()
        apart = abs(loss - row["loss_nats"])
        difference = apart if apart != apart else max(difference, apart)
        if step % 10 == 0 or step + 1 == steps:
            figures.told(f"   step {step:2}: PEFT {loss:.6f}, ours {row['loss_nats']:.6f}")

    figures.at_most(f"3 {steps} losses against PEFT, largest difference", difference, 1e-3, "nats")


def nats_of(model, batch):
    """The summed negative log-likelihood of a micro-batch's targets."""
    lengths = batch["segments"]
    tokens = torch.tensor(batch["tokens"]).split(lengths)
    targets = torch.tensor([IGNORED if target is None else target for target in batch["targets"]]).split(lengths)
    for sequence, wanted in zip(tokens, targets):
        # A position is asked for the token that follows it in its own sequence, whatever the program under test says.
        trained = wanted[:-1] != IGNORED
        if not torch.equal(wanted[:-1][trained], sequence[1:][trained]):
            raise SystemExit(f"step {batch['step']}: a target is not the next token of its sequence")
    padded = torch.nn.utils.rnn.pad_sequence
    logits = model(padded(tokens, batch_first=True)).logits  # [sequences, longest, vocabulary]
    wanted = padded(targets, batch_first=True, padding_value=IGNORED)  # [sequences, longest]
    return cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")


if __name__ == "__main__":
    main()
