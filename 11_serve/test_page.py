"""The page in a real Chromium, over a real server: what a person does, looks at and breaks.

The server is a process in a copy of this stage and 03_gpt: in it /api/stages asks one stage for its
flags, not ten, and nothing that a test does touches the repository. Models are random, or made to
write known text, and answer greedily, so that what the page shows can be compared with what the
API says. Every test ends with a look at what the browser had to complain about.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make .venv/dev")
import httpx  # noqa: E402
import jobs  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_serve import KEY, until, write_model  # noqa: E402  (skips without fastapi and so on)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DIST = HERE / "web" / "dist" / "index.html"
TRAINING = HERE.parent / "03_gpt" / "run.py"
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(not DIST.exists(), reason="the page is not built: make web"),
]
trains = pytest.mark.skipif(not TRAINING.exists(), reason="needs 03_gpt beside this folder")

expect = sync_api.expect
expect.set_options(timeout=60_000)
TALK, OTHER, HTML, BASE = (
    "07_sft/run-talk",
    "07_sft/run-other",
    "07_sft/run-html",
    "05_scaling/run-base",
)
COMPARED = "05_scaling/run-done"  # a finished run without a model
MARK = "<b id=x>"  # each character once: HTML writes it again and again
FLAGS = dict(d_model=16, n_layers=1, n_heads=2, context_length=64, tokens_per_step=64)
FLAGS |= dict(eval_tokens=500, warmup_steps=10, seed=1, device="cpu")


# ---- models and runs


def write_talker(path, seed):
    """A random model that never ends by itself and writes printable ASCII only: one number of its
    residual stream is always large, and counts against all other tokens."""
    write_model(path, seed, context=8192)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 5
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor *= 1.5  # it looks back more sharply, or it would soon say one thing for ever
    tensors["lm_head.weight"] *= 2
    tensors["lm_head.weight"][:, 0] = -40
    tensors["lm_head.weight"][33:127, 0] = 0
    save_file(tensors, path / "model.safetensors")


def write_cycle(path, text):
    """A model that goes from each character of `text` to the next, from a line's end to the
    first: attention and MLP add nothing, the output matrix holds what comes before."""
    write_model(path, context=4096)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    embedding, ids = tensors["model.embed_tokens.weight"], text.encode()
    tensors["lm_head.weight"].zero_()
    for one, following in zip(b"\n" + ids, ids + ids[:1]):
        tensors["lm_head.weight"][following] += embedding[one]
    save_file(tensors, path / "model.safetensors")


def write_run(path, steps):
    path.mkdir(parents=True)
    path.joinpath("run.json").write_text(
        json.dumps({"config": {"steps": steps, "d_model": 8}, "result": {"val_loss": 1.5}})
    )
    with open(path / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            row = dict(step=step, time=step / 10, tokens=64 * step, lr=1e-3, grad_norm=1 / step)
            row |= dict(train_loss=2 + 3 / step, val_loss=2.5 if step % 50 == 0 else None)
            file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    write_talker(out / TALK, 2)
    write_talker(out / OTHER, 3)
    write_cycle(out / HTML, MARK)
    write_model(out / BASE, 3, template=None)
    write_run(out / COMPARED, 200)
    lines = [f"Line {i}: the king has {i * i % 97} ships and {i % 13} men.\n" for i in range(1500)]
    (out / "data.txt").write_text("".join(lines))
    return out


# ---- the server


class Served:
    """A server: a process that can be killed and started again on its port."""

    def __init__(self, root, out, key=None):
        self.root, self.out, self.key, self.port, self.process = root, out, key, 0, None
        self.log = root / f"server-{key or 'open'}.log"

    def start(self):
        env = {name: value for name, value in os.environ.items() if name != "API_KEY"}
        env |= {"OUT": str(self.out), "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        env |= {"API_KEY": self.key} if self.key else {}
        words = ["serve", "--device", "cpu", "--port", str(self.port), "--cache_gib", "0.1"]
        words += ["--model", str(self.out / TALK)]
        with open(self.log, "w") as log:
            argv = [sys.executable, self.root / "11_serve" / "run.py", *words]
            self.process = subprocess.Popen(argv, env=env, stdout=log, stderr=log)

        def told():
            assert self.process.poll() is None, self.log.read_text()
            return re.search(r"http://127.0.0.1:(\d+)/", self.log.read_text())

        until(told)
        self.port = int(told()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=headers)
        return self

    def kill(self, number=signal.SIGKILL):
        self.http.close()
        self.process.send_signal(number)
        self.process.wait(20)

    def close(self):
        """The server, and whatever jobs a failed test has left behind."""
        self.kill()
        for path in self.out.glob("11_serve/jobs/*/job.json"):
            job = json.loads(path.read_text())
            if job["birth"] and jobs.birth(job["pid"]) == job["birth"]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job["pid"], signal.SIGKILL)

    def answer(self, *texts, model=TALK, **fields):
        """What the API answers to a conversation of user, assistant, user, ..."""
        roles = ["user", "assistant"] * len(texts)
        messages = [dict(role=role, content=text) for role, text in zip(roles, texts)]
        body = dict(model=model, messages=messages, temperature=0, max_tokens=24)
        answer = self.http.post("/v1/chat/completions", json=body | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def text(self, *texts, **fields):
        return self.answer(*texts, **fields)["choices"][0]["message"]["content"]

    def metric(self, name, model=TALK):
        found = re.search(
            rf'^llm_{name}{{model="{model}"}} (\d+)$', self.http.get("/metrics").text, re.M
        )
        return int(found[1]) if found else 0

    def job(self, job_id):
        return json.loads((self.out / "11_serve" / "jobs" / job_id / "job.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The repository as far as the tests need it."""
    root, skip = (
        tmp_path_factory.mktemp("root"),
        shutil.ignore_patterns("node_modules", "__pycache__"),
    )
    for name in ("11_serve", "common", "03_gpt"):
        if (HERE.parent / name).exists():
            shutil.copytree(HERE.parent / name, root / name, ignore=skip)
    return root


@pytest.fixture(scope="module")
def server(root, out):
    one = Served(root, out).start()
    yield one
    one.close()


# ---- the browser


class Watch:
    """What happens in a page: what it complains of, what it asks for, what its WebSockets bring."""

    def __init__(self, page, url):
        self.host, self.problems, self.sockets, self.allowed = urlsplit(url).netloc, [], [], []
        page.on("console", lambda m: m.type == "error" and self.note("console", m.text))
        page.on("pageerror", lambda error: self.note("exception", str(error)))
        page.on("crash", lambda _: self.note("crash", ""))
        page.on("dialog", lambda dialog: (self.note("dialog", dialog.message), dialog.dismiss()))
        # Aborted is what the page itself gave up, and with Chromium now and then a stream that was
        # read to its end: there the state of the answer says more.
        page.on(
            "requestfailed",
            lambda r: "ERR_ABORTED" in r.failure or self.note("request", f"{r.url} {r.failure}"),
        )
        page.on("request", lambda request: self.see(request.url))
        page.on("websocket", self.listen)

    def note(self, kind, text):
        self.problems.append(f"{kind}: {text}")

    def see(self, url):
        if not url.startswith(("data:", "blob:", "about:")) and urlsplit(url).netloc != self.host:
            self.note("stranger", url)

    def listen(self, socket):
        self.see(socket.url)
        self.sockets.append(messages := [])
        socket.on("framereceived", lambda data: messages.append(json.loads(data)))

    def rows(self, run):
        """All rows of a run, in the order in which they came."""
        messages = [message for messages in self.sockets for message in messages]
        rows = [m["rows"] for m in messages if m["type"] == "rows" and m["run"] == run]
        return sum(rows, [])

    def check(self):
        wrong = [p for p in self.problems if not any(re.search(a, p) for a in self.allowed)]
        assert not wrong, wrong


@pytest.fixture(scope="module")
def browser():
    # Ended with the module: while it runs, other tests could not use asyncio.run.
    words = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    words += "--disable-background-networking --disable-component-update --disable-sync"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=words.split())
        yield browser
        browser.close()


# Notes each state an answer is in, with the length of its text and the time.
STATES = """
addEventListener("DOMContentLoaded", () => {
  window.seen = [];
  new MutationObserver(() => {
    for (const answer of document.querySelectorAll("[data-testid=message-assistant]")) {
      const text = answer.querySelector("[data-testid=answer-text]").textContent;
      window.seen.push({ state: answer.dataset.state, length: text.length, time: Date.now() });
    }
  }).observe(document.body, {
    subtree: true, childList: true, attributes: true, characterData: true,
  });
});
"""


@pytest.fixture
def visit(browser, server):
    """A function that opens the page in a browser of its own, with settings for known answers."""
    opened = []

    def visit(path="/", at=server, settings=(), live=True, **options):
        options = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"} | options
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
        numbers = {"temperature": 0, "max_tokens": 24} | dict(settings)
        kept = json.dumps(json.dumps({"numbers": numbers}))
        context.add_init_script(f"if (location.host) localStorage.settings ??= {kept};" + STATES)
        page = context.new_page()
        page.watch = Watch(page, at.url)
        opened.append(page)
        page.goto(at.url + path)
        if live:
            expect(page.get_by_test_id("connection")).to_have_attribute("data-state", "live")
            expect(page.get_by_test_id("model-select")).to_have_value(TALK)
        return page

    yield visit
    for page in opened:
        page.context.close()
    for page in opened:
        page.watch.check()


def say(page, text, answers=1):
    """Sends a message with Enter; the request's body. Waits until there are so many answers."""
    page.get_by_test_id("composer").fill(text)
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_test_id("composer").press("Enter")
    if answers:
        done = page.locator("[data-testid=message-assistant][data-state=done]")
        expect(done).to_have_count(answers)
    return request.value.post_data_json


def shown(page, nth=-1):
    """The text of an answer, as it is on the page."""
    return page.get_by_test_id("answer-text").nth(nth).text_content()


def poll(page, condition):
    """Waits until condition() holds, while the page's events go on coming in."""
    for _ in range(600):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it never came true")


def start_run(page, server, **flags):
    """Starts a run of 03 through the form: (id of the job, id of the run)."""
    page.get_by_test_id("tab-training").click()
    page.get_by_test_id("part-start").click()
    page.get_by_test_id("start-stage").select_option("03_gpt")
    page.get_by_test_id("start-command").select_option("train")
    for name, value in (FLAGS | dict(data=server.out / "data.txt") | flags).items():
        page.locator(f"[data-flag={name}]").fill(str(value))
    with page.expect_response("**/api/jobs") as response:
        page.get_by_test_id("start").click()
    job = response.value.json()["job"]["id"]
    expect(page.get_by_test_id("start-message")).to_contain_text("Started")
    expect(row_of(page, job)).to_be_visible()
    return job, row_of(page, job).get_attribute("data-run")


def row_of(page, job):
    return page.locator(f'[data-testid=run][data-run*="/web-{job}-"]')


def job_of(page, job):
    return page.locator(f'[data-testid=job][data-job="{job}"]')


def show_charts(page, row):
    """Ticks this run and no other: a page that was told nothing shows what is running."""
    row.get_by_test_id("run-tick").check()
    run = row.get_attribute("data-run")
    for tick in page.locator(f"[data-testid=run]:not([data-run='{run}']) input").all():
        tick.uncheck()
    page.get_by_test_id("part-charts").click()


def canvas(page, metric):
    return page.locator(f'[data-testid=chart][data-metric="{metric}"] canvas')


def inked(page, metric, color=(0x2B, 0x7F, 0xD0)):
    """How many pixels of a chart have the colour of a run's curve."""
    return canvas(page, metric).evaluate(
        """(canvas, [r, g, b]) => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          let count = 0;
          for (let i = 0; i < data.length; i += 4) {
            const far = [r, g, b].map((value, j) => Math.abs(data[i + j] - value));
            count += data[i + 3] > 200 && Math.max(...far) < 12;
          }
          return count;
        }""",
        list(color),
    )


# Moves a pointer over a chart and reads what its legend tells of each place: [[x, y], ...].
HOVER = """(canvas) => {
  const figure = canvas.closest("figure"), over = figure.querySelector(".u-over");
  const box = over.getBoundingClientRect(), seen = new Map();
  for (let x = 0; x <= box.width; x += 0.25) {
    const at = { clientX: box.left + x, clientY: box.top + 9, bubbles: true };
    over.dispatchEvent(new MouseEvent("mousemove", at));
    const texts = [...figure.querySelectorAll(".u-legend .u-value")].map((v) => v.textContent);
    seen.set(texts[0], texts[1]);
  }
  return [...seen];
}"""


def same_picture(one, two, metric):
    """Waits until a chart is drawn and is the same in two pages."""
    picture = "(canvas) => canvas.toDataURL()"

    def same():
        texts = [canvas(page, metric).evaluate(picture) for page in (one, two)]
        return texts[0] == texts[1]

    poll(one, lambda: inked(two, metric) > 100 and same())


def steps_of(path):
    return [json.loads(line)["step"] for line in open(path / "metrics.jsonl")]


# ---- chat


def test_an_answer_streams_and_the_conversation_goes_on(visit, server):
    page = visit(settings={"max_tokens": 300})
    body = say(page, "What is a king?")
    assert body["messages"] == [{"role": "user", "content": "What is a king?"}]
    expected = server.answer("What is a king?", max_tokens=300)
    first = expected["choices"][0]["message"]["content"]
    assert shown(page) == first and len(first) == 300
    expect(page.get_by_test_id("answer-meta")).to_contain_text("300 tokens, ")
    prompt = expected["usage"]["prompt_tokens"]
    expect(page.get_by_test_id("answer-meta")).to_contain_text(f"prompt {prompt} tokens")
    # It grew piece by piece, and was done only at the end.
    seen = page.evaluate("window.seen")
    lengths = {entry["length"] for entry in seen if entry["state"] == "streaming"}
    assert len(lengths) > 5, lengths
    order = [entry["state"] for entry in seen]
    assert sorted(set(order), key=order.index) == ["waiting", "streaming", "done"]

    page.get_by_test_id("composer").press_sequentially("And")
    page.get_by_test_id("composer").press("Shift+Enter")  # a new line, not an end
    page.get_by_test_id("composer").press_sequentially("a queen?")
    page.get_by_test_id("composer").press("Enter")
    expect(page.locator("[data-testid=message-assistant][data-state=done]")).to_have_count(2)
    expect(page.get_by_test_id("user-text").last).to_have_text("And\na queen?", use_inner_text=True)
    assert shown(page) == server.text("What is a king?", first, "And\na queen?", max_tokens=300)
    # Only the last answer can be had again. A reload loses nothing; a new conversation all.
    expect(page.get_by_test_id("retry")).to_have_count(1)
    page.reload()
    expect(page.get_by_test_id("message-assistant")).to_have_count(2)
    assert shown(page, 0) == first
    page.get_by_test_id("new").click()
    expect(page.get_by_test_id("message-assistant")).to_have_count(0)
    assert say(page, "New")["messages"] == [{"role": "user", "content": "New"}]


def test_settings_retry_edit_and_export(visit, server):
    page = visit()
    page.get_by_test_id("settings-toggle").click()
    for name, value in dict(
        temperature=1.5, top_p=1, max_tokens=30, seed=1, system="Be brief."
    ).items():
        page.get_by_test_id(f"set-{name}").fill(str(value))
    page.get_by_test_id("settings-close").click()
    how = dict(temperature=1.5, top_p=1, max_tokens=30)
    system = {"role": "system", "content": "Be brief."}

    def expected(*messages, seed):
        body = how | dict(model=TALK, seed=seed, messages=[system, *messages])
        return server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]

    one, two = ({"role": "user", "content": text} for text in ("One", "Two"))
    body = say(page, "One")
    assert body["messages"] == [system, one]
    assert {name: body[name] for name in how} == how and body["seed"] == 1
    first = expected(one, seed=1)
    assert shown(page) == first["content"]
    say(page, "Two", answers=2)
    assert shown(page) == expected(one, first, two, seed=1)["content"]

    page.get_by_test_id("settings-toggle").click()
    page.get_by_test_id("set-seed").fill("2")
    page.get_by_test_id("settings-close").click()
    page.get_by_test_id("retry").click()
    again = expected(one, first, two, seed=2)["content"]
    expect(page.get_by_test_id("answer-text").nth(1)).to_have_text(again)
    expect(page.get_by_test_id("message-assistant")).to_have_count(2)

    with page.expect_download() as download:
        page.get_by_test_id("export").click()
    assert download.value.suggested_filename.endswith(".json")
    (told,) = json.loads(Path(download.value.path()).read_text())["conversations"]
    assert told["model"] == TALK
    pairs = [(message["role"], message["content"]) for message in told["messages"]]
    texts = ["Be brief.", "One", first["content"], "Two", again]
    assert pairs == list(zip(["system", *["user", "assistant"] * 2], texts))
    assert told["messages"][2]["usage"]["completion_tokens"] == 30

    page.get_by_test_id("edit").first.click()
    expect(page.get_by_test_id("edit-input")).to_have_value("One")
    page.get_by_test_id("edit-input").fill("Three")
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_test_id("edit-send").click()
    three = {"role": "user", "content": "Three"}
    assert request.value.post_data_json["messages"] == [system, three]
    expect(page.get_by_test_id("message-user")).to_have_count(1)  # what followed is cut off
    expect(page.get_by_test_id("answer-text")).to_have_text(expected(three, seed=2)["content"])


@pytest.mark.parametrize("how", ["button", "Escape", "leave"])
def test_stop(how, visit, server):
    page = visit(settings={"max_tokens": 3800})
    before = server.metric("finished_cancelled_total")
    say(page, f"Go on and on until {how}", answers=0)
    message = page.get_by_test_id("message-assistant")
    expect(message).to_have_attribute("data-state", "streaming")
    assert server.metric("running") == 1
    if how == "button":
        page.get_by_test_id("stop").click()
    elif how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.goto("about:blank")
    until(lambda: server.metric("running") == 0)
    assert server.metric("finished_cancelled_total") == before + 1
    if how == "leave":
        return
    expect(message).to_have_attribute("data-state", "stopped")
    assert 0 < len(shown(page)) < 3800
    expect(page.get_by_test_id("answer-error")).to_be_empty()
    # The conversation goes on with what was written.
    expect(page.get_by_test_id("stop")).to_be_hidden()
    text = shown(page)
    assert say(page, "Enough", answers=0)["messages"][1] == {"role": "assistant", "content": text}
    page.get_by_test_id("stop").click()
    expect(page.locator("[data-testid=message-assistant][data-state=stopped]")).to_have_count(2)


def test_two_models_side_by_side(visit, server):
    page = visit()
    page.get_by_test_id("add-model").click()
    page.locator("[data-testid=model-select][data-column='1']").select_option(OTHER)
    say(page, "What is a king?", answers=2)
    for column, model in enumerate([TALK, OTHER]):
        answer = page.locator(f"[data-testid=message-assistant][data-column='{column}']")
        expect(answer.get_by_role("heading")).to_have_text(model)
        expect(answer.get_by_test_id("answer-text")).to_have_text(
            server.text("What is a king?", model=model)
        )
    left, right = (page.get_by_test_id("message-assistant").nth(i).bounding_box() for i in (0, 1))
    assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 2
    # Each goes on from its own answer.
    say(page, "More", answers=4)
    for i, model in enumerate([TALK, OTHER]):
        first = server.text("What is a king?", model=model)
        assert shown(page, 2 + i) == server.text("What is a king?", first, "More", model=model)
    page.get_by_test_id("remove-model").first.click()
    expect(page.get_by_test_id("message-assistant")).to_have_count(2)
    expect(page.get_by_test_id("model-select")).to_have_value(OTHER)


def test_a_base_model_continues_text(visit, server):
    page = visit()
    expect(page.get_by_test_id("mode-text")).to_be_hidden()  # this model was taught to chat
    page.get_by_test_id("model-select").select_option(BASE)
    page.get_by_test_id("mode-text").check()
    page.get_by_test_id("composer").fill("ROMEO:")
    page.get_by_test_id("composer").press("Control+Enter")
    expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "done")
    body = dict(model=BASE, prompt="ROMEO:", max_tokens=24, temperature=0)
    text = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    expect(page.get_by_test_id("composer")).to_have_value(("ROMEO:" + text).replace("\r", "\n"))
    page.get_by_test_id("undo").click()
    expect(page.get_by_test_id("composer")).to_have_value("ROMEO:")


def test_probabilities(visit, server):
    page = visit()
    page.get_by_test_id("probabilities").check()
    say(page, "How sure?")
    choice = server.answer("How sure?", logprobs=True, top_logprobs=5)["choices"][0]
    entries = choice["logprobs"]["content"]
    tokens = page.get_by_test_id("token")
    expect(tokens).to_have_count(24)
    probs = [float(token.get_attribute("data-prob")) for token in tokens.all()]
    assert probs == pytest.approx([math.exp(entry["logprob"]) for entry in entries], abs=2e-4)
    assert len(set(probs)) > 5
    assert "".join(tokens.all_text_contents()) == choice["message"]["content"]
    # Those that are less likely are tinted more.
    tint = "(spans) => spans.map((s) => getComputedStyle(s).backgroundColor)"
    assert len(set(tokens.evaluate_all(tint))) > 1

    popover, others = page.get_by_test_id("token-popover"), page.get_by_test_id("token-alternative")
    expect(popover).to_be_hidden()
    tokens.nth(3).hover()
    expect(popover).to_be_visible()
    expect(others).to_have_count(5)
    for i, entry in enumerate(entries[3]["top_logprobs"]):
        expect(others.nth(i)).to_contain_text(percent(entry["logprob"]))
        expect(others.nth(i).locator("code")).to_have_text(visible(entry["token"]))
    page.get_by_test_id("composer").hover()
    expect(popover).to_be_hidden()
    # By keyboard: back from the composer over the buttons of the answer, then along the tokens.
    page.get_by_test_id("composer").focus()
    for _ in range(10):
        if focused(page) != "token":
            page.keyboard.press("Shift+Tab")
    expect(tokens.nth(0)).to_be_focused()
    expect(popover).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(others.nth(0).locator("code")).to_have_text(
        visible(entries[1]["top_logprobs"][0]["token"])
    )
    page.keyboard.press("Escape")
    expect(popover).to_be_hidden()


def visible(text):
    """As the popover writes a token: with its spaces and line ends."""
    text = text.replace("\n", "\u21b5")
    return re.sub("^ +| +$", lambda match: "\u2423" * len(match[0]), text)


def percent(log_prob):
    value = 100 * math.exp(log_prob)
    return f"{value:.0f}%" if value >= 10 else f"{value:.1f}%" if value >= 0.1 else "<0.1%"


def focused(page):
    return page.evaluate("document.activeElement.dataset.testid ?? ''")


@pytest.mark.parametrize("probabilities", [False, True])
def test_html_is_text(probabilities, visit):
    page = visit()
    page.get_by_test_id("model-select").select_option(HTML)
    page.get_by_test_id("probabilities").set_checked(probabilities)
    attack = "<img src=x onerror=\"document.title='owned'; alert(1)\"><script>alert(2)</script>"
    say(page, attack)
    for again in (False, True):  # as it came, and drawn at once from what the tab has kept
        if again:
            page.reload()
        expect(page.get_by_test_id("user-text")).to_have_text(attack)
        expect(page.get_by_test_id("answer-text")).to_have_text(MARK * 3)  # the model's own words
        if probabilities and not again:
            page.get_by_test_id("token").first.hover()
            expect(page.get_by_test_id("token-popover")).to_be_visible()
        expect(page.locator("#x, :is(main, #token-popover) :is(b, img, script)")).to_have_count(0)
        assert page.title() == "LLM from nothing"


# ---- training


@trains
def test_a_run_is_started_watched_to_its_end_and_talked_to(visit, server):
    page = visit(settings={"temperature": 1, "seed": 3})
    job, run = start_run(page, server, steps=600, eval_every=300)
    row = row_of(page, job)
    show_charts(page, row_of(page, job))
    expect(row).to_have_attribute("data-status", "finished")
    expect(row.get_by_test_id("run-steps")).to_have_text("600/600")
    expect(row.get_by_test_id("run-last")).to_contain_text("loss ")
    for metric in ("loss", "lr", "tokens_per_s"):
        expect(canvas(page, metric)).to_be_visible()
        poll(page, lambda metric=metric: inked(page, metric) > 100)
    poll(page, lambda: len(page.watch.rows(run)) == 600)

    row.get_by_test_id("run-open").click()
    expect(page.get_by_test_id("detail-status")).to_have_text("finished")
    expect(page.get_by_test_id("result")).to_contain_text("val_bpb")
    plot = page.get_by_test_id("plot")
    look = "(image) => { image.scrollIntoView(); return image.naturalWidth; }"  # it loads when seen
    poll(page, lambda: plot.evaluate(look) > 100)
    expect(page.get_by_test_id("log")).to_contain_text("held out")
    page.locator(f'[data-testid=load-model][data-model="{run}"]').click()
    expect(page.get_by_test_id("model-select")).to_have_value(run)
    expect(page.get_by_test_id("composer")).to_be_focused()
    say(page, "Line")
    expected = server.text("Line", model=run, temperature=1, seed=3, top_p=0.95)
    assert shown(page).strip() == expected != ""


@trains
def test_pause_and_resume_lose_no_step(visit, server):
    page = visit()
    job, run = start_run(page, server, steps=3000, eval_every=1000)
    show_charts(page, row_of(page, job))
    poll(page, lambda: len(page.watch.rows(run)) > 100)
    page.get_by_test_id("part-start").click()
    one, row = job_of(page, job), row_of(page, job)
    pid = server.job(job)["pid"]
    one.get_by_test_id("job-pause").click()
    expect(one).to_have_attribute("data-status", "paused")
    assert jobs.birth(pid) is None
    expect(row).to_have_attribute("data-status", "paused")
    steps = steps_of(server.out / run)
    assert steps == list(range(1, len(steps) + 1)) and 100 < len(steps) < 3000
    expect(one.get_by_test_id("job-pause")).to_have_count(0)
    row.get_by_test_id("job-resume").click()  # the list of runs has the same buttons
    expect(row).to_have_attribute("data-status", "running")
    expect(row).to_have_attribute("data-status", "finished")
    expect(row.get_by_test_id("run-steps")).to_have_text("3000/3000")
    expect(one).to_have_attribute("data-status", "finished")
    assert steps_of(server.out / run) == list(range(1, 3001))
    poll(page, lambda: len(page.watch.rows(run)) >= 3000)
    assert [row["step"] for row in page.watch.rows(run)] == list(range(1, 3001))


@trains
def test_the_server_is_killed_in_the_middle_of_a_run(visit, server):
    """What the page holds is read in two ways: the frames of its WebSockets have each step once and
    in order, and its charts are to the pixel those of a page that was never cut off."""
    page = visit()
    job, run = start_run(page, server, steps=6000, eval_every=2000)
    show_charts(page, row_of(page, job))
    poll(page, lambda: len(page.watch.rows(run)) > 100)
    connection, process = page.get_by_test_id("connection"), server.job(job)
    page.watch.allowed += ["net::ERR_CONNECTION_REFUSED", "net::ERR_CONNECTION_RESET"]
    page.watch.allowed += ["net::ERR_INCOMPLETE_CHUNKED_ENCODING", "net::ERR_EMPTY_RESPONSE"]
    server.kill()
    try:
        expect(connection).to_have_attribute("data-state", "broken")
        before = len(page.watch.rows(run))
    finally:
        server.start()
    expect(connection).to_have_attribute("data-state", "live")  # by itself
    assert jobs.birth(process["pid"]) == process["birth"]  # the run never noticed
    assert 100 < before < len(steps_of(server.out / run)) < 6000
    row = row_of(page, job)
    expect(row).to_have_attribute("data-status", "running")
    expect(row).to_have_attribute("data-status", "finished")
    assert server.job(job)["pid"] == process["pid"]
    poll(page, lambda: len(page.watch.rows(run)) >= 6000)
    assert [row["step"] for row in page.watch.rows(run)] == list(range(1, 6001))
    assert len(page.watch.sockets) > 1
    assert steps_of(server.out / run) == list(range(1, 6001))

    fresh = visit("/#training")
    show_charts(fresh, row_of(fresh, job))
    for metric in ("loss", "grad_norm"):
        expect(canvas(fresh, metric)).to_be_visible()
        same_picture(page, fresh, metric)


@trains
def test_two_browsers_at_once(visit, server):
    one, two = (
        visit(settings={"max_tokens": 800}),
        visit("/#training", settings={"max_tokens": 800}),
    )
    job, run = start_run(one, server, steps=1200, eval_every=500)
    expect(row_of(two, job)).to_be_visible()  # nobody told it to look
    show_charts(one, row_of(one, job))
    show_charts(two, row_of(two, job))
    # Both ask while it trains, and get what they would alone.
    for page in (one, two):
        page.get_by_test_id("tab-chat").click()
        page.get_by_test_id("composer").fill(f"Question of browser {(one, two).index(page) + 1}")
    for page in (one, two):
        page.get_by_test_id("composer").press("Enter")
    for page in (one, two):
        expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "done")
    times = [
        [e["time"] for e in page.evaluate("window.seen") if e["state"] == "streaming"]
        for page in (one, two)
    ]
    assert times[1][0] < times[0][-1] and times[0][0] < times[1][-1], "not at the same time"
    for i, page in enumerate((one, two)):
        assert shown(page) == server.text(f"Question of browser {i + 1}", max_tokens=800)
    assert shown(one) != shown(two)
    for page in (one, two):
        page.get_by_test_id("new").click()
        say(page, "The same question")
    assert shown(one) == shown(two)
    for page in (one, two):
        page.get_by_test_id("tab-training").click()
        expect(row_of(page, job)).to_have_attribute("data-status", "finished")
        expect(row_of(page, job).get_by_test_id("run-steps")).to_have_text("1200/1200")
        poll(
            page, lambda page=page: len(page.watch.rows(run)) == 1200 and inked(page, "loss") > 100
        )


def test_runs_are_compared_and_a_bad_flag_is_told(visit, server):
    page = visit("/#training")
    row = page.locator(f'[data-testid=run][data-run="{COMPARED}"]')
    expect(row).to_have_attribute("data-status", "finished")
    expect(row.get_by_test_id("run-steps")).to_have_text("200/200")
    show_charts(page, row)
    expect(page.get_by_test_id("chart").first).to_be_visible()
    metrics = page.get_by_test_id("chart").evaluate_all("(all) => all.map((c) => c.dataset.metric)")
    assert metrics == ["loss", "lr", "grad_norm"]
    poll(page, lambda: inked(page, "loss") > 100)
    legend = page.locator("[data-metric=loss] .u-legend")
    expect(legend).to_contain_text("run-done train2.015")
    expect(legend).to_contain_text("run-done val2.5")
    held = dict(canvas(page, "grad_norm").evaluate(HOVER))
    assert sorted(map(int, held)) == list(range(1, 201))  # all that the page knows
    values = [1 / int(step) for step in held]
    assert [float(value) for value in held.values()] == pytest.approx(values, rel=1e-3)
    row.get_by_test_id("run-tick").uncheck()
    expect(page.get_by_test_id("chart")).to_have_count(0)
    page.get_by_test_id("run-search").fill("no such run")
    expect(page.get_by_test_id("run")).to_have_count(0)
    if TRAINING.exists():
        page.get_by_test_id("part-start").click()
        page.get_by_test_id("start-stage").select_option("03_gpt")
        page.get_by_test_id("flag-search").fill("learning rate")
        expect(page.locator("[data-flag=max_lr]")).to_be_visible()
        expect(page.locator("[data-flag=data]")).to_be_hidden()
        page.get_by_test_id("flag-search").fill("")
        page.locator("[data-flag=data]").fill("/etc/passwd")
        page.get_by_test_id("start").click()
        expect(page.get_by_test_id("start-message")).to_contain_text("a path must lie in")
        page.watch.allowed += ["console: .*status of 400"]


# ---- every screen, every hand


SIDEWAYS = """() => [document.documentElement, ...document.querySelectorAll("body, main, main *")]
  .filter((e) => e.clientWidth > 0 && !e.closest(".scroll, .log, textarea, select, input"))
  .filter((e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline")
  .filter((e) => e === document.documentElement || getComputedStyle(e).overflowX !== "visible")
  .map((e) => `${e.tagName} ${e.className} ${e.scrollWidth} > ${e.clientWidth}`)"""


def test_a_phone(visit):
    size = {"width": 390, "height": 844}
    page = visit(viewport=size, is_mobile=True, has_touch=True, settings={"max_tokens": 300})
    composer, send = page.get_by_test_id("composer"), page.get_by_test_id("send")
    composer.tap()
    composer.fill("A_word_without_an_end_" * 10)
    send.tap()
    expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "done")
    assert len(shown(page)) == 300
    assert page.evaluate("window.innerWidth") == 390 and not page.evaluate(SIDEWAYS)
    for one in (composer, send):
        box = one.bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
    assert composer.bounding_box()["width"] > 200
    page.get_by_test_id("probabilities").tap()
    page.get_by_test_id("retry").tap()
    page.get_by_test_id("token").last.tap()
    box = page.get_by_test_id("token-popover").bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= 390
    page.get_by_test_id("settings-toggle").tap()
    expect(page.get_by_test_id("set-temperature")).to_be_visible()
    assert not page.evaluate(SIDEWAYS)
    page.get_by_test_id("settings-close").tap()

    page.get_by_test_id("tab-training").tap()
    row = page.locator(f'[data-testid=run][data-run="{COMPARED}"]')
    row.get_by_test_id("run-tick").check()
    expect(canvas(page, "loss")).to_be_visible()
    assert not page.evaluate(SIDEWAYS)
    row.get_by_test_id("run-open").tap()
    expect(page.get_by_test_id("result")).to_be_visible()
    assert not page.evaluate(SIDEWAYS)
    page.get_by_test_id("part-start").tap()
    expect(page.get_by_test_id("start-form")).to_be_visible()
    assert not page.evaluate(SIDEWAYS) and page.evaluate("window.innerWidth") == 390


def test_without_a_mouse(visit, server):
    page = visit(settings={"max_tokens": 3800})

    def tab_to(name):
        passed = []
        while focused(page) != name:
            assert len(passed) < 30, passed
            page.keyboard.press("Tab")
            passed.append(focused(page))
        return passed

    assert tab_to("composer")[:3] == ["skip", "tab-chat", "tab-training"]
    page.keyboard.type("Go on")
    assert tab_to("send") == ["send"]
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "streaming")
    expect(page.get_by_test_id("stop")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "stopped")
    expect(page.get_by_test_id("composer")).to_be_focused()
    until(lambda: server.metric("running") == 0)
    # What has the focus can be seen.
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.reload()
    tab_to("tab-training")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("run").first).to_be_visible()
    tab_to("run-tick")
    page.keyboard.press("Space")
    expect(page.get_by_test_id("run-tick").first).to_be_checked()


def test_light_and_dark(visit):
    page = visit("/#training", color_scheme="light")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    ink = "getComputedStyle(document.documentElement).color"
    light = page.evaluate(paper), page.evaluate(ink)
    assert sum(map(int, re.findall(r"\d+", light[0])[:3])) > 700
    for name, dark in (("light", False), ("dark", True)):
        page.get_by_test_id("theme").click()
        expect(page.get_by_test_id("theme")).to_have_text(f"Theme: {name}")
        assert ((page.evaluate(paper), page.evaluate(ink)) != light) == dark
    page.reload()
    assert sum(map(int, re.findall(r"\d+", page.evaluate(paper))[:3])) < 150
    expect(page.get_by_test_id("theme")).to_have_text("Theme: dark")
    page.get_by_test_id("theme").click()  # auto: as the system has it
    assert page.evaluate(paper) == light[0]
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) != light[0]


def test_an_api_key(visit, root, out):
    locked = Served(root, out, KEY).start()
    try:
        page = visit(at=locked, live=False)
        page.watch.allowed += ["console: .*status of 401", "console: .*WebSocket"]
        dialog, key = page.get_by_test_id("key-dialog"), page.get_by_test_id("key-input")
        expect(dialog).to_be_visible()
        key.fill("not-the-right-key-at-all")
        page.get_by_test_id("key-save").click()
        expect(dialog).to_contain_text("did not accept")
        expect(page.get_by_test_id("connection")).not_to_have_attribute("data-state", "live")
        expect(page.locator(f"option[value='{TALK}']")).to_have_count(0)
        key.fill(KEY)
        key.press("Enter")
        expect(dialog).to_have_count(0)
        expect(page.get_by_test_id("connection")).to_have_attribute("data-state", "live")
        expect(page.get_by_test_id("model-select")).to_have_value(TALK)
        say(page, "Let me in")
        assert shown(page) == locked.text("Let me in")
        page.get_by_test_id("tab-training").click()
        row = page.locator(f'[data-testid=run][data-run="{COMPARED}"]')
        row.get_by_test_id("run-tick").check()
        expect(canvas(page, "loss")).to_be_visible()
        page.reload()  # the tab remembers it, and only the tab
        expect(page.get_by_test_id("connection")).to_have_attribute("data-state", "live")
        expect(dialog).to_have_count(0)
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
    finally:
        locked.kill(signal.SIGTERM)
