"""device.sh's measurements: reads what the program measured, and plays the server's callers, good and bad.

    device.py adapters|deadlines|server DIR [REQUESTS]

Needs the standard library only.
"""

import json
import math
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import figures


def adapters(work):
    costs = read(work, "adapters.json")
    allowed = costs["base_rss_bytes"] + costs["adapters"] * costs["adapter_bytes"]
    figures.at_most(
        f"5 memory beyond the base and {costs['adapters']} adapters", (costs["rss_bytes"] - allowed) / 1e6, 30, "MB"
    )
    figures.noted("5 one adapter of rank 8 on all linear layers", costs["adapter_bytes"] / 1e6, "MB")
    figures.at_most("5 changing the adapter, p99", costs["switch_ms"]["p99"], 1, "ms")
    token = costs["token_ms"]
    figures.noted("5 a token with an adapter, of one without", token["same_adapter"] / token["base"], "x")
    figures.noted("5 a token behind a change, of one without", token["another_adapter"] / token["same_adapter"], "x")
    beside = tensors(os.path.join(work, "beside.safetensors"))
    for other, what in [("merged", "the merged file's"), ("float", "the merged file's in floats")]:
        expected = tensors(os.path.join(work, f"{other}.safetensors"))
        gap = max(largest_gap(found, expected[name]) for name, found in beside.items() if name.startswith("logits"))
        figures.at_most(f"5 logits of an adapter beside F32 weights, from {what}, keys and values in f32", gap, 1e-3)
    losses = [read(work, f"loss-{engine}.json")["loss_nats"] for engine in ("integer", "float")]
    figures.at_most("5 loss of an adapter beside Q4_0 weights, from floats'", abs(losses[0] / losses[1] - 1) * 100, 1, "%")


def largest_gap(found, expected):
    """Infinite where a number is missing, or is none."""
    if len(found) != len(expected):
        return math.inf
    gaps = [abs(one - other) for one, other in zip(found, expected)]
    return math.inf if any(map(math.isnan, gaps)) else max(gaps)


def deadlines(work):
    for prompt in (16, 512, "kept"):
        found = read(work, f"deadline-{prompt}.json")
        behind = f" behind {found['prefix_tokens']} kept tokens" if found["prefix_tokens"] else ""
        name = f"6 prompts of {found['prompt_tokens']}{behind}, {found['hogs']} hogs:"
        # An answer without a token is none. A prompt of 512 takes longer than the deadline on any two cores.
        if prompt != 512:
            figures.exactly(f"{name} answers missing, without a token", found["missing"], 0)
        else:
            figures.noted(f"{name} answers without a token", found["missing"])
        figures.at_most(f"{name} answers late", 100 * found["late"] / found["requests"], 0.1, "%")
        for share in ("p50", "p90", "p99", "p99.9"):
            figures.noted(f"{name} answer, {share}", found["answer_ms"][share], "ms")
        figures.noted(f"{name} tokens of an answer", found["tokens"] / found["requests"])


def server(work, requests):
    # Prompts that are kept have a price of their own, which the server states when it starts.
    process = subprocess.Popen(
        ["participant", "serve", "--model", f"{work}/base/model-q4_0.gguf", "--name", "base", "--adapter", f"one={work}/adapter"]
        + ["--bind", "127.0.0.1:0", "--patience", "2s", "--sequences", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    address = json.loads(process.stdout.readline())["address"].rsplit(":", 1)
    address = (address[0], int(address[1]))
    good(address, "base")
    before = resident(process.pid)
    slow = [loris(address, i) for i in range(60)]
    # As much as fills all buffers; and so little that all answers fit them, and nothing of the server's waits for the peer.
    silent = [mute(address, most) for most in [1 << 30] * 8 + [900] * 8]
    done = threading.Event()
    asked = []

    def ask():
        while not done.is_set():
            asked.append(good(address, ("base", "one")[len(asked) % 2]))

    asker = threading.Thread(target=ask)
    asker.start()
    generator = random.Random(1)
    for i in range(requests):
        hostile(address, generator, i)
    done.set()
    asker.join()
    ended = 0
    for connection in slow:
        connection.settimeout(30)
        try:
            while connection.recv(4096):
                pass
            ended += 1
        except TimeoutError:
            pass
        except OSError:
            ended += 1
        connection.close()
    figures.exactly(f"7 good requests unanswered beside {requests} hostile ones", asked.count(False), 0)
    figures.noted("7 good requests meanwhile", len(asked))
    figures.exactly("7 slow connections that were not given up", len(slow) - ended, 0)
    # Patience is over long since.
    until = time.monotonic() + 10
    while (held := connections(address[1])) > 0 and time.monotonic() < until:
        time.sleep(0.1)
    figures.exactly(f"7 connections that server or system hold for {len(silent)} that read nothing", held, 0)
    figures.at_most("7 memory that they have cost", (resident(process.pid) - before) / 1e6, 50, "MB")
    for connection in silent:
        connection.close()
    process.send_signal(signal.SIGINT)
    figures.exactly("7 exit code after an interruption", process.wait(30), 0)


def good(address, model):
    """Whether a well-formed request gets its answer."""
    body = json.dumps({"model": model, "prompt": "press-1>", "max_tokens": 4, "temperature": 0})
    try:
        with socket.create_connection(address, 30) as connection:
            connection.sendall(request(body).encode())
            answer = read_all(connection).decode()
            head, _, body = answer.partition("\r\n\r\n")
            return head.startswith("HTTP/1.1 200") and json.loads(body)["usage"]["completion_tokens"] > 0
    except (OSError, ValueError, KeyError):
        return False


def request(body, length=None, path="/v1/completions"):
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n{body}"
    )


def loris(address, i):
    """A connection that sends some of a request, and then nothing."""
    connection = socket.create_connection(address, 30)
    text = request('{"model": "base"', 100)
    connection.sendall(text[: (0, 10, 60, len(text))[i % 4]].encode())
    return connection


def mute(address, most):
    """A connection that asks at most so often, and until the system's buffers are full, and reads none of the answers."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address)
    connection.setblocking(False)
    ask = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    asked, left = ask * 1000, len(ask) * most
    full = select.poll()
    full.register(connection, select.POLLOUT)
    while left > 0 and full.poll(300):
        begun = -left % len(asked)
        try:
            left -= connection.send(asked[begun : begun + left])
        except OSError:
            break
    return connection


def hostile(address, generator, i):
    """A request that is wrong in some way; what the server answers is its business."""
    good = {"model": "base", "prompt": "x", "max_tokens": 1}
    kind = i % 8
    if kind == 0:
        data = generator.randbytes(generator.randrange(1, 2000)) + b"\r\n\r\n"
    elif kind == 1:
        data = request("", 1 << 30).encode() + b" " * 65536
    elif kind == 2:
        data = request("[" * generator.randrange(1, 100_000)).encode()
    elif kind == 3:
        good[generator.choice(["model", "prompt", "max_tokens", "temperature", "stop", "stream", "seed"])] = generator.choice(
            [None, -1, 1e308, [], {}, True, "x" * 5000, [[["x"]]], float("nan")]
        )
        data = request(json.dumps(good)).encode()
    elif kind == 4:
        data = b"GET /v1/models HTTP/1.1\r\n" + b"X: " + b"a" * generator.randrange(1, 1 << 20)
    elif kind == 5:
        # Asks for a long answer and goes away.
        good.update(max_tokens=2000, stream=True)
        data = request(json.dumps(good)).encode()
    elif kind == 6:
        data = request(" " * (3 << 20)).encode()
    else:
        data = bytearray(request(json.dumps(good)).encode())
        for _ in range(generator.randrange(1, 12)):
            data[generator.randrange(len(data))] = generator.randrange(256)
    try:
        with socket.create_connection(address, 30) as connection:
            connection.sendall(data)
            if kind == 5:
                connection.recv(64)
                # A reset instead of an orderly end.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif kind != 7:
                connection.shutdown(socket.SHUT_WR)
                read_all(connection)
    except OSError:
        pass


def read_all(connection):
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def connections(port):
    """Of a local port, how many the system knows, whoever holds them: but those that listen, or wait for stragglers."""
    with open("/proc/net/tcp", encoding="ascii") as table:
        sockets = [line.split() for line in table][1:]
    listens, waits = "0A", "06"
    return sum(int(local.split(":")[1], 16) == port and state not in (listens, waits) for _, local, _, state, *_ in sockets)


def resident(process):
    with open(f"/proc/{process}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS:"))


def tensors(path):
    """The f32 tensors of a safetensors file."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    floats = {name: info["data_offsets"] for name, info in header.items() if info.get("dtype") == "F32"}
    return {name: list(memoryview(data[begin:end]).cast("f")) for name, (begin, end) in floats.items()}


def read(work, name):
    with open(os.path.join(work, name), encoding="utf-8") as file:
        return json.load(file)


if __name__ == "__main__":
    what, work, *rest = sys.argv[1:]
    {"adapters": adapters, "deadlines": deadlines, "server": server}[what](work, *map(int, rest))
