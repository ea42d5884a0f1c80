"""The training half of the page: routes of /api, and the WebSocket that tells of each new row.

What it teaches: how to serve many pages from one look at the disk. A single poller reads, and only
while somebody is connected; each connection has a cursor of its own for each run and a queue that
cannot grow. One that does not keep up is read nothing new, and in the end dropped; it comes back
with the last step it has seen and gets exactly what it lacks. So nobody's slow line costs memory,
and nothing is lost or sent twice.

Parent: none
New: everything

Read in this order: Live.connect, listen, poll, look; then router.
"""

import asyncio
import contextlib
import functools
import json
import time
from pathlib import Path

from fastapi import APIRouter, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, Response
from runs import MODEL, PART, WORD, detail, find, metrics, metrics_path, own, parse, runs, tail
from runs import resolve as resolve  # serve.py asks for models by it

# ---- live


class Client:
    """A connection: its queue, the cursor of each run it follows, what it was told last."""

    def __init__(self, socket, room):
        self.socket, self.queue, self.follows = socket, asyncio.Queue(room), {}
        self.told, self.pong, self.full = {}, time.monotonic(), asyncio.Event()

    def put(self, message):
        try:
            self.queue.put_nowait(message if isinstance(message, str) else json.dumps(message))
        except asyncio.QueueFull:
            self.full.set()


class Live:
    """All connections and the one poller that serves them, which runs while there are any."""

    # seconds; connections, messages in a queue and bytes in a message at most
    every, listing, hello, ping, silence, patience, drawing = 0.5, 2, 5, 15, 45, 20, 20
    most, room, size = 32, 64, 1 << 16

    def __init__(self, jobs, out, remote, sample, guard):
        self.jobs, self.out, self.remote, self.sample = jobs, Path(out), remote, sample
        self.guard, self.open, self.clients, self.poller = guard, 0, set(), None
        self.wake, self.listed, self.runs = asyncio.Event(), -1e9, []
        self.models, self.drawn, self.task = {}, {}, None

    async def connect(self, socket):
        await socket.accept()
        self.open += 1
        client, code, tasks = Client(socket, self.room), 1008, []
        try:
            if self.open > self.most:
                code = 1013  # try again later
                return
            first = await asyncio.wait_for(self.receive(socket), self.hello)
            key = first.get("key")
            if first.get("type") != "hello" or not isinstance(key, str | None):
                raise ValueError("the first message has to be a hello")
            if self.guard and not self.guard(socket, key):
                raise ValueError("this is not the key")
            client.put({"type": "hello"})
            client.pong = time.monotonic()
            self.clients.add(client)
            self.wake.set()
            if self.poller is None or self.poller.done():
                self.poller = asyncio.create_task(self.poll())
            jobs = self.write(client), self.listen(client), self.beat(client), client.full.wait()
            tasks = [asyncio.create_task(job) for job in jobs]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except ValueError as error:
            code = 1009 if "too long" in str(error) else 1008
            text = {"type": "error", "error": problem(str(error), None)["error"]}
            with contextlib.suppress(Exception):
                await asyncio.wait_for(socket.send_text(json.dumps(text)), 1)
        except (asyncio.TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
            pass  # gone, or said nothing, or does not read
        finally:
            self.open -= 1
            self.clients.discard(client)
            for task in tasks:
                task.cancel()
            with contextlib.suppress(Exception):  # it may be closed, or not read its close either
                await asyncio.wait_for(socket.close(code), 1)

    async def receive(self, socket):
        """The next message; ValueError where it is none of ours."""
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code") or 1005)
        text = message.get("text") or ""
        if len(text) > self.size or len(text.encode()) > self.size:
            raise ValueError(f"the message is too long: at most {self.size} bytes")
        if not (data := parse(text)):
            raise ValueError("a message is a JSON object, as text")
        return data

    async def write(self, client):
        while True:
            text = await client.queue.get()
            await asyncio.wait_for(client.socket.send_text(text), self.patience)

    async def beat(self, client):
        while time.monotonic() - client.pong < self.silence:
            await asyncio.sleep(self.ping)
            client.put({"type": "ping"})

    async def listen(self, client):
        while True:
            message = await self.receive(client.socket)
            if message.get("type") == "pong":
                client.pong = time.monotonic()
                continue
            asked = message.get("runs")
            if message.get("type") != "follow" or not isinstance(asked, dict) or len(asked) > 50:
                raise ValueError("a message is a pong, or a follow of at most 50 runs")
            for run, step in asked.items():
                if len(run.split("/")) != 2 or not all(map(WORD.fullmatch, run.split("/"))):
                    raise ValueError(f"{run[:100]!r} is not the id of a run")
                if type(step) is not int:
                    raise ValueError(f"{run}: a step is a whole number, or -1")
            # What is followed already goes on: rows that are under way are not sent again. Who has
            # none any more, -1, gets all again, marked as a reset: no file's life is 0.
            now = {run: cursor for run, cursor in client.follows.items() if run in asked}
            known = {run: cursor for run, cursor in now.items() if cursor[0] is not None}
            again = {run: (0, -1, None) for run in known if asked[run] == -1}
            begun = {run: (None, step, None) for run, step in asked.items()}
            client.follows = begun | known | again
            self.wake.set()

    async def poll(self):
        while self.clients:
            self.wake.clear()
            ready = [(c, c.follows, dict(c.told)) for c in self.clients if c.queue.qsize() < 8]
            try:
                found, models = await asyncio.to_thread(self.look, ready)
            except Exception as error:  # a disk that is full, say: it may pass
                print(f"dashboard: {type(error).__name__}: {error}", flush=True)
                found, models = [], {}
            for (client, follows, _), (messages, cursors, told) in zip(ready, found):
                if client.follows is follows:  # else it has asked for others since
                    client.follows, client.told = cursors, told
                    for message in messages:
                        client.put(message)
            for run, (state, path, step) in models.items():
                changed = self.models.setdefault(run, state) != state and state
                rested = time.monotonic() - self.drawn.get(run, -1e9) > self.drawing
                if changed and rested and self.sample and (not self.task or self.task.done()):
                    self.models[run], self.drawn[run] = state, time.monotonic()
                    self.task = asyncio.create_task(self.draw(run, path, step))
            await asyncio.sleep(0.05)  # the most that a page which asks all the time can get
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.wake.wait(), self.every)

    def look(self, ready):
        """Read what is new, in a thread: ([(messages, cursors, told) of each client], {run: (state
        of its model's file, directory, step)})."""
        jobs, models, results, logs = self.jobs.list(), {}, [], {}
        if time.monotonic() - self.listed > self.listing:
            self.listed, self.runs = time.monotonic(), runs(self.out, jobs, self.remote)
        lists = {"runs": json.dumps(self.runs), "jobs": json.dumps(jobs)}
        for client, follows, told in ready:
            messages, cursors = [], {}
            for kind, text in lists.items():
                if told.get(kind) != text:
                    messages.append(f'{{"type": "{kind}", "{kind}": {text}}}')
            told |= lists
            for run, cursor in follows.items():
                cursors[run], lines = cursor, None
                with contextlib.suppress(LookupError, ValueError, OSError):  # not there, or not yet
                    if path := metrics_path(self.out, run, self.remote):
                        lines = tail(path)
                if lines is None:
                    continue
                rows, reset, cursors[run] = lines.since(cursor)
                if rows or reset:
                    messages.append({"type": "rows", "run": run, "rows": rows, "reset": reset})
                model = path.with_name(MODEL)
                state = (model.stat().st_ino, model.stat().st_mtime_ns) if own(model) else None
                models[run] = state, path.parent, lines.step
                for job in [job for job in jobs if job["run"] == run][:1]:
                    if run not in logs:
                        logs[run] = self.jobs.log(job["id"], -4000)["text"]
                    if told.get(run) != logs[run]:
                        messages.append({"type": "log", "run": run, "text": logs[run]})
                        told[run] = logs[run]
                if len(rows) == PART:
                    self.wake.set()
            results.append((messages, cursors, told))
        return results, models

    async def draw(self, run, path, step):
        """Let the model of a run write something, keep it and send it to all who follow the run."""
        message = {"type": "sample", "run": run, "step": step}
        try:
            message["text"] = str(await asyncio.wait_for(self.sample(run, path), 120))[:4000]
            file = self.out / "11_serve" / "samples" / f"{run}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a") as lines:
                lines.write(json.dumps({"step": step, "text": message["text"]}) + "\n")
        except Exception as error:
            message = {"type": "error"} | problem(f"no sample of {run}: {error}", "no_sample")
        for client in self.clients:
            if run in client.follows:
                client.put(message)


# ---- routes


def problem(text, code):
    kind = "invalid_request_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


def reply(data, status=200):
    return Response(json.dumps(data), status, media_type="application/json")


def plainly(function):
    """What goes wrong in a route becomes the contract's error."""

    @functools.wraps(function)
    def route(*args, **kwargs):
        try:
            for last in (False, False, True):
                try:
                    answer = function(*args, **kwargs)
                    break
                except FileNotFoundError:  # a run removed a checkpoint as its folder was read
                    if last:
                        raise LookupError("the files are being changed: ask again") from None
            return answer if isinstance(answer, Response) else reply(answer)
        except LookupError as error:
            return reply(problem(str(error), "not_found"), 404)
        except RuntimeError as error:
            return reply(problem(str(error), "conflict"), 409)
        except ValueError as error:
            return reply(problem(str(error), None), 400)

    return route


def router(jobs, out, remote=None, sample=None, guard=None):
    """The routes of /api and the WebSocket, for `app.include_router`."""
    api, live = APIRouter(prefix="/api"), Live(jobs, out, remote, sample, guard)
    api.live = live

    @api.get("/runs")
    @plainly
    def list_runs():
        return {"runs": runs(out, jobs.list(), remote, 3)}

    @api.get("/runs/{stage}/{name}")
    @plainly
    def one_run(stage: str, name: str):
        return detail(out, f"{stage}/{name}", jobs.list(), remote)

    @api.get("/runs/{stage}/{name}/metrics")
    @plainly
    def rows_of_run(stage: str, name: str, after: str = "-1"):
        return {"rows": metrics(out, f"{stage}/{name}", int(after), remote)}

    @api.get("/runs/{stage}/{name}/plots/{file}")
    @plainly
    def plot(stage: str, name: str, file: str):
        path = find(out, f"{stage}/{name}") / file
        if not WORD.fullmatch(file) or not file.endswith(".png") or not own(path):
            raise LookupError(f"there is no plot {file[:100]!r}")
        headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        return FileResponse(path, media_type="image/png", headers=headers)

    @api.get("/stages")
    @plainly
    def stages():
        return {"stages": jobs.stages()}

    @api.get("/jobs")
    @plainly
    def list_jobs():
        return {"jobs": jobs.list()}

    @api.post("/jobs")
    async def start(request: Request):
        asked = parse(await request.body()) or {}
        if not {"stage", "command"} <= asked.keys():
            return reply(problem('the body is {"stage", "command", "flags"}', None), 400)
        args = asked["stage"], asked["command"], asked.get("flags") or {}
        return await asyncio.to_thread(plainly(lambda: {"job": jobs.start(*args)}))

    @api.get("/jobs/{id}/log")
    @plainly
    def log(id: str, offset: str = "0"):
        return jobs.log(id, int(offset))

    @api.post("/jobs/{id}/{action}")
    @plainly
    def act(id: str, action: str):
        if action not in ("pause", "resume", "stop"):
            raise LookupError("a job can pause, resume and stop")
        return {"job": getattr(jobs, action)(id)}

    @api.websocket("/live")
    async def connect(socket: WebSocket):
        await live.connect(socket)

    return api
