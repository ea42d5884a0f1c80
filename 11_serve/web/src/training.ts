// The training view: the list of runs at the side; charts, one run, or the start form beside it.

import { ago, button, el, load, number, save, setText } from "./dom";
import { Charts, COLORS, type ChartOptions, type ComparedRun } from "./charts";
import { DetailView, sampleBox } from "./detail";
import { jobButtons, StartView } from "./jobs";
import { follow, live, type RunRows } from "./live";
import type { Run } from "./types";

type Part = "charts" | "run" | "start";

/** Run -> its colour's number, kept while the run is ticked. */
const ticked = new Map<string, number>(load<[string, number][]>("ticked", [], sessionStorage));
const options = load<ChartOptions>("charts", { x: "step", logY: false, smoothing: 0 });
let part: Part = "charts";
let fresh = true;

const list = el("ul", { class: "runs", testid: "runs", "aria-label": "Runs" });
const rows = new Map<string, RunRow>();
const search = el("input", { type: "search", testid: "run-search", "aria-label": "Find a run", placeholder: "Find a run", oninput: () => drawList() });
const listNote = el("p", { class: "note" }, "Waiting for the list of runs.");

const chartHost = el("div", { class: "charts", testid: "charts" });
const charts = new Charts(chartHost);
const chartNote = el("p", { class: "empty", testid: "charts-empty" });
const sampleHost = el("div", { class: "samples", testid: "samples" });
let sampleKey = "";
let detail: DetailView;
let start: StartView;
let view: HTMLElement;
const tabs = new Map<Part, HTMLButtonElement>();
const parts = new Map<Part, HTMLElement>();

export function startTraining(host: HTMLElement, chat: (model: string) => void): void {
  view = host;
  detail = new DetailView(chat);
  start = new StartView(openRun);
  parts.set("charts", el("div", {}, chartTools(), chartNote, chartHost, sampleHost));
  parts.set("run", detail.element);
  parts.set("start", start.element);
  const names: Record<Part, string> = { charts: "Charts", run: "Run", start: "Start a run" };
  for (const name of parts.keys()) tabs.set(name, button(names[name], `part-${name}`, () => show(name)));
  host.append(el("div", { class: "training" },
    el("div", { class: "side" }, search, listNote, list),
    el("div", { class: "board" },
      el("nav", { class: "parts", "aria-label": "Training" }, ...tabs.values()),
      ...parts.values())));
  show("charts");

  live.onRuns = () => {
    const known = new Set(live.runs.map((run) => run.id));
    for (const id of [...ticked.keys()]) if (!known.has(id)) ticked.delete(id);
    // A page that nobody has told what to show begins with what is running now.
    const running = live.runs.find((run) => run.status === "running");
    if (fresh && !ticked.size && running) ticked.set(running.id, 0);
    fresh = false;
    tickedChanged();
    drawList();
    detail.updateHeader();
  };
  live.onJobs = () => {
    drawList();
    start.update();
    detail.updateHeader();
  };
  live.onRows = () => planDraw();
  live.onLog = (run) => {
    if (run === detail.id) detail.readLog();
  };
  setInterval(() => {
    if (view.hidden || document.hidden) return;
    start.readLogs();
    for (const row of rows.values()) row.updateAge();
    const job = live.jobs.find((j) => j.run === detail.id);
    if (part === "run" && (job?.status === "running" || job?.status === "starting")) detail.readLog();
  }, 3000);
  setInterval(() => {
    const run = live.runs.find((r) => r.id === detail.id);
    if (!view.hidden && !document.hidden && part === "run" && run?.status === "running") void detail.refresh();
  }, 30_000);
}

/** Called when the view comes in sight (a hidden chart has no width) and when the theme changed. */
export function refreshTraining(): void {
  planDraw();
  charts.redraw();
}

function show(name: Part): void {
  part = name;
  for (const [key, tab] of tabs) {
    tab.setAttribute("aria-pressed", String(key === name));
    parts.get(key)!.hidden = key !== name;
  }
  if (name === "charts") planDraw();
}

function openRun(id: string): void {
  show("run");
  void detail.open(id);
  drawList();
  followWanted();
  // On a phone the board is below the list.
  const board = view.querySelector(".board")!;
  if (board.getBoundingClientRect().top > window.innerHeight * 0.5) board.scrollIntoView({ block: "start" });
}

// ---------------------------------------------------------------- the list

class RunRow {
  readonly element = el("li", { class: "run", testid: "run" });
  private box: HTMLInputElement;
  private swatch = el("span", { class: "swatch", "aria-hidden": "true" });
  private status = el("span", { class: "status", testid: "run-status" });
  private bar = el("progress", { testid: "run-progress" });
  private steps = el("small", { testid: "run-steps" });
  private last = el("small", { testid: "run-last" });
  private age = el("small", { testid: "run-age" });
  private actions = el("span", { class: "actions" });
  private error = el("small", { class: "error" });
  private actionKey = "";
  run!: Run;

  constructor(id: string) {
    this.element.dataset.run = id;
    const [stage, ...name] = id.split("/");
    this.box = el("input", {
      type: "checkbox", testid: "run-tick", "aria-label": `Compare ${id}`,
      onchange: () => {
        if (this.box.checked) {
          const used = new Set(ticked.values());
          const free = COLORS.findIndex((_, i) => !used.has(i));
          ticked.set(id, free >= 0 ? free : ticked.size % COLORS.length);
        } else ticked.delete(id);
        tickedChanged();
        drawList();
      },
    });
    this.bar.setAttribute("aria-label", `Progress of ${id}`);
    this.element.append(
      el("div", { class: "row" },
        el("label", { class: "tick" }, this.box, this.swatch),
        el("button", { type: "button", class: "name", testid: "run-open", onclick: () => openRun(id) }, name.join("/")),
        el("span", { class: "grow" }), this.status),
      this.bar,
      el("div", { class: "row wrap" }, el("small", { class: "stage" }, stage), this.steps, this.last, this.age, el("span", { class: "grow" }), this.actions),
      this.error);
  }

  update(run: Run): void {
    this.run = run;
    const color = ticked.get(run.id);
    this.box.checked = color !== undefined;
    this.swatch.style.background = color === undefined ? "" : COLORS[color]!;
    this.element.classList.toggle("open", detail.id === run.id && part === "run");
    this.element.dataset.status = run.status;
    this.status.className = `status ${run.status}`;
    setText(this.status, run.status);
    this.bar.hidden = run.step === null || !run.steps;
    if (!this.bar.hidden) {
      this.bar.max = run.steps!;
      this.bar.value = run.step!;
    }
    setText(this.steps, run.step === null ? "" : run.steps === null ? `step ${run.step}` : `${run.step}/${run.steps}`);
    const metrics: [string, string][] = [["train_loss", "loss"], ["val_bpb", "bpb"], ["reward", "reward"]];
    setText(this.last, metrics.filter(([name]) => typeof run.last[name] === "number")
      .slice(0, 2).map(([name, label]) => `${label} ${number(run.last[name])}`).join(", "));
    setText(this.error, run.error ?? "");
    this.updateAge();
    const job = live.jobs.find((j) => j.id === run.job);
    const key = JSON.stringify([job?.id, job?.status]);
    if (key !== this.actionKey) {
      this.actionKey = key;
      this.actions.replaceChildren(...jobButtons(job, (text) => setText(this.error, text)));
    }
  }

  updateAge(): void {
    setText(this.age, `${this.run.where === "s3" ? "S3, " : ""}${ago(this.run.updated)}`);
    this.age.title = new Date(this.run.updated * 1000).toLocaleString();
  }
}

/** Rows stay the elements they are, so that focus and a half-done click survive an update. */
function drawList(): void {
  const wanted = search.value.trim().toLowerCase();
  const shown = live.runs.filter((run) => `${run.id} ${run.status}`.toLowerCase().includes(wanted));
  const ids = new Set(shown.map((run) => run.id));
  for (const [id, row] of rows) if (!ids.has(id)) {
    row.element.remove();
    rows.delete(id);
  }
  shown.forEach((run, i) => {
    if (!rows.has(run.id)) rows.set(run.id, new RunRow(run.id));
    const row = rows.get(run.id)!;
    row.update(run);
    if (list.children[i] !== row.element) list.insertBefore(row.element, list.children[i] ?? null);
  });
  setText(listNote, live.runs.length === 0 ? "There is no run yet: start one." : shown.length === 0 ? "No run has this in its name." : "");
}

function tickedChanged(): void {
  save("ticked", [...ticked], sessionStorage);
  followWanted();
  planDraw();
}

/** The ticked runs and the opened one; nothing is sent where that is what is followed already. */
function followWanted(): void {
  const ids = new Set(ticked.keys());
  if (detail.id) ids.add(detail.id);
  if (ids.size !== live.followed.size || [...ids].some((id) => !live.followed.has(id))) follow([...ids]);
}

// ---------------------------------------------------------------- charts

function chartTools(): HTMLElement {
  const changed = (): void => {
    save("charts", options);
    setText(smoothingValue, options.smoothing.toFixed(2));
    draw();
  };
  const x = el("select", {
    testid: "chart-x", id: "chart-x",
    onchange: () => {
      options.x = x.value as ChartOptions["x"];
      changed();
    },
  }, ...(["step", "tokens", "time"] as const).map((name) => el("option", { value: name, selected: name === options.x }, name)));
  const log = el("input", {
    type: "checkbox", testid: "chart-log", checked: options.logY,
    onchange: () => {
      options.logY = log.checked;
      changed();
    },
  });
  const smoothing = el("input", {
    type: "range", testid: "chart-smoothing", min: 0, max: 0.99, step: 0.01, value: options.smoothing,
    oninput: () => {
      options.smoothing = Number(smoothing.value);
      changed();
    },
  });
  const smoothingValue = el("output", {}, options.smoothing.toFixed(2));
  return el("div", { class: "toolbar" },
    el("label", { class: "check" }, "x axis", x),
    el("label", { class: "check" }, log, "logarithmic y"),
    el("label", { class: "check" }, "smooth train_loss", smoothing, smoothingValue),
    el("small", {}, "Drag over a chart to zoom, double-click to see all."));
}

let planned = false;

/** At most twice a second, however fast rows come. */
function planDraw(): void {
  if (planned) return;
  planned = true;
  setTimeout(() => {
    planned = false;
    draw();
  }, 300);
}

function draw(): void {
  if (view.hidden || part !== "charts") return;
  const compared: ComparedRun[] = [];
  for (const [id, color] of ticked) {
    const data = live.followed.get(id);
    if (data) compared.push({ id, color: COLORS[color]!, rows: data });
  }
  charts.draw(compared, options);
  setText(chartNote, !ticked.size ? "Tick runs in the list to see and compare their curves."
    : chartHost.childElementCount ? "" : "The runs that are ticked have written no metrics yet.");
  drawSamples(compared.map((run) => [run.id, run.rows]));
}

function drawSamples(runs: [string, RunRows][]): void {
  const latest = runs.map(([id, data]) => ({ id, samples: [...data.samples.values()].sort((a, b) => b.step - a.step).slice(0, 5) }))
    .filter(({ samples }) => samples.length);
  const key = JSON.stringify(latest);
  if (key === sampleKey) return;
  sampleKey = key;
  sampleHost.replaceChildren(...latest.flatMap(({ id, samples }) => [
    el("h3", {}, `Samples of ${id}`), ...samples.map((sample) => sampleBox(sample)),
  ]));
}
