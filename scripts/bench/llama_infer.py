"""One model on llama.cpp, as `participant bench infer --json` measures it on our engine.

    llama_infer.py --model FILE [--prompt-tokens N] [--tokens N] [--threads N] [--rounds N]
    llama_infer.py --model FILE --top-1 TOKENS.json

The first prints one line of JSON: load time, prompt and decode tokens/s, the best of the rounds. The second prints, for a
file that holds lists of token ids, the likeliest next token behind each of all their positions, and by how much it leads.
"""

import argparse
import ctypes
import json
import time

import llama_cpp.llama_cpp as llama


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--top-1")
    arguments = parser.parse_args()
    llama.llama_log_set(QUIET, None)
    llama.llama_backend_init()
    begun = time.perf_counter()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(arguments.model.encode(), parameters)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {arguments.model}")
    load_s = time.perf_counter() - begun
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    if arguments.top_1:
        with open(arguments.top_1, encoding="utf-8") as file:
            texts = json.load(file)
        context = context_of(model, max(map(len, texts)), arguments.threads)
        print(json.dumps(top_1(context, texts, vocabulary)))
        return
    context = context_of(model, max(arguments.prompt_tokens, arguments.tokens) + 1, arguments.threads)
    memory = llama.llama_get_memory(context)
    # Any tokens cost the same; these are the ones that ours takes.
    tokens = [(i * 7919 + 13) % vocabulary for i in range(max(arguments.prompt_tokens, arguments.tokens))]
    prompt_s, decode_s = [], []
    decode(context, tokens[:8])
    for _ in range(arguments.rounds):
        llama.llama_memory_clear(memory, True)
        begun = time.perf_counter()
        decode(context, tokens[: arguments.prompt_tokens])
        prompt_s.append(time.perf_counter() - begun)
        llama.llama_memory_clear(memory, True)
        begun = time.perf_counter()
        for token in tokens[: arguments.tokens]:
            decode(context, [token])
        decode_s.append(time.perf_counter() - begun)
    print(
        json.dumps(
            {
                "load_ms": load_s * 1e3,
                "prompt_tokens_per_s": arguments.prompt_tokens / min(prompt_s),
                "decode_tokens_per_s": arguments.tokens / min(decode_s),
            }
        )
    )


QUIET = llama.llama_log_callback(lambda level, text, data: None)


def context_of(model, tokens, threads):
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = tokens
    parameters.n_batch = tokens
    parameters.n_threads = parameters.n_threads_batch = threads
    return llama.llama_init_from_model(model, parameters)


def decode(context, tokens):
    """Appends tokens; the logits behind the last are computed."""
    array = (llama.llama_token * len(tokens))(*tokens)
    if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))) != 0:
        raise SystemExit("llama_decode failed")
    llama.llama_synchronize(context)


def top_1(context, texts, vocabulary):
    import numpy

    memory = llama.llama_get_memory(context)
    chosen = []
    for now in texts:
        llama.llama_memory_clear(memory, True)
        batch = llama.llama_batch_init(len(now), 0, 1)
        batch.n_tokens = len(now)
        for i, token in enumerate(now):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        if llama.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        for i in range(len(now)):
            logits = numpy.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), shape=(vocabulary,))
            second, first_choice = numpy.argpartition(logits, -2)[-2:]
            chosen.append([int(first_choice), float(logits[first_choice] - logits[second])])
        llama.llama_batch_free(batch)
    return chosen


if __name__ == "__main__":
    main()
