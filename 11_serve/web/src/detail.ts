// One run: config, result, checkpoints, plots, samples, and the log of its job.

import { get, post, request, runPath, words } from "./api";
import { ago, button, bytes, el, number, setText } from "./dom";
import { LogTail, jobButtons } from "./jobs";
import { live } from "./live";
import { addModel } from "./models";
import type { Checkpoint, Model, RunDetail, Sample } from "./types";

export class DetailView {
  readonly element = el("div", { testid: "run-detail" });
  id: string | null = null;
  private job: string | null = null;
  private tail: LogTail | null = null;
  private header = el("div", { class: "row wrap" });
  private said = el("p", { class: "error", role: "alert", testid: "detail-error" });
  private body = el("div");
  private seen = "";
  private pictures = new Map<string, string>();

  constructor(private chat: (model: string) => void) {
    this.element.append(el("p", { class: "note" }, "Choose a run in the list: its name opens it."));
  }

  async open(id: string): Promise<void> {
    if (this.id !== id) {
      this.id = id;
      this.seen = this.job = null!;
      this.tail = null;
      this.pictures.clear();
      this.said.textContent = "";
      this.body.replaceChildren(el("p", { class: "note" }, "Loading."));
      this.element.replaceChildren(el("h2", { testid: "detail-title" }, id), this.header, this.said, this.body);
    }
    this.updateHeader();
    await this.refresh();
  }

  /** The run's own state and buttons, from the live list. */
  updateHeader(): void {
    const run = live.runs.find((r) => r.id === this.id);
    if (!run) return;
    const job = live.jobs.find((j) => j.id === run.job) ?? live.jobs.find((j) => j.run === run.id);
    const steps = run.step === null ? "" : `step ${run.step}${run.steps === null ? "" : ` of ${run.steps}`}`;
    const key = JSON.stringify([run.status, run.error, job, run.has_model]);
    if (key !== this.seen) {
      const first = !this.seen;
      this.seen = key;
      this.header.replaceChildren(
        el("span", { class: `status ${run.status}`, testid: "detail-status" }, run.status),
        el("small", { class: "steps" }),
        el("span", { class: "grow" }),
        el("div", { class: "row" }, ...jobButtons(job, (text) => setText(this.said, text))));
      setText(this.said, run.error ?? job?.error ?? "");
      // A run that ended or saved has a result or checkpoints that were not there before.
      if (!first) void this.refresh();
    }
    setText(this.header.querySelector(".steps")!, `${steps}, changed ${ago(run.updated)}`.replace(/^, /, ""));
    if (job && job.id !== this.job) {
      this.job = job.id;
      this.tail = new LogTail(job.id);
      void this.refresh();
    }
  }

  readLog(): void {
    void this.tail?.update();
  }

  async refresh(): Promise<void> {
    const id = this.id;
    if (!id) return;
    try {
      const detail = await get<RunDetail>(runPath(id));
      if (this.id === id) this.draw(detail);
    } catch (error) {
      if (this.id === id) setText(this.said, words(error));
    }
  }

  private draw(detail: RunDetail): void {
    const open = new Map([...this.body.querySelectorAll("details")].map((d) => [d.dataset.name, d.open]));
    const parts: (HTMLElement | null)[] = [
      this.section("Result", detail.result && table(detail.result, "result")),
      this.section("Checkpoints", detail.checkpoints.length ? this.checkpoints(detail.checkpoints) : null),
      this.section("Log", this.tail?.element ?? null),
      this.section("Plots", detail.plots.length ? el("div", { class: "plots" }, ...detail.plots.map((p) => this.plot(detail.id, p))) : null),
      this.section("Samples", detail.samples.length
        ? el("div", {}, ...[...detail.samples].sort((a, b) => b.step - a.step).slice(0, 20).map((sample) => sampleBox(sample))) : null),
      this.section("Config", table(detail.config, "config")),
    ];
    this.body.replaceChildren(...parts.filter((part) => part !== null));
    for (const d of this.body.querySelectorAll("details")) d.open = open.get(d.dataset.name) ?? true;
    void this.tail?.update();
  }

  private section(name: string, content: HTMLElement | null): HTMLElement | null {
    return content && el("details", { "data-name": name, testid: `detail-${name.toLowerCase()}` }, el("summary", {}, name), content);
  }

  private checkpoints(list: Checkpoint[]): HTMLElement {
    return el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, ...["step", "metric", "size", "written", "where", ""].map((h) => el("th", {}, h)))),
      el("tbody", {}, ...list.map((c) => el("tr", { testid: "checkpoint" },
        el("td", {}, c.step === null ? "last" : String(c.step)), el("td", {}, number(c.metric)), el("td", {}, bytes(c.bytes)),
        el("td", {}, ago(c.time)), el("td", {}, c.where),
        el("td", {}, c.model && this.loadButton(c.model)))))));
  }

  private loadButton(model: string): HTMLElement {
    const made: HTMLButtonElement = button("Load into chat", "load-model", async () => {
      made.disabled = true;
      setText(made, "Loading, please wait");
      setText(this.said, "");
      try {
        const answer = await post<{ model: string; context_length: number; parameters: number; plain: boolean }>(
          "/api/models/load", { model });
        addModel({ ...answer, id: answer.model, created: 0, loaded: true } satisfies Model & { model: string });
        this.chat(answer.model);
      } catch (error) {
        setText(this.said, `${model} could not be loaded: ${words(error)}`);
      }
      made.disabled = false;
      setText(made, "Load into chat");
    }, { "data-model": model });
    return made;
  }

  /** Fetched, since an <img> cannot send the API key; kept until another run is opened. */
  private plot(id: string, file: string): HTMLElement {
    const image = el("img", { alt: `Plot ${file}`, testid: "plot" });
    const figure = el("figure", {}, image, el("figcaption", {}, file));
    const known = this.pictures.get(file);
    if (known) image.src = known;
    request(`${runPath(id)}/plots/${encodeURIComponent(file)}`)
      .then((response) => response.blob())
      // A data URL needs no revoking: two redraws may be under way, and end in either order.
      .then((blob) => new Promise<string>((done) => {
        const reader = new FileReader();
        reader.onload = () => done(reader.result as string);
        reader.readAsDataURL(blob);
      }))
      .then((url) => {
        if (this.id !== id) return;
        image.src = url;
        this.pictures.set(file, url);
      })
      .catch((error) => figure.append(el("p", { class: "error" }, words(error))));
    return figure;
  }
}

export function sampleBox(sample: Sample): HTMLElement {
  return el("article", { class: "sample", testid: "sample", "data-step": sample.step },
    el("h4", {}, `step ${sample.step}`), el("div", { class: "text" }, sample.text));
}

function table(values: Record<string, unknown>, testid: string): HTMLElement {
  return el("div", { class: "scroll" }, el("table", { testid }, el("tbody", {}, ...Object.entries(values).map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, plain(value)))))));
}

function plain(value: unknown): string {
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6)));
  return typeof value === "string" ? value : JSON.stringify(value);
}
