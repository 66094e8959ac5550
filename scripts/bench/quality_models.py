"""Models whose weights never met a quantizer, as F32 GGUF files, each with a text to measure on and one to calibrate on.

    quality_models.py stories LLAMA2_DATA OUT.gguf
    quality_models.py wide OUT.gguf [--seconds N]
"""

import struct
import sys
import sysconfig
import time
from pathlib import Path

import gguf
import numpy as np


def stories(data, out):
    """llama2.c's checkpoint (export.py's version 0): a header of seven numbers, tensors, and its tokenizer behind them."""
    data = Path(data).read_bytes()
    width, ffn, blocks, heads, kv_heads, vocabulary, context = struct.unpack("7i", data[:28])
    assert vocabulary > 0, "the LM head is the embedding"
    numbers, at = np.frombuffer(data, np.float32, (len(data) - 28) // 4, 28), 0

    def take(*shape):
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return numbers[at - count : at].reshape(shape)

    tensors = {"token_embd": take(vocabulary, width)}
    by_block = {"attn_norm": take(blocks, width)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        by_block[name] = take(blocks, width, width)
    by_block["ffn_norm"] = take(blocks, width)
    by_block["ffn_gate"] = take(blocks, ffn, width)
    by_block["ffn_down"] = take(blocks, width, ffn)
    by_block["ffn_up"] = take(blocks, ffn, width)
    tensors["output_norm"] = take(width)
    take(2 * context * (width // heads) // 2)  # tables of rotations
    tokens, scores = tokenizer(data, 28 + 4 * at, vocabulary)
    for name, stacked in by_block.items():
        tensors |= {f"blk.{i}.{name}": stacked[i] for i in range(blocks)}
    types = [2, 3, 3] + [6] * 256 + [1] * (vocabulary - 259)
    write(out, (width, ffn, blocks, heads, kv_heads, context, 1e-5), tensors, tokens, types, scores)


def tokenizer(data, at, count):
    """llama2.c's tokenizer.bin; the package may pad before it."""
    for at in range(at, at + 64, 4):
        longest, tokens, scores, end = struct.unpack("i", data[at : at + 4])[0], [], [], at + 4
        while len(tokens) < count and end + 8 <= len(data):
            score, length = struct.unpack("fi", data[end : end + 8])
            if not 0 <= length <= longest <= 256:
                break
            tokens.append(data[end + 8 : end + 8 + length])
            scores.append(score)
            end += 8 + length
        if len(tokens) == count:
            named = {0: b"<unk>", 1: b"<s>", 2: b"</s>"} | {3 + byte: b"<0x%02X>" % byte for byte in range(256)}
            return [named.get(i, token.replace(b" ", "\u2581".encode())) for i, token in enumerate(tokens)], scores
    sys.exit("the package holds no tokenizer where it was expected")


WIDTH, FFN, BLOCKS, HEADS, CONTEXT = 256, 768, 6, 4, 256


def wide(out, seconds):
    """A Llama of bytes, trained on the Python library's source for so long."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(1)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = [file for i, file in enumerate(files) if i % 10 == 3]
    text = b"".join(file.read_bytes() for file in files if file not in held_out)
    # Token 259 is the space, which SentencePiece writes as another letter; other bytes follow three special tokens.
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + 3
    data[data == 3 + ord(" ")] = 259

    def parameter(*shape, std=0.02):
        return torch.nn.Parameter(torch.randn(*shape) * std)

    embedding, final_norm = parameter(260, WIDTH), torch.nn.Parameter(torch.ones(WIDTH))
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    shapes |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
    blocks = [
        {name: parameter(*shape) for name, shape in shapes.items()}
        | {name: torch.nn.Parameter(torch.ones(WIDTH)) for name in ("attn_norm", "ffn_norm")}
        for _ in range(BLOCKS)
    ]
    size = WIDTH // HEADS
    angles = torch.outer(torch.arange(CONTEXT), 10_000.0 ** -(torch.arange(0, size, 2) / size))
    cos, sin = angles.cos(), angles.sin()

    def rotated(x):
        """Pairs of neighbours, as GGUF's `llama` rotates them."""
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def norm(x, gain):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain

    def loss(tokens):
        x = embedding[tokens[:, :-1]]
        batch, length, _ = x.shape
        for block in blocks:
            h = norm(x, block["attn_norm"])
            q, k, v = (
                (h @ block[name].T).view(batch, length, HEADS, size).transpose(1, 2) for name in ("attn_q", "attn_k", "attn_v")
            )
            mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
            x = x + mixed.transpose(1, 2).reshape(batch, length, WIDTH) @ block["attn_output"].T
            h = norm(x, block["ffn_norm"])
            x = x + (F.silu(h @ block["ffn_gate"].T) * (h @ block["ffn_up"].T)) @ block["ffn_down"].T
        return F.cross_entropy((norm(x, final_norm) @ embedding.T).flatten(0, 1), tokens[:, 1:].flatten())

    parameters = [embedding, final_norm] + [p for block in blocks for p in block.values()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    begun, step = time.monotonic(), 0
    while (done := (time.monotonic() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * done)
        starts = torch.randint(len(data) - CONTEXT - 1, (4,))
        windows = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
        windows[:, 0] = 1
        value = loss(windows)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"   step {step}, {100 * done:.0f} %: loss {value.item():.3f} nats a byte", flush=True)

    tensors = {"token_embd": embedding, "output_norm": final_norm}
    tensors |= {f"blk.{i}.{name}": p for i, block in enumerate(blocks) for name, p in block.items()}
    tensors = {name: p.detach().numpy() for name, p in tensors.items()}
    tokens = [b"<unk>", b"<s>", b"</s>"] + [b"<0x%02X>" % byte for byte in range(256)] + ["\u2581".encode()]
    shape = (WIDTH, FFN, BLOCKS, HEADS, HEADS, CONTEXT, 1e-5)
    write(out, shape, tensors, tokens, [2, 3, 3] + [6] * 256 + [1], [0.0] * 260)
    plain = [file.read_text("utf-8", "ignore") for file in held_out]
    Path(out).with_suffix(".txt").write_text("".join(plain)[:24_000])
    Path(out).with_suffix(".calibration.txt").write_text(text[:40_000].decode("utf-8", "ignore"))


def write(out, shape, tensors, tokens, types, scores):
    """A file with a SentencePiece vocabulary; gguf's writer leaves empty lists out, which byte-level ones would need."""
    width, ffn, blocks, heads, kv_heads, context, epsilon = shape
    file = gguf.GGUFWriter(out, "llama")
    file.add_context_length(context)
    file.add_embedding_length(width)
    file.add_block_count(blocks)
    file.add_feed_forward_length(ffn)
    file.add_head_count(heads)
    file.add_head_count_kv(kv_heads)
    file.add_layer_norm_rms_eps(epsilon)
    file.add_rope_dimension_count(width // heads)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("llama")
    file.add_token_list(tokens)
    file.add_token_types(types)
    file.add_token_scores(scores)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_add_bos_token(True)
    file.add_add_space_prefix(False)
    for name, values in tensors.items():
        file.add_tensor(f"{name}.weight", np.ascontiguousarray(values, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


if __name__ == "__main__":
    if sys.argv[1] == "stories":
        stories(*sys.argv[2:4])
    else:
        wide(sys.argv[2], float(sys.argv[sys.argv.index("--seconds") + 1]) if "--seconds" in sys.argv else 240.0)
