"""Load: 1, 8 and 32 readers at once, ours against `transformers serve` with the same weights; then
a soak of readers that hang up. Servers and readers are processes of this machine."""

import asyncio
import json
import os
import random
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import httpx
import loading
import prompts
import safetensors.torch
import torch

from common import OUT, atomic, build, main

HERE = Path(__file__).resolve().parent
GOAL = 3.0  # times their tokens/s with 8 readers
QUESTIONS = (
    "Why is the sky blue?", "Name three birds and where they live.", "Tell me about the sea.",
    "What is a prime number?", "Explain rain to a child.", "Describe a quiet village.",
    "How is bread made?", "What do bees do all day?",
)  # fmt: skip


@dataclass
class Options:
    parts: str = "load,turns,soak"  # what to measure
    streams: str = "1,8,32"  # readers at once
    rounds: int = 3  # of each, medians are told; with 32 readers one, as theirs take minutes
    max_tokens: int = 64  # length of an answer, tokens
    peers: str = "transformers"  # and transformers-cb, with its continuous batching
    soak: int = 600  # seconds of readers that hang up
    record: bool = False  # append the results to results.jsonl


# ---- the servers


def write_model():
    """SmolLM2 as a directory of Hugging Face's layout, float32, which both servers load."""
    home = OUT / "11_serve" / "bench-smollm2"
    if not (home / "model.safetensors").exists():
        config, tensors, files = loading.read(loading.find_gguf())
        config |= dict(architectures=["LlamaForCausalLM"], torch_dtype="float32")
        config = {k: v for k, v in config.items() if v is not None}
        for name, text in {**files, "config.json": json.dumps(config)}.items():
            with atomic(home / name, "w") as file:
                file.write(text)
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        with atomic(home / "model.safetensors") as file:
            file.write(safetensors.torch.save(tensors, {"format": "pt"}))
    return home


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Server:
    """A server in a process of its own; it answers once this is made."""

    def __init__(self, kind, home):
        port = free_port()
        ours = [sys.executable, HERE / "run.py", "serve", "--port", str(port), "--device", "cpu"]
        command = [*ours, "--model", home]
        if kind != "ours":
            program = Path(sys.executable).with_name("transformers")
            command = [program, "serve", home, "--port", str(port), "--device", "cpu"]
            command += ["--dtype", "float32"]
            command += ["--continuous-batching"] * (kind == "transformers-cb")
        self.kind, self.url, self.model = kind, f"http://127.0.0.1:{port}", str(home)
        log = open(OUT / "11_serve" / f"bench-{kind}.log", "w")
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        if kind == "ours":
            self.model = None  # the one that --model names
        deadline = time.monotonic() + 180
        while True:
            try:
                asyncio.run(self.warm())
                return
            except httpx.HTTPError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise ValueError(f"{kind} does not answer: see {log.name}") from None
                time.sleep(0.5)

    async def warm(self):
        async with httpx.AsyncClient(base_url=self.url, timeout=170) as http:
            await ask(http, self.model, "Hello", 4)

    def rss(self):
        """Memory of the process, MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# ---- the readers


async def ask(http, model, text, max_tokens, **more):
    """(the answer, seconds to its first piece, seconds in all) of a question, read as a stream."""
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    body = dict(messages=messages, max_tokens=max_tokens, temperature=0, stream=True) | more
    body |= {} if model is None else {"model": model}
    began, first, answer = time.perf_counter(), None, ""
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                data = json.loads(line[6:])
                if "error" in data:
                    raise httpx.RemoteProtocolError(str(data["error"]))
                for choice in data["choices"]:
                    if piece := choice["delta"].get("content"):
                        first = first or time.perf_counter() - began
                        answer += piece
    return answer, first, time.perf_counter() - began


def questions(n, seed):
    """n questions, one in four behind a passage of about 300 tokens; no two rounds share one, so
    that no round finds another's prompt in the cache."""
    draw, asked = random.Random(seed), []
    words = "the king and his daughter went down to the shore where a ship lay at anchor".split()
    for i in range(n):
        text = f"({seed}.{i}) {QUESTIONS[i % len(QUESTIONS)]}"
        if i % 4 == 3:
            text = " ".join(draw.choice(words) for _ in range(290)) + ". " + text
        asked.append(text)
    return asked


async def load(server, tokenizer, n, seed, max_tokens):
    """What n readers at once see: tokens/s in all and of one, seconds to the first token."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=900, limits=limits) as http:
        began = time.perf_counter()
        told = await asyncio.gather(
            *(ask(http, server.model, text, max_tokens) for text in questions(n, seed)),
            return_exceptions=True,
        )
        seconds = time.perf_counter() - began
    good = [row for row in told if not isinstance(row, Exception)]
    tokens = [len(tokenizer.encode(text, False)) for text, _, _ in good]
    each = [t / (whole - first) for t, (_, first, whole) in zip(tokens, good) if first and t > 4]
    return dict(
        lost=n - len(good), tokens=sum(tokens), tokens_per_s=sum(tokens) / seconds,
        per_stream=statistics.median(each) if each else 0.0,
        first=statistics.median(first or seconds for _, first, _ in good) if good else seconds,
    )  # fmt: skip


def compare(o, home, tokenizer):
    """Rounds of all servers in turn; returns {(kind, n): medians}."""
    kinds = ["ours", *filter(None, o.peers.split(","))]
    servers, rows = [Server(kind, home) for kind in kinds], {}
    try:
        for n in map(int, o.streams.split(",")):
            for turn in range(o.rounds if n < 32 else 1):
                for server in servers:
                    row = asyncio.run(load(server, tokenizer, n, 100 * n + turn, o.max_tokens))
                    rows.setdefault((server.kind, n), []).append(row)
                    print(
                        f"{n:2} readers, {server.kind:12} {row['tokens_per_s']:7.1f} tokens/s, "
                        f"{row['per_stream']:5.1f} each, first after {row['first']:6.2f} s, "
                        f"{row['tokens']} tokens, {row['lost']} lost",
                        flush=True,
                    )
    finally:
        for server in servers:
            server.stop()
    return {
        key: {name: statistics.median(row[name] for row in found) for name in found[0]}
        for key, found in rows.items()
    }


def floor():
    """GB/s of a copy: what reading all weights for a pass would take at least."""
    x = torch.ones(2**26)
    y = torch.empty_like(x)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        y.copy_(x)
        times.append(time.perf_counter() - began)
    return 2 * x.nbytes / min(times) / 1e9


# ---- turns of a chat


async def turns(server, n=6):
    """Seconds to the first token of each turn of one chat, asked again with all before it."""
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
        messages, firsts = [], []
        for i in range(n):
            passage = " ".join(f"word{i}{k % 7}" for k in range(60))
            messages.append({"role": "user", "content": f"{passage} {QUESTIONS[i]}"})
            answer, first, _ = await ask(http, server.model, messages, 32)
            firsts.append(first)
            messages.append({"role": "assistant", "content": answer})
    return firsts


# ---- a soak


def metrics(server):
    text = httpx.get(server.url + "/metrics", timeout=60).text
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if line[:1] not in ("#", ""))
    return {name.partition("{")[0]: float(value) for name, value in rows}


async def reader(server, number, end, counts):
    """Asks until the end; one answer in three is left at some moment, maybe before it begins."""
    draw = random.Random(number)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        while time.monotonic() < end:
            text = " ".join(draw.choice(QUESTIONS) for _ in range(draw.choice((1, 1, 2, 20))))
            how = dict(temperature=draw.choice((0, 1)), stop=draw.choice(([], ["the"])))
            wanted = -1 if draw.random() < 0.02 else draw.randint(1, 80)
            asking = ask(http, None, text, wanted, **how)
            leaves = draw.random() < 1 / 3
            try:
                await asyncio.wait_for(asking, draw.expovariate(1) if leaves else 120)
                counts["answered"] += 1
            except asyncio.TimeoutError:
                counts["left" if leaves else "stuck"] += 1
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                expected = {400: "refused", 429: "told to wait"}
                counts[expected.get(status, "failed")] += 1
                await asyncio.sleep(status == 429)
            except httpx.HTTPError:
                counts["failed"] += 1


async def soak(server, seconds, readers=16):
    """Readers for so many seconds; what is left of them then. [(second, MiB, running), ...]"""
    names = ("answered", "left", "refused", "told to wait", "stuck", "failed")
    counts, seen, began = dict.fromkeys(names, 0), [], time.monotonic()
    tasks = [
        asyncio.create_task(reader(server, i, began + seconds, counts)) for i in range(readers)
    ]
    while time.monotonic() < began + seconds:
        await asyncio.sleep(5)
        state = await asyncio.to_thread(metrics, server)
        seen.append((time.monotonic() - began, server.rss(), state["llm_running"]))
    await asyncio.gather(*tasks)
    await asyncio.sleep(5)
    state = await asyncio.to_thread(metrics, server)
    settled = [row for row in seen if row[0] >= min(120, seconds / 3)]
    grown = settled[-1][1] - settled[0][1]
    print(f"soak of {seconds} s, {readers} readers: {counts}")
    most = max(running for _, _, running in seen)
    print(
        f"memory {settled[0][1]:,.0f} MiB after {settled[0][0]:.0f} s, {settled[-1][1]:,.0f} at "
        f"the end: {grown:+,.1f} MiB ({grown / settled[0][1]:+.2%}); {most:.0f} streams at most"
    )
    left = state["llm_running"] + state["llm_waiting"]
    held = state["llm_cache_pages"] - state["llm_cache_pages_free"]
    flat = abs(grown) / settled[0][1] < 0.03
    met = flat and not left and not held and not counts["stuck"] and not counts["failed"]
    print(
        f"{'met' if met else 'MISSED'}: flat memory (3%), no stuck slot: {left:.0f} streams and "
        f"{held:.0f} pages held 5 s after the end, {counts['stuck'] + counts['failed']} lost"
    )
    return counts | dict(grown_mib=grown, rss_mib=settled[-1][1], held=held, left=left)


# ---- all of it


def bench(given):
    """ours against `transformers serve`, then a soak of readers that hang up"""
    o, results, parts = build(Options, given), {}, None
    parts = o.parts.split(",")
    home = write_model()
    tokenizer = prompts.QuickTokenizer(home)
    gigabytes = floor()
    weights = (home / "model.safetensors").stat().st_size / 1e9
    print(f"a copy moves {gigabytes:.1f} GB/s: {weights:.2f} GB of weights take at least "
          f"{1e3 * weights / gigabytes:.0f} ms a pass")  # fmt: skip
    if "load" in parts:
        found = compare(o, home, tokenizer)
        for n in map(int, o.streams.split(",")):
            ours = found["ours", n]
            for kind in filter(None, o.peers.split(",")):
                theirs = found[kind, n]
                ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
                goal = f", goal {GOAL}: {'met' if ratio >= GOAL else 'MISSED'}" if n == 8 else ""
                print(f"{n} readers: {ratio:.2f} times {kind}'s tokens/s{goal}")
                results[f"ratio_{kind}_{n}"] = ratio
            results |= {f"{kind}_{n}": found[kind, n] for kind, m in found if m == n}
    if "turns" in parts or "soak" in parts:
        server = Server("ours", home)
        try:
            if "turns" in parts:
                firsts = asyncio.run(turns(server))
                said = ", ".join(f"{s:.2f}" for s in firsts)
                reused = metrics(server)["llm_reused_tokens_total"]
                print(
                    f"first token of each turn of a chat after {said} s; {reused:.0f} tokens found"
                )
                results |= dict(turns=firsts, reused=reused)
            if "soak" in parts:
                results["soak"] = asyncio.run(soak(server, o.soak))
        finally:
            server.stop()
    with atomic(OUT / "11_serve" / "bench.json", "w") as file:
        json.dump(results, file, indent=1)
    if o.record and "load" in parts:
        record(o, results)


def record(o, results):
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=HERE, capture_output=True, text=True).stdout.strip()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    command = " ".join(["11_serve/bench.py", *sys.argv[1:]])
    for n in map(int, o.streams.split(",")):
        ours = results[f"ours_{n}"]
        row = dict(commit=commit, machine=f"{os.cpu_count()} CPU cores", command=command)
        row |= dict(model="smollm2", readers=n, tokens_per_s=ours["tokens_per_s"])
        row |= dict(per_stream=ours["per_stream"], first_token_s=ours["first"], lost=ours["lost"])
        for kind in filter(None, o.peers.split(",")):
            theirs = results[f"{kind}_{n}"]
            row |= {"their_tokens_per_s": theirs["tokens_per_s"], "their_first": theirs["first"]}
            row |= {"ratio": results[f"ratio_{kind}_{n}"]}
        with open(HERE / "results.jsonl", "a") as file:
            file.write(json.dumps(row | dict(peak_gib=round(peak, 2))) + "\n")


if __name__ == "__main__":
    main({"bench": (bench, Options)})
