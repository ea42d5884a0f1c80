"""Serve a model: chat page, OpenAI's API, training dashboard. README.md says more."""

import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

try:
    import engine
    import gate
    import jobs
    import loading
    import remote
    import serve as server
    import uvicorn
except ImportError as error:
    if error.name not in ("fastapi", "uvicorn", "jinja2", "pydantic", "starlette"):
        raise
    sys.exit(f"error: {error.name} is missing: make .venv/serve, or pip install fastapi uvicorn")

from common import OUT, build, main, pick_device

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    model: str | None = None  # directory, .gguf file or smollm2; None: the newest under out/
    host: str = "127.0.0.1"  # address to listen at; others than loopback need API_KEY to be set
    port: int = 8000  # port to listen at; 0 takes a free one
    hosts: str = ""  # names under which it may be called, with commas; empty: those of this machine
    store: str | None = None  # s3://bucket/prefix whose runs the dashboard shows, too
    allow: str = ""  # directories beside out/ whose files runs may read, with commas
    models: int = 3  # models in memory at once
    cache_gib: float | None = None  # memory for keys and values of a model, GiB; None: what fits
    jobs: int = 2  # runs that the page may have going at once
    device: str = "auto"  # auto, cpu, cuda or cuda:1


@dataclass
class AskOptions:
    prompt: str = "What is 2 + 3?"  # what to say
    max_tokens: int = 100  # length of the answer, tokens
    temperature: float = 0.0  # 0 always takes the likeliest token
    seed: int = 1  # of the draw


def serve(given):
    """answer at http://127.0.0.1:8000: the page, the API and the training dashboard"""
    o, limits = build(Options, given), build(gate.Limits, given)
    key = os.environ.get("API_KEY") or None
    if not 0 <= o.port < 2**16:
        raise ValueError(f"--port {o.port} is not between 0 and 65535")
    if not loopback(o.host) and not key:
        raise ValueError(
            f"--host {o.host} lets others in: set API_KEY=... in the environment, which they have "
            "to show, or listen at 127.0.0.1 and come through ssh -L"
        )
    if key is not None and (len(key) < 16 or not key.isascii() or not key.isprintable()):
        raise ValueError("API_KEY is shorter than 16 characters, or not plain ASCII")
    sock = listen(o.host, o.port)  # before anything is loaded: a port in use is told at once
    models, device, reason = open_models(o, limits)
    store = models.remote
    allowed = tuple(Path(p) for p in o.allow.split(",") if p)
    work = jobs.Jobs(ROOT, OUT, allow=allowed, most=o.jobs, store=o.store)
    names = tuple(n.strip().lower() for n in o.hosts.split(",") if n.strip())
    known = (*gate.LOOPBACK, *names) if names or loopback(o.host) else None
    app = server.create_app(models, work, store, key, known, limits)
    default = models.default()
    print(f"device: {device} ({reason}), {str(models.dtype).removeprefix('torch.')}")
    print(f"model: {default}", flush=True)
    get(models, default)  # what is wrong with it is told now
    where = f"[{o.host}]" if ":" in o.host else o.host
    print(f"http://{where}:{sock.getsockname()[1]}/  (Ctrl-C stops)", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", timeout_keep_alive=15, timeout_graceful_shutdown=3,
        ws_max_size=2**16, server_header=False, h11_max_incomplete_event_size=2**16,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[sock])


def ask(given):
    """print one answer, without a server"""
    o, a, limits = build(Options, given), build(AskOptions, given), build(gate.Limits, given)
    models, _, _ = open_models(o, limits)
    one = get(models, models.default())
    plain = one.template.plain
    messages = [{"role": "user", "content": a.prompt}]
    ids = (
        one.tokenizer.encode(a.prompt, False)
        if plain
        else one.template.encode(messages, one.tokenizer)
    )
    how = dict(max_tokens=a.max_tokens, temperature=a.temperature, seed=a.seed)
    stops = frozenset(one.template.stops(one.tokenizer))
    for piece in one.engine.generate(ids, engine.Sampling(stop_tokens=stops, **how)):
        print(piece.text, end="", flush=True)
    print()
    models.close()


def open_models(o, limits):
    """(Models, device, the reason for it); where there is no model, a small random one is made."""
    device, dtype, reason = pick_device(o.device)
    store = remote.Remote(o.store, OUT / "11_serve" / "downloads") if o.store else None
    cache = None if o.cache_gib is None else int(o.cache_gib * 2**30)
    first = model_path(o.model)
    models = server.Models(OUT, device, dtype, limits, first, store, o.models, cache)
    if models.default() is None:
        loading.write_random(OUT / "11_serve" / "random")
        print("no model under out/: a small random one answers; make 05 trains a better one")
    return models, device, reason


def get(models, name):
    try:
        return models.get(name)
    except gate.APIError as error:
        raise ValueError(str(error)) from None


def loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host, port):
    """A socket bound to host and port; ValueError where that is not to be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen at {host}:{port}: {error}; another program may, or --port"
        ) from None
    return sock


def model_path(name):
    """The directory or file that --model names, or None."""
    if name is None:
        return None
    path = loading.find_gguf() if name == "smollm2" else Path(name)
    if not path.exists() or (path.is_dir() and not (path / "config.json").exists()):
        raise ValueError(f"--model {name} holds no model: a directory with config.json or a .gguf")
    return path.resolve()


if __name__ == "__main__":
    main(
        {
            "serve": (serve, Options, gate.Limits),
            "ask": (ask, Options, AskOptions),
        }
    )
