"""Load: 1, 8 and 32 streams at once, ours against `transformers serve`; then clients that hang up.

All servers have the same float32 weights and run as processes of their own on ports of 127.0.0.1.
The same client asks them the same questions in turn, greedily, and halts (SIGSTOP) whom it does not
ask. One question in four follows a passage of 300 tokens; no two are alike. Tokens are those of the
server's `usage`, the end token with them. By default transformers serves one request after the
other; transformers-cb is its --continuous-batching.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import engine
import httpx
import loading
import prompts
import safetensors.torch
import torch

from common import OUT, atomic, build, main

HERE, HOME = Path(__file__).resolve().parent, OUT / "11_serve"
GOAL = 3.0  # times the tokens/s of transformers with 8 streams
# Its cache would else be nine tenths of the memory, and take half a minute to fill with zeros.
BATCHING = ["--continuous-batching", "--cb-max-memory-percent", "0.1"]
PEERS = {"transformers": [], "transformers-cb": BATCHING}
QUESTIONS = (
    "Why is the sky blue?", "Describe three birds and where they live.", "Tell me about the sea.",
    "What is a prime number?", "Explain rain to a child.", "Describe a quiet village.",
    "How is bread made?", "What do bees do all day?",
)  # fmt: skip
WORDS = "the king and his daughter went down to the shore where a ship lay at anchor".split()
REFUSED = (  # with 400
    dict(max_tokens=-1), dict(temperature=9), dict(n=99), dict(messages=[]), dict(tools=[{}]),
    dict(messages=[{"role": "judge", "content": "?"}]), dict(max_tokens=10**6),
)  # fmt: skip


@dataclass
class Options:
    parts: str = "load,turns,soak"  # what to measure
    streams: str = "1,8,32"  # requests at once
    rounds: int = 3  # of each, medians are told; above 8 streams one for transformers
    max_tokens: int = 64  # longest answer, tokens; above 8 streams half of that
    peers: str = "transformers,transformers-cb"  # whom to measure against
    soak: int = 600  # seconds of clients that hang up
    record: bool = False  # append the results of load to results.jsonl


def write_model():
    """SmolLM2 as a float32 directory that all can load, or the newest model that can chat."""
    try:
        path, home = loading.find_gguf(), HOME / "bench-smollm2"
    except ValueError:
        found = sorted(OUT.glob("*/*/model.safetensors"), key=lambda p: -p.stat().st_mtime)
        for path in (p.parent for p in found):
            scores = "Sequence" in (path / "config.json").read_text()  # 08's write nothing
            if not scores and not prompts.ChatTemplate(path).plain:
                return path
        raise
    if not (home / "model.safetensors").exists():
        config, tensors, files = loading.read(path)
        config = {k: v for k, v in config.items() if v is not None}
        config |= dict(architectures=["LlamaForCausalLM"], torch_dtype="float32")
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        files = {name: text.encode() for name, text in files.items()}
        files["config.json"] = json.dumps(config).encode()
        files["model.safetensors"] = safetensors.torch.save(tensors, {"format": "pt"})
        for name, data in files.items():  # the weights last
            with atomic(home / name) as file:
                file.write(data)
    return home


@contextlib.contextmanager
def serving(kind, home, *more):
    """A server in a process of its own, once it has answered."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = str(sock.getsockname()[1])
    command = [sys.executable, HERE / "run.py", "serve", "--model", home]
    if kind != "ours":
        program = Path(sys.executable).with_name("transformers")
        command = [program, "serve", home, "--dtype", "float32", *PEERS[kind]]
    command += ["--host", "127.0.0.1", "--port", port, "--device", "cpu", *more]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    with open(HOME / f"bench-{kind}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
        model = {} if kind == "ours" else {"model": str(home)}
        server = SimpleNamespace(
            kind=kind, process=process, url=f"http://127.0.0.1:{port}", model=model
        )
        end = time.monotonic() + 180
        while asyncio.run(load(server, ["Hello"], 4))[0]["lost"]:
            if process.poll() is not None or time.monotonic() > end:
                raise ValueError(f"{kind} does not answer: see {log.name}")
            time.sleep(0.5)
        yield server
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def rss(server):
    """Memory of its process, MiB."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)|$", text)[1] or 0) / 1024


def metrics(server):
    """{name: value} of ours, which has one model."""
    rows = re.findall(r"^llm_(\w+)\S* (\S+)$", httpx.get(server.url + "/metrics").text, re.M)
    return {name.removesuffix("_total"): float(value) for name, value in rows}


# ---- load


async def ask(http, text, max_tokens, model):
    """(answer, its tokens, seconds to the first text, seconds in all), read as a stream; HTTPError
    where it does not come to an end."""
    body = dict(messages=[{"role": "user", "content": text}], max_tokens=max_tokens, temperature=0)
    body |= dict(stream=True, stream_options={"include_usage": True}) | model
    began, first, answer, tokens = time.perf_counter(), None, "", None
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            data = json.loads(line[6:]) if line.startswith("data: {") else {}
            tokens = (data.get("usage") or {}).get("completion_tokens", tokens)
            for choice in data.get("choices", ()):
                if text := choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    answer += text
    seconds = time.perf_counter() - began
    if tokens is None:  # it comes last, and not where the answer failed
        raise httpx.RemoteProtocolError("the answer broke off")
    return answer, tokens, first or seconds, seconds


def questions(n, seed, tokenizer, context):
    """n questions; each says which it is, so that no cache knows more than the system's prompt."""
    draw, asked = random.Random(seed), []
    for i in range(n):
        passage = tokenizer.encode(" ".join(draw.choice(WORDS) for _ in range(300)), False)
        before = tokenizer.decode(passage[: min(300, context // 2)]) + ". " if i % 4 == 3 else ""
        asked.append(f"{seed}.{i} {before}{QUESTIONS[i % len(QUESTIONS)]}")
    return asked


async def load(server, asked, max_tokens):
    """What those see who ask all at once, and the answers, None for one that was lost."""
    how = dict(timeout=600, limits=httpx.Limits(max_connections=None))
    async with httpx.AsyncClient(base_url=server.url, **how) as http:
        began = time.perf_counter()
        told = await asyncio.gather(
            *(ask(http, text, max_tokens, server.model) for text in asked), return_exceptions=True
        )
        seconds = time.perf_counter() - began
    good = [row for row in told if not isinstance(row, Exception)]
    tokens, firsts = sum(n for _, n, _, _ in good), [first for _, _, first, _ in good] or [seconds]
    each = [(n - 1) / (whole - first) for _, n, first, whole in good if whole > first] or [0.0]
    return dict(
        lost=len(asked) - len(good), tokens=tokens, tokens_per_s=tokens / seconds, seconds=seconds,
        per_stream=statistics.median(each), first=statistics.median(firsts), last=max(firsts),
        rss_mib=rss(server),
    ), [None if isinstance(row, Exception) else row[0] for row in told]  # fmt: skip


def compare(o, servers, tokenizer, config, copy):
    """Rounds of all servers in turn; returns {kind: {n: medians}}."""
    rows = {}
    for n, turn in itertools.product(map(int, o.streams.split(",")), range(o.rounds)):
        asked = questions(n, 100 * n + turn, tokenizer, config.context_length)
        expected, max_tokens = None, o.max_tokens if n <= 8 else o.max_tokens // 2
        for server in servers:
            if server.kind == "transformers" and n > 8 and turn:
                continue  # it takes minutes
            server.process.send_signal(signal.SIGCONT)
            before = metrics(server) if server.kind == "ours" else None
            row, told = asyncio.run(load(server, asked, max_tokens))
            if before:
                after = metrics(server)
                count, fed = (after[k] - before[k] for k in ("passes", "pass_tokens"))
                share = weight_bytes(config) * count / row["seconds"] / copy
                row |= dict(passes=count, pass_tokens=fed / count, copy_share=share)
            server.process.send_signal(signal.SIGSTOP)
            expected = expected or told
            row["same"] = sum(a == b for a, b in zip(told, expected))
            rows.setdefault(server.kind, {}).setdefault(n, []).append(row)
            print(
                f"{n:2} streams, {server.kind:15} {row['tokens_per_s']:5.1f} tokens/s, "
                f"{row['per_stream']:4.1f} each; first after {row['first']:5.2f} s, at most "
                f"{row['last']:5.2f}; {row['tokens']} tokens, {row['lost']} lost, "
                f"{row['same']} as ours, {row['rss_mib']:,.0f} MiB",
                flush=True,
            )
    for by_n in rows.values():
        for n, found in by_n.items():
            by_n[n] = {k: statistics.median(row[k] for row in found) for k in found[0]}
            by_n[n] |= dict(lost=sum(row["lost"] for row in found), rounds=len(found))
    return rows


def copy_speed():
    """Bytes/s of a copy, read and written: the best of 5."""
    x, y, times = torch.ones(2**26), torch.ones(2**26), []
    for _ in range(5):
        began = time.perf_counter()
        y.copy_(x)
        times.append(time.perf_counter() - began)
    return 2 * x.nbytes / min(times)


def weight_bytes(c):
    """What a pass reads: the blocks' matrices and the output layer's, float32."""
    heads = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    return 4 * c.d_model * (c.n_layers * (heads + 3 * c.d_ff) + c.vocab_size)


# ---- turns of a chat


def turns(model, home, tokenizer, rounds, n=6):
    """Seconds to the first token of each turn of a chat, with and without reuse of what is in the
    cache; the engine alone."""
    template, found = prompts.ChatTemplate(home), {"with": [], "without": []}
    stops = frozenset(template.stops(tokenizer))
    how = engine.Sampling(max_tokens=32, temperature=0.0, stop_tokens=stops)
    for _, (name, seen) in itertools.product(range(rounds), found.items()):
        writer = engine.Engine(model, tokenizer, 2**28, step_tokens=256, reuse=name == "with")
        messages, firsts = [], []
        for i in range(n):
            text = " ".join(f"{word}{i}" for word in WORDS) + f". {QUESTIONS[i]}"
            messages.append({"role": "user", "content": text})
            began, told = time.perf_counter(), []
            for piece in writer.generate(template.encode(messages, tokenizer), how):
                told.append((time.perf_counter() - began, piece.text))
            firsts.append(told[0][0])
            messages.append({"role": "assistant", "content": "".join(text for _, text in told)})
        writer.close()
        seen.append((*firsts, writer.counts["pass_tokens"]))
    for name, seen in found.items():
        *firsts, fed = found[name] = [statistics.median(column) for column in zip(*seen)]
        said = ", ".join(f"{seconds:.2f}" for seconds in firsts)
        print(f"chat {name} reuse: first token of each turn after {said} s; {fed:.0f} tokens fed")
    print(f"turn {n}: {found['without'][-2] / found['with'][-2]:.2f} times sooner with reuse")
    return found


# ---- a soak


async def client(server, number, end, counts, context):
    """Asks until the end; one request in three is left at some moment, maybe before its answer
    begins, streamed or not, and one in thirty is bad."""
    draw, long = random.Random(number), min(50, context // 40)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        while time.monotonic() < end:
            text = " ".join(draw.choice(QUESTIONS) for _ in range(draw.choice((1, 1, 2, long))))
            body = dict(messages=[{"role": "user", "content": text}], n=draw.choice((1, 1, 1, 3)))
            body |= dict(temperature=draw.choice((0, 1)), stop=draw.choice(([], ["the"])))
            body |= dict(max_tokens=draw.randint(1, 80), stream=draw.random() < 0.7)
            bad = draw.random() < 1 / 30
            body |= draw.choice(REFUSED) if bad else {}
            leaves = not bad and draw.random() < 1 / 3
            asking = http.post("/v1/chat/completions", json=body)
            try:  # when the time is up the connection is closed
                reply = await asyncio.wait_for(asking, draw.expovariate(0.5) if leaves else 110)
                status, text = reply.status_code, reply.text
                whole = text.endswith("[DONE]\n\n") or not body["stream"]
                whole = whole and status == 200 and '"error":' not in text and not bad
                told = "answered" if whole else "refused" if bad and status == 400 else text[-200:]
            except asyncio.TimeoutError:
                told = "left" if leaves else "no end"
            except httpx.HTTPError as error:
                told = repr(error)
            counts[told] += 1


async def soak(server, seconds, context, clients=16):
    """Clients for so many seconds; what is left of them 5 seconds after the last."""
    counts, seen, began = Counter(), [], time.monotonic()
    each = (client(server, i, began + seconds, counts, context) for i in range(clients))
    going = [asyncio.create_task(one) for one in each]
    while (now := time.monotonic() - began) < seconds:
        state = await asyncio.to_thread(metrics, server)
        running, waiting, free = (state[k] for k in ("running", "waiting", "cache_pages_free"))
        seen.append((now, rss(server), running + waiting))
        if len(seen) % 12 == 1:  # each minute
            print(f"{now:3.0f} s: {running:.0f} running, {waiting:.0f} waiting, {free:.0f} pages "
                  f"free, {seen[-1][1]:,.0f} MiB, {counts.total()} asked", flush=True)  # fmt: skip
        await asyncio.sleep(5)
    await asyncio.gather(*going)
    await asyncio.sleep(5)
    state, start = await asyncio.to_thread(metrics, server), min(120, seconds / 3)
    settled = [mib for now, mib, _ in seen if now >= start]
    few = max(1, min(6, len(settled) // 2))  # one reading is noisy
    first, last = statistics.median(settled[:few]), statistics.median(settled[-few:])
    left = state["running"] + state["waiting"]
    held = state["cache_pages"] - state["cache_pages_free"]
    lost = counts.total() - sum(counts[k] for k in ("answered", "left", "refused"))
    met = abs(last / first - 1) < 0.03 and not (held or left or lost or state["failures"])
    print(
        f"soak of {seconds} s, {clients} clients, up to {max(n for _, _, n in seen):.0f} streams: "
        f"{counts.total()} requests, {dict(counts)}; {state['finished_cancelled']:.0f} cancelled, "
        f"{state['preemptions']:.0f} put back for want of memory; {lost} lost\n"
        f"{first:,.0f} MiB after {start:.0f} s, {last:,.0f} at the end: {last - first:+.1f} MiB "
        f"({last / first - 1:+.2%}); 5 s later {left:.0f} streams, {held:.0f} pages held\n"
        f"{'met' if met else 'MISSED'}: flat memory (3%), no stuck slot, none lost"
    )
    return dict(counts=counts, first_mib=first, last_mib=last, held=held, left=left, met=met)


# ---- all of it


def logit_gap(model, home, tokenizer):
    """How far our logits are from those of transformers on one prompt."""
    import transformers

    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("The sea is wide, and the ship is small.", False)])
    with torch.inference_mode():
        return (model(ids) - theirs(ids).logits).abs().max().item()


def bench(given):
    """ours against `transformers serve`, turns of a chat, then a soak of clients that hang up"""
    o = build(Options, given)
    parts, peers = o.parts.split(","), [*filter(None, o.peers.split(","))]
    if unknown := {*parts} - {"load", "turns", "soak"} or {*peers} - {*PEERS}:
        raise ValueError(f"{min(unknown)}: parts are load, turns, soak, peers {', '.join(PEERS)}")
    numbers = all(n.isdecimal() and int(n) for n in o.streams.split(","))
    if not numbers or o.rounds < 1 or o.max_tokens < 4 or o.soak < 15:
        raise ValueError("--streams are from 1, --rounds too, --max_tokens from 4, --soak from 15")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    home, copy = write_model(), copy_speed()
    tokenizer, (model, _) = prompts.QuickTokenizer(home), engine.load(home)
    config, size = model.config, weight_bytes(model.config)
    result = dict(options=given, threads=torch.get_num_threads(), copy=copy)
    print(f"a copy moves {copy / 1e9:.1f} GB/s: the weights of a pass, {size / 1e9:.2f} GB, take "
          f"{1000 * size / copy:.0f} ms at that rate")  # fmt: skip
    result["gap"] = logit_gap(model, home, tokenizer)
    print(f"{home.name}: logits within {result['gap']:.1g} of those of transformers")
    if "turns" in parts and config.context_length >= 2048:
        result["turns"] = turns(model, home, tokenizer, o.rounds)
    del model
    if "load" in parts:
        with contextlib.ExitStack() as stack:
            servers = []
            for kind in ("ours", *peers):
                servers.append(stack.enter_context(serving(kind, home)))
                servers[-1].process.send_signal(signal.SIGSTOP)
            result["load"] = found = compare(o, servers, tokenizer, config, copy)
        for n, ours in found["ours"].items():
            print(
                f"{n} streams, ours {ours['tokens_per_s']:.1f} tokens/s, {ours['pass_tokens']:.1f} "
                f"tokens a pass, weights read at {ours['copy_share']:.0%} of a copy's rate"
            )
            for kind in peers:
                theirs = found[kind][n]
                theirs["ratio"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
                met = "met" if theirs["ratio"] >= GOAL and not ours["lost"] else "MISSED"
                goal = f"; {met}: goal {GOAL}, none lost" * (n == 8 and kind == "transformers")
                print(
                    f"{n} streams, {kind} {theirs['tokens_per_s']:.1f} tokens/s, rounds: "
                    f"{theirs['rounds']}; ratio {theirs['ratio']:.2f}{goal}"
                )
        if o.record:
            record(found, home)
    if "soak" in parts:
        with serving("ours", home, "--cache_gib", "0.1") as server:  # small: streams are put back
            result["soak"] = asyncio.run(soak(server, o.soak, config.context_length))
    with atomic(HOME / "bench.json", "w") as file:
        json.dump(result, file, indent=1)


def record(found, home):
    """Append a line for each number of streams to results.jsonl."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=HERE, capture_output=True, text=True).stdout.strip()
    command, names = " ".join(["11_serve/bench.py", *sys.argv[1:]]), "tokens_per_s first ratio"
    for n, ours in found["ours"].items():
        row = dict(commit=commit, machine=f"{os.cpu_count()} CPU cores", command=command)
        row |= dict(model=home.name.removeprefix("bench-"), streams=n, lost=ours["lost"])
        for kind, by_n in found.items():
            row |= {f"{kind} {k}": by_n[n][k] for k in names.split() if k in by_n[n]}
        with open(HERE / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main({"bench": (bench, Options)})
