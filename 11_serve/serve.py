"""The server: OpenAI's API over the engine, and the page.

What this stage teaches: how an answer travels from an engine's thread to a reader on the network,
piece by piece, and how the engine hears that the reader has hung up; what a chat API is, field by
field; and what not to trust: a model directory may hold a pickle, which is a program, so none is
read; a chat template is a program, too, so it runs in a sandbox.

Parent: none
New: everything

Read in this order: Models; the request bodies; Answers and respond, through which every answer
goes; chat and completion; create_app. gate.py says who may come in, engine.py is where the answers
come from, dashboard.py the training half of the page.

The API is that of platform.openai.com/docs/api-reference; metrics are in Prometheus's text format.
"""

import asyncio
import contextlib
import glob
import json
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import dashboard
import engine
import loading
import prompts
import torch
from engine import Busy, Sampling
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from gate import LOOPBACK, APIError, Gate, Limits, shows_key
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from common import atomic

HERE = Path(__file__).resolve().parent
DENSE = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


# ---- the models


@dataclass
class Loaded:
    """A model that answers: its engine, and how it reads and writes text."""

    id: str
    engine: engine.Engine
    tokenizer: prompts.QuickTokenizer
    template: prompts.ChatTemplate
    parameters: int
    file: Path  # of its weights, and when that was written
    written: int
    used: float = 0.0  # when it was last asked

    def idle(self):
        return not (self.engine.running or self.engine.waiting)


class Models:
    """The models under out/, and SmolLM2 where it is installed; at most `most` are in memory.

    One that is asked for is loaded; for it the one that was idle longest goes."""

    def __init__(
        self, out, device, dtype, limits, first=None, remote=None, most=3, cache_bytes=None
    ):
        self.out, self.device, self.dtype = Path(out), device, dtype
        self.limits, self.remote, self.most, self.cache_bytes = limits, remote, most, cache_bytes
        self.loaded, self.lock = {}, threading.Lock()
        self.first = first  # a directory or .gguf file that --model names
        self.loads = 0

    def listed(self):
        """[{"id", "created", ...}, ...], the newest first."""
        found = []
        # glob, as that of pathlib fails where a folder is removed while it looks.
        for path in map(Path, glob.glob(f"{glob.escape(str(self.out))}/*/*/model.safetensors")):
            if path.parent.is_symlink():  # latest
                continue
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it is none
                config = json.loads((path.parent / "config.json").read_text())
                if config["model_type"] in DENSE and "Sequence" not in str(config["architectures"]):
                    context = config.get("max_position_embeddings", config.get("n_positions"))
                    made = int(path.stat().st_mtime)
                    found.append((made, f"{path.parent.parent.name}/{path.parent.name}", context))
        found.sort(reverse=True)
        with contextlib.suppress(ValueError):
            path = loading.find_gguf()
            found.append((int(path.stat().st_mtime), "smollm2", 8192))
        if self.first and self.first_id() not in [model_id for _, model_id, _ in found]:
            found.insert(0, (int(self.first.stat().st_mtime), self.first_id(), None))
        known = [model_id for _, model_id, _ in found]
        found += [(0, model_id, None) for model_id in [*self.loaded] if model_id not in known]
        return [self.describe(*entry) for entry in found]

    def describe(self, made, model_id, context):
        one = self.loaded.get(model_id)
        entry = dict(id=model_id, object="model", created=made, owned_by="llm-from-nothing")
        entry |= dict(context_length=one.engine.model.config.context_length if one else context)
        entry |= dict(parameters=one and one.parameters, loaded=one is not None)
        return entry | dict(plain=one.template.plain if one else self.is_plain(model_id))

    def is_plain(self, model_id):
        """Whether a model that is not loaded has no chat template: it goes on with text."""
        with contextlib.suppress(OSError, ValueError):
            path = self.path(model_id)
            if path.is_dir():
                config = path / "tokenizer_config.json"
                template = config.exists() and "chat_template" in json.loads(config.read_text())
                return not (template or (path / "chat_template.jinja").exists())
        return False

    def first_id(self):
        """The id of what --model names: its place under out/, or else its name."""
        with contextlib.suppress(ValueError):
            parts = self.first.resolve().relative_to(self.out.resolve()).parts
            if len(parts) == 2:
                return "/".join(parts)
        if self.first == loading_path():
            return "smollm2"
        return self.first.stem if self.first.suffix == ".gguf" else self.first.name

    def default(self):
        """The id of the model that answers where none is named: what --model says, or the newest
        of our own. None where there is no model."""
        if self.first:
            return self.first_id()
        return next((m["id"] for m in self.listed() if m["id"] != "smollm2"), None)

    def path(self, model_id):
        """The directory or file of a model; ValueError where there is none."""
        if self.first and model_id == self.first_id():
            return self.first
        if model_id == "smollm2":
            return loading.find_gguf()
        return dashboard.resolve(self.out, self.remote, model_id)

    def get(self, model_id=None):
        """The Loaded model with this id, loaded now if need be. Takes a while: not for the event
        loop. APIError 404 where there is none or it cannot be read."""
        model_id = model_id or self.default()
        if model_id is None:
            raise APIError(
                404, "there is no model under out/ yet: make 05 trains one", "model_not_found"
            )
        one = self.loaded.get(model_id)
        if one is None or self.outdated(one):  # only who needs it waits for its loading
            with self.lock:
                one = self.loaded.get(model_id)
                if one and self.outdated(one):
                    self.loaded.pop(model_id).engine.close()
                    one = None
                one = self.loaded[model_id] = one or self.load(model_id)
        one.used = time.monotonic()
        return one

    def outdated(self, one):
        """Whether training has written its files anew since, and nobody is being answered."""
        with contextlib.suppress(OSError):
            return one.idle() and one.file.stat().st_mtime_ns != one.written
        return False  # the run was deleted: it answers as long as it is in memory

    def load(self, model_id):
        try:
            path = self.path(model_id)
        except ValueError as error:
            raise APIError(
                404, f"no model {model_id!r}: {error}", "model_not_found", "model"
            ) from None
        try:
            self.make_room()
            file = path / "model.safetensors" if path.is_dir() else path
            written = file.stat().st_mtime_ns if file.exists() else 0  # it may be in shards
            model, files = engine.load(path, self.device, self.dtype)
            directory = path if path.is_dir() else self.out / "11_serve" / f"{path.stem}-tokenizer"
            for name, text in {} if path.is_dir() else files.items():
                with atomic(directory / name, "w") as copy:
                    copy.write(text)
            whole = (directory / "tokenizer.json").exists()
            tokenizer = prompts.QuickTokenizer(directory if whole else None)
            template = prompts.ChatTemplate(directory)
        except (ValueError, OSError, ImportError) as error:
            raise APIError(404, f"{model_id}: {error}", "model_not_found", "model") from None
        limits = self.limits
        serving = engine.Engine(
            model, tokenizer, self.cache_bytes or memory(self.device), limits.max_running,
            limits.max_waiting, 256 if self.device.type == "cpu" else 4096, limits.seconds,
        )  # fmt: skip
        n = sum(p.numel() for p in model.parameters())
        self.loads += 1
        return Loaded(model_id, serving, tokenizer, template, n, file, written)

    def make_room(self):
        """Unload the model that was idle longest, where there are too many."""
        idle = [one for one in self.loaded.values() if one.idle()]
        if len(self.loaded) >= self.most:
            if not idle:
                raise APIError(
                    503, f"all {self.most} models in memory are answering: try again", wait=5
                )
            oldest = min(idle, key=lambda m: m.used)
            self.loaded.pop(oldest.id).engine.close()

    def close(self):
        for one in [*self.loaded.values()]:
            one.engine.close()


def loading_path():
    with contextlib.suppress(ValueError):
        return loading.find_gguf()


def memory(device):
    """Bytes for a cache: 1 GiB, or of a GPU 40% of what is free."""
    return int(0.4 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 2**30


# ---- what a request may hold


class Fields(BaseModel):
    """What /v1/chat/completions and /v1/completions share; other fields are passed over."""

    model: str | None = Field(None, max_length=200)
    stream: bool = False
    stream_options: dict | None = None
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)  # 0 is none, as some clients have it
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, float] | None = Field(None, max_length=1024)
    seed: int | None = None
    stop: str | list[str] | None = None


class Part(BaseModel):
    type: str
    text: str = ""


class Message(BaseModel):
    role: str
    content: str | list[Part] | None = None


class ChatBody(Fields):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list | None = None
    functions: list | None = None
    response_format: dict | None = None


class CompletionBody(Fields):
    prompt: str | list[str] | list[int] | list[list[int]] = "\n"
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None


def sampling_of(body, room, limits, stops, extra_stop=(), top_logprobs=None):
    """The engine's Sampling for a body; `room` is what the prompt leaves of the context."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stop) > 16 or any(not s or len(s) > 500 for s in stop):
        raise APIError(400, "stop holds up to 16 strings of 1 to 500 characters", param="stop")
    wanted = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if wanted and wanted > limits.max_tokens:
        raise APIError(
            400,
            f"max_tokens {wanted} is more than this server's {limits.max_tokens}",
            None,
            "max_tokens",
        )
    names = "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty".split()
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    most = wanted or max(1, min(room, limits.max_tokens))
    return Sampling(
        max_tokens=most, top_k=body.top_k or None, logit_bias=body.logit_bias or {}, seed=body.seed,
        stop=(*stop, *extra_stop), stop_tokens=frozenset(stops), top_logprobs=top_logprobs, **given,
    )  # fmt: skip


def messages_of(body):
    """The messages as a template takes them; APIError for what is not text."""
    told = []
    for i, message in enumerate(body.messages):
        role = "system" if message.role == "developer" else message.role
        if role not in ("system", "user", "assistant"):
            raise APIError(400, f"messages[{i}] has the role {role!r}", None, f"messages[{i}].role")
        parts = message.content if isinstance(message.content, list) else []
        if any(part.type != "text" for part in parts):
            raise APIError(
                400, f"messages[{i}] holds more than text", None, f"messages[{i}].content"
            )
        text = "".join(part.text for part in parts) if parts else message.content or ""
        told.append({"role": role, "content": text})
    return told


def whole_text(value):
    """APIError where a string, or one in lists and dicts, holds half of a surrogate pair: it has no
    UTF-8 and so no tokens."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise APIError(400, "the text holds half a surrogate pair: it is not Unicode") from None


# ---- an answer, from the engine to the client


class Answers:
    """The pieces of answers, from an engine's thread to the event loop: n to each prompt.

    Raises APIError where the engine refuses one; then none is written."""

    def __init__(self, one, prompts, samplings, n):
        self.one, self.n, self.queue, self.requests = one, n, asyncio.Queue(), []
        loop = asyncio.get_running_loop()

        def emitter(i):
            def emit(piece):
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                    loop.call_soon_threadsafe(self.queue.put_nowait, (i, piece))

            return emit

        try:
            for i, (ids, sampling) in enumerate(zip(prompts, samplings)):
                self.requests.append(one.engine.submit(ids, sampling, emitter(i)))
        except (Busy, ValueError) as error:
            self.cancel()
            if isinstance(error, Busy):
                busy = "rate_limit_exceeded", None, "requests", error.seconds
                raise APIError(429, str(error), *busy) from None
            if one.engine.closed:  # it had to make room in this very moment
                raise APIError(503, str(error), "unloaded", None, "server_error", 1) from None
            code = "context_length_exceeded" if "context" in str(error) else None
            raise APIError(400, str(error), code) from None

    def cancel(self):
        """Tell the engine that nobody reads on; nothing where all is written."""
        for request in self.requests:
            self.one.engine.cancel(request)

    __del__ = cancel  # for one that nobody began to read: the client had gone by then

    async def pieces(self):
        """(index, Piece) as they come, until all answers have ended."""
        try:
            left = len(self.requests)
            while left:
                i, piece = await self.queue.get()
                left -= piece.finish is not None
                yield i, piece
        finally:
            self.cancel()

    def usage(self):
        prompts = self.requests[:: self.n]  # each counts once, however many answers it has
        n_prompt = sum(r.n_prompt for r in prompts)
        new = sum(len(r.tokens) - r.n_prompt for r in self.requests)
        told = dict(prompt_tokens=n_prompt, completion_tokens=new, total_tokens=n_prompt + new)
        return told | {"prompt_tokens_details": {"cached_tokens": sum(r.reused for r in prompts)}}


def token_text(one, token):
    return one.tokenizer.tokens.get(token, b"").decode(errors="replace")


def chat_logprobs(one, tokens):
    """As /v1/chat/completions tells them."""

    def entry(token, log_prob):
        raw = one.tokenizer.tokens.get(token, b"")
        return dict(token=raw.decode(errors="replace"), logprob=log_prob, bytes=list(raw))

    told = [entry(t, p) | {"top_logprobs": [entry(*o) for o in others]} for t, p, others in tokens]
    return {"content": told}


def text_logprobs(one, tokens, offset):
    """As /v1/completions tells them; `offset` is where in the text the first token begins."""
    told = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token, log_prob, others in tokens:
        told["tokens"].append(token_text(one, token))
        told["token_logprobs"].append(log_prob)
        told["top_logprobs"].append({token_text(one, t): p for t, p in others})
        told["text_offset"].append(offset)
        offset += len(told["tokens"][-1])
    return told


async def collect(answers, request):
    """[(text, tokens, finish), ...] of all answers. Ends early if the client hangs up."""
    told = [["", [], None] for _ in answers.requests]

    async def read():
        async for i, piece in answers.pieces():
            told[i][0] += piece.text
            told[i][1] += piece.tokens
            told[i][2] = piece.finish
            if piece.finish == "error":
                raise APIError(500, piece.error, "engine_error", None, "server_error")

    reading = asyncio.create_task(read())
    try:
        while not (await asyncio.wait({reading}, timeout=0.25))[0]:
            if await request.is_disconnected():
                raise APIError(499, "the client closed the connection")
        await reading
    finally:
        reading.cancel()
    return told


async def respond(body, request, answers, kind, choice, chunk):
    """The response to a body: one object, or server-sent events where `stream` is set.

    choice(i, text, tokens, finish) and chunk(i, piece, first) make what goes into `choices`."""
    head = dict(id=f"{kind}-{uuid.uuid4().hex}", created=int(time.time()), model=answers.one.id)
    name = "chat.completion" if kind == "chatcmpl" else "text_completion"
    if not body.stream:
        told = await collect(answers, request)
        choices = [choice(i, *parts) for i, parts in enumerate(told)]
        return head | dict(object=name, choices=choices, usage=answers.usage())
    head["object"] = name + ".chunk" if kind == "chatcmpl" else name
    with_usage = bool((body.stream_options or {}).get("include_usage"))

    async def events():
        def event(data):
            return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

        begun = set()
        async for i, piece in answers.pieces():
            if piece.finish == "error":
                error = APIError(500, piece.error, "engine_error", None, "server_error")
                yield event({"error": error.body})
                break
            told = head | {"choices": [chunk(i, piece, i not in begun)]}
            yield event(told | ({"usage": None} if with_usage else {}))
            begun.add(i)
        if with_usage:
            yield event(head | {"choices": [], "usage": answers.usage()})
        yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def samplings_of(body, one, prompts, limits, stops, stop=(), top_logprobs=None):
    """A Sampling for each of n answers to each prompt, and the prompts repeated to match."""
    if body.n * len(prompts) > limits.max_choices:
        text = f"{body.n * len(prompts)} answers at once: at most {limits.max_choices}"
        raise APIError(400, text, None, "n")
    context, samplings = one.engine.model.config.context_length, []
    for ids in prompts:
        for i in range(body.n):
            room = context - len(ids)
            sampling = sampling_of(body, room, limits, stops, stop, top_logprobs)
            if sampling.seed is not None:
                sampling.seed += i
            samplings.append(sampling)
    return [ids for ids in prompts for _ in range(body.n)], samplings


async def chat(body, request, models):
    """POST /v1/chat/completions"""
    refused = [name for name in ("tools", "functions") if getattr(body, name)]
    if (body.response_format or {}).get("type", "text") != "text":
        refused.append("response_format")
    if refused:
        raise APIError(400, f"{refused[0]} is not supported here", None, refused[0])
    messages = messages_of(body)
    whole_text([m["content"] for m in messages])
    one = await asyncio.to_thread(models.get, body.model)
    template = one.template
    try:
        ids = await asyncio.to_thread(template.encode, messages, one.tokenizer)
    except ValueError as error:
        raise APIError(400, str(error), None, "messages") from None
    top = (body.top_logprobs or 0) if body.logprobs else None
    stops = template.stops(one.tokenizer)
    rows, samplings = samplings_of(body, one, [ids], models.limits, stops, template.stop, top)
    answers, begun = Answers(one, rows, samplings, body.n), set()

    def log_probs(tokens):
        return chat_logprobs(one, tokens) if body.logprobs else None

    def choice(i, text, tokens, finish):
        text = text.lstrip() if template.plain else text  # a transcript has a space before it
        message = {"role": "assistant", "content": text, "refusal": None}
        return dict(index=i, message=message, logprobs=log_probs(tokens), finish_reason=finish)

    def chunk(i, piece, first):
        delta = {"role": "assistant"} if first else {}
        text = piece.text.lstrip() if template.plain and i not in begun else piece.text
        begun.update({i} if text else ())
        delta |= {"content": text} if text or first else {}
        told = dict(index=i, delta=delta, finish_reason=piece.finish)
        return told | dict(logprobs=log_probs(piece.tokens) if piece.tokens else None)

    return await respond(body, request, answers, "chatcmpl", choice, chunk)


async def completion(body, request, models):
    """POST /v1/completions"""
    if body.suffix or (body.best_of or 1) > body.n or (body.echo and body.logprobs is not None):
        raise APIError(400, "suffix, best_of and echo with logprobs are not supported here")
    given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    whole_text(given)
    one = await asyncio.to_thread(models.get, body.model)

    def encode():
        # As with a chat: a special token's name is text. An empty prompt begins a new text.
        start = [one.tokenizer.eot if one.tokenizer.eot is not None else 0]
        rows = [one.tokenizer.encode(p, False) if isinstance(p, str) else p for p in given]
        return [row or start for row in rows]

    rows = await asyncio.to_thread(encode)
    body.max_tokens = body.max_tokens or 16  # as OpenAI's
    ends = one.template.stops(one.tokenizer)
    rows, samplings = samplings_of(body, one, rows, models.limits, ends, (), body.logprobs)
    answers = Answers(one, rows, samplings, body.n)
    before = [one.tokenizer.decode(p) if body.echo else "" for p in rows]
    lengths = [len(text) for text in before]

    def log_probs(i, text, tokens):
        told = text_logprobs(one, tokens, lengths[i]) if body.logprobs is not None else None
        lengths[i] += len(text)
        return told

    def choice(i, text, tokens, finish):
        told = dict(index=i, text=before[i] + text, logprobs=log_probs(i, text, tokens))
        return told | dict(finish_reason=finish)

    def chunk(i, piece, first):
        text = (before[i] if first else "") + piece.text
        told = dict(index=i, text=text, logprobs=log_probs(i, piece.text, piece.tokens))
        return told | dict(finish_reason=piece.finish)

    return await respond(body, request, answers, "cmpl", choice, chunk)


# ---- the application


def create_app(models, jobs, remote=None, key=None, hosts=LOOPBACK, limits=None):
    """The FastAPI application. key: what a client has to show, None for no one but this machine's;
    hosts: names under which it may be called, None for any."""
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        models.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    gate = {"key": key, "hosts": hosts, "limits": limits, "counts": {}}
    started = time.time()

    @app.exception_handler(APIError)
    async def of_ours(request, error):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        text = f"{where}: {first['msg']}" if where else first["msg"]
        if first["type"] == "json_invalid":
            where, text = None, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}"
        return APIError(400, text, None, where or None).response()

    @app.exception_handler(HTTPException)
    async def of_starlette(request, error):
        return APIError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def unforeseen(request, error):  # what it was is in the server's log, not in the answer
        text = "the server failed on this request: its log says why"
        return APIError(500, text, None, None, "server_error").response()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request):
        return await chat(body, request, models)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request):
        return await completion(body, request, models)

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": await asyncio.to_thread(models.listed)}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str):
        for entry in await asyncio.to_thread(models.listed):
            if entry["id"] == model_id:
                return entry
        raise APIError(404, f"no model {model_id!r}", "model_not_found", "model")

    @app.get("/health")
    async def health():
        return {"status": "ok", "models": list(models.loaded)}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(prometheus(models, gate["counts"], started))

    @app.get("/api/status")
    async def status(request: Request):
        return {
            "needs_key": key is not None,
            "key_ok": shows_key(request.headers.get("authorization", ""), key),
            "default_model": await asyncio.to_thread(models.default),
            "store": remote and remote.url,
            "device": str(models.device),
            "version": "0.1.0",
        }

    @app.post("/api/models/load")
    async def load_model(body: LoadBody):
        one = await asyncio.to_thread(models.get, body.model)
        context = one.engine.model.config.context_length
        told = dict(model=one.id, context_length=context, parameters=one.parameters)
        return told | dict(plain=one.template.plain)

    def guard(websocket, shown):
        return shows_key(f"Bearer {shown or ''}", key)

    sample = sampler(models)
    app.include_router(dashboard.router(jobs, models.out, remote, sample, guard))
    page = HERE / "web" / "dist"
    if page.is_dir():
        app.mount("/", StaticFiles(directory=page, html=True))
    app.add_middleware(Gate, **gate)
    return app


class LoadBody(BaseModel):
    model: str = Field(max_length=200)


def sampler(models):
    """A function that draws a little text with the model of a run, for the dashboard."""

    async def sample(run, directory):
        def draw():
            model, _ = engine.load(directory, models.device, models.dtype)
            whole = (Path(directory) / "tokenizer.json").exists()
            tokenizer = prompts.QuickTokenizer(directory if whole else None)
            size = 16 * engine.PagedKVCache.bytes_per_page(model.config, 16, models.dtype)
            writer = engine.Engine(model, tokenizer, size, max_running=1)
            try:
                room = min(model.config.context_length, 256) - 1
                how = Sampling(max_tokens=min(80, room), temperature=0.8, top_p=0.95, seed=1)
                start = tokenizer.encode("\n", False)[:1] or [0]
                return "".join(piece.text for piece in writer.generate(start, how))
            finally:
                writer.close()

        return await asyncio.to_thread(draw)

    return sample


def prometheus(models, requests, started):
    """The counters in Prometheus's text format."""
    lines = []

    def metric(name, kind, text, values):
        lines.extend([f"# HELP llm_{name} {text}", f"# TYPE llm_{name} {kind}"])
        for labels, value in values:
            shown = ",".join(f'{k}="{v}"' for k, v in labels.items())
            lines.append(f"llm_{name}{{{shown}}} {value}" if shown else f"llm_{name} {value}")

    loaded = list(models.loaded.values())

    def each(value):
        return [({"model": one.id}, value(one.engine)) for one in loaded]

    metric("uptime_seconds", "gauge", "Since the server began.", [({}, time.time() - started)])
    metric("model_loads_total", "counter", "Models read from disk.", [({}, models.loads)])
    answered = [(dict(path=p, status=s), n) for (p, s), n in sorted(requests.items())]
    metric("http_requests_total", "counter", "Requests by path and status.", answered)
    metric("running", "gauge", "Streams that are being written.", each(lambda e: len(e.running)))
    metric("waiting", "gauge", "Requests in the queue.", each(lambda e: len(e.waiting)))
    metric("cache_pages", "gauge", "Pages of the cache.", each(lambda e: e.cache.n_pages))
    free = each(lambda e: len(e.cache.free))
    metric("cache_pages_free", "gauge", "Pages that no stream holds.", free)
    for name, text in engine.COUNTERS.items():
        metric(f"{name}_total", "counter", text, each(lambda e, name=name: e.counts[name]))
    return "\n".join(lines) + "\n"
