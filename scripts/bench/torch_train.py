"""One contender of train.sh: LoRA training steps with PyTorch, transformers and PEFT. Prints one JSON object.

    torch_train.py --batch 4x128 --lora q_proj,v_proj|all --type f32|bf16 --threads N --steps K [--model DIR]

A step is forward, loss at every position, backward and AdamW. The model is SmolLM2-135M, read from DIR or random: speed
depends on shapes alone. PyTorch gets what is fastest for it: fused attention and optimizer, a frozen base that asks for
no gradient, batches made beforehand, no recomputation. `bf16` is autocast over f32 weights.
"""

import argparse
import contextlib
import ctypes
import json
import resource
import statistics
import time
from pathlib import Path

import peft
import torch
import transformers
from torch.nn.functional import cross_entropy

RANK, ALPHA = 8, 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMOLLM2_135M = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", required=True)
    parser.add_argument("--lora", required=True)
    parser.add_argument("--type", choices=["f32", "bf16"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)

    model = adapted(load(arguments.model), LINEARS if arguments.lora == "all" else arguments.lora.split(","))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    sequences, tokens = map(int, arguments.batch.split("x"))
    # One more token than are read, so that every position has a target. The first step is a warm-up.
    batches = torch.randint(model.config.vocab_size, (1 + arguments.steps, sequences, tokens + 1))
    precision = {
        "f32": contextlib.nullcontext,
        "bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }[arguments.type]

    step_ms = []
    for batch in batches:
        began = time.perf_counter()
        with precision():
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # [sequences, tokens, vocabulary]
            loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step_ms.append((time.perf_counter() - began) * 1e3)
    median_ms = statistics.median(step_ms[1:])
    print(json.dumps({
        "step_ms": step_ms[1:],
        "median_ms": median_ms,
        "tokens_per_s": sequences * tokens / median_ms * 1e3,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "isa": instruction_sets(),
        "loss_nats": loss.item(),
    }))


def load(directory):
    if directory:
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
    config = transformers.LlamaConfig(**SMOLLM2_135M, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(config)


def adapted(base, targets):
    """The base, frozen, with adapters on the named layers of all blocks."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config).train()


def instruction_sets():
    """What PyTorch's own kernels use, and MKL's matrix products: nothing prints the latter, so MKL itself is asked."""
    own = torch.backends.cpu.get_cpu_capability().lower()
    try:
        mkl = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        generic = "generic, Zen" if mkl.mkl_serv_cpuiszen() else "generic"
        dispatched = {0: generic, 3: "sse4.2", 5: "avx2", 7: "avx512"}
        found = mkl.mkl_serv_cpu_detect()
        return f"{own}, MKL {dispatched.get(found, found)}"
    except (OSError, AttributeError):  # a build without MKL, or one that hides it
        return own


if __name__ == "__main__":
    main()
