// Jobs: starting a run from the page, its buttons, the end of its log.

import { get, post, words } from "./api";
import { ago, button, el, setText } from "./dom";
import { live } from "./live";
import type { Flag, Job, Stage } from "./types";

/** The buttons a job has in its state; what goes wrong is told through `say`. */
export function jobButtons(job: Job | undefined, say: (text: string) => void): HTMLElement[] {
  if (!job) return [];
  const act = (action: "pause" | "resume" | "stop", label: string): HTMLButtonElement => {
    const made: HTMLButtonElement = button(label, `job-${action}`, async () => {
      made.disabled = true;
      try {
        const { job: now } = await post<{ job: Job }>(`/api/jobs/${encodeURIComponent(job.id)}/${action}`);
        live.jobs = live.jobs.map((other) => (other.id === now.id ? now : other));
        live.onJobs();
      } catch (error) {
        say(words(error));
        made.disabled = false;
      }
    }, { "data-job": job.id, "aria-label": `${label} ${job.run ?? job.stage}` });
    return made;
  };
  switch (job.status) {
    case "starting":
      return [act("stop", "Stop")];
    case "running":
      return [act("pause", "Pause"), act("stop", "Stop")];
    case "paused":
      return [act("resume", "Resume"), act("stop", "Stop")];
    case "stopped":
    case "failed":
      return [act("resume", "Resume")];
    default:
      return [];
  }
}

/** The end of a job's log, read on from where it was. */
export class LogTail {
  readonly element = el("pre", { class: "log", testid: "log", tabindex: 0, "aria-label": "Log" });
  private offset = 0;
  private text = "";
  private reading = false;
  private again = false;

  constructor(private job: string) {}

  async update(): Promise<void> {
    if (this.reading) {
      this.again = true;
      return;
    }
    this.reading = true;
    try {
      const { text, offset } = await get<{ text: string; offset: number }>(
        `/api/jobs/${encodeURIComponent(this.job)}/log?offset=${this.offset}`);
      this.offset = offset;
      if (text) {
        this.text = tidy(this.text + text);
        const atEnd = this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight < 40;
        setText(this.element, this.text);
        if (atEnd) this.element.scrollTop = this.element.scrollHeight;
      }
    } catch (error) {
      if (!this.text) setText(this.element, words(error));
    } finally {
      this.reading = false;
      if (this.again) {
        this.again = false;
        // Not faster than once a second, however fast the log grows.
        setTimeout(() => void this.update(), 1000);
      }
    }
  }
}

/** A progress bar rewrites its line: only what stands there in the end is shown, without colours. */
function tidy(text: string): string {
  return text
    .replace(/\x1b\[[0-9;]*[A-Za-z]/g, "")
    .split("\n").slice(-400)
    .map((line) => line.replace(/\r+$/, "").slice(line.replace(/\r+$/, "").lastIndexOf("\r") + 1))
    .join("\n");
}

/** The form that starts a run, and the list of jobs below it. */
export class StartView {
  readonly element = el("div", { testid: "start-view" });
  private list = el("div", { class: "jobs", testid: "jobs" });
  private rows = new Map<string, { element: HTMLElement; key: string; tail: LogTail | null }>();

  constructor(private open: (run: string) => void) {
    this.element.append(el("p", { class: "note" }, "Loading the list of stages."));
    void this.loadStages();
  }

  async loadStages(): Promise<void> {
    try {
      const { stages } = await get<{ stages: Stage[] }>("/api/stages");
      this.element.replaceChildren(startForm(stages), el("h3", {}, "Jobs"), this.list);
      this.update();
    } catch (error) {
      this.element.replaceChildren(
        el("p", { class: "error", role: "alert" }, words(error)),
        button("Try again", "stages-retry", () => void this.loadStages()));
    }
  }

  /** From the list of jobs; a job's row is made anew only where its state changed. */
  update(): void {
    const jobs = [...live.jobs].sort((a, b) => b.started - a.started);
    for (const [id, row] of this.rows) if (!jobs.some((job) => job.id === id)) {
      row.element.remove();
      this.rows.delete(id);
    }
    jobs.forEach((job, i) => {
      const key = JSON.stringify(job);
      const old = this.rows.get(job.id);
      if (old?.key !== key) {
        const tail = old?.tail ?? null;
        const element = this.jobRow(job, tail);
        old?.element.replaceWith(element);
        this.rows.set(job.id, { element, key, tail });
      }
      const { element } = this.rows.get(job.id)!;
      if (this.list.children[i] !== element) this.list.insertBefore(element, this.list.children[i] ?? null);
    });
    if (!jobs.length) this.list.replaceChildren(el("p", { class: "note" }, "No run was started from this page yet."));
    else this.list.querySelector(":scope > p")?.remove();
  }

  private jobRow(job: Job, tail: LogTail | null): HTMLElement {
    const error = el("p", { class: "error", role: "alert" }, job.error);
    const flags = Object.entries(job.flags).map(([name, value]) => (value === true ? `--${name}` : `--${name} ${value}`)).join(" ");
    const logHost = el("div", {}, tail?.element);
    const row: HTMLElement = el("article", { class: "job", testid: "job", "data-job": job.id, "data-status": job.status },
      el("div", { class: "row" },
        el("strong", {}, `${job.stage} ${job.command}`), el("span", { class: `status ${job.status}` }, job.status),
        el("small", {}, `started ${ago(job.started)}`), el("span", { class: "grow" }),
        job.run && button("Open the run", "job-open", () => this.open(job.run!)),
        button("Log", "job-log", () => {
          const made = this.rows.get(job.id)!;
          if (made.tail) {
            made.tail.element.remove();
            made.tail = null;
          } else {
            made.tail = new LogTail(job.id);
            logHost.append(made.tail.element);
            void made.tail.update();
          }
        }),
        ...jobButtons(job, (text) => setText(error, text))),
      flags && el("code", {}, flags), error, logHost);
    return row;
  }

  /** Open logs go on; called on a timer, since a job without a run yet cannot be followed. */
  readLogs(): void {
    for (const { tail } of this.rows.values()) if (tail) void tail.update();
  }
}

function startForm(stages: Stage[]): HTMLElement {
  const stage = el("select", { id: "start-stage", testid: "start-stage" },
    ...stages.map((s) => el("option", { value: s.stage }, s.title ? `${s.stage}: ${s.title}` : s.stage)));
  const command = el("select", { id: "start-command", testid: "start-command" });
  const help = el("p", { class: "note" });
  const search = el("input", { type: "search", id: "flag-search", testid: "flag-search", placeholder: "name or words of its description" });
  const fields = el("div", { class: "flags", testid: "flags" });
  const message = el("p", { role: "status", testid: "start-message" });
  const start = el("button", { type: "submit", class: "main", testid: "start" }, "Start");

  const chosen = (): Stage["commands"][number] | undefined =>
    stages.find((s) => s.stage === stage.value)?.commands.find((c) => c.name === command.value);
  const filter = (): void => {
    const wanted = search.value.trim().toLowerCase().split(/\s+/);
    for (const field of fields.children as Iterable<HTMLElement> & HTMLCollection) {
      const text = (field as HTMLElement).dataset.text!;
      (field as HTMLElement).hidden = !wanted.every((word) => text.includes(word));
    }
  };
  const drawFlags = (): void => {
    setText(help, chosen()?.help ?? "");
    fields.replaceChildren(...(chosen()?.flags ?? []).map(flagField));
    filter();
  };
  const drawCommands = (): void => {
    const commands = stages.find((s) => s.stage === stage.value)?.commands ?? [];
    command.replaceChildren(...commands.map((c) => el("option", { value: c.name }, c.name)));
    drawFlags();
  };
  stage.addEventListener("change", drawCommands);
  command.addEventListener("change", drawFlags);
  search.addEventListener("input", filter);
  drawCommands();

  return el("form", {
    class: "start", testid: "start-form",
    onsubmit: async (event: Event) => {
      event.preventDefault();
      start.disabled = true;
      message.className = "note";
      setText(message, "Starting.");
      try {
        const { job } = await post<{ job: Job }>("/api/jobs", {
          stage: stage.value, command: command.value, flags: changedFlags(fields, chosen()?.flags ?? []),
        });
        if (!live.jobs.some((other) => other.id === job.id)) live.jobs = [job, ...live.jobs];
        live.onJobs();
        setText(message, "Started: it is the first in the list of jobs below.");
      } catch (error) {
        message.className = "error";
        setText(message, words(error));
      }
      start.disabled = false;
    },
  },
    el("div", { class: "pairs" },
      el("p", { class: "field" }, el("label", { for: "start-stage" }, "Stage"), stage),
      el("p", { class: "field" }, el("label", { for: "start-command" }, "Command"), command),
      el("p", { class: "field" }, el("label", { for: "flag-search" }, "Find a flag"), search)),
    help, fields, el("div", { class: "row" }, start, message));
}

function isOn(text: string | null): boolean {
  return text?.toLowerCase() === "true";
}

function flagField(flag: Flag): HTMLElement {
  const id = `flag-${flag.name}`;
  const common = { id, testid: "flag", "data-flag": flag.name, "aria-describedby": `${id}-help` };
  const input = flag.kind === "bool"
    ? el("input", { ...common, type: "checkbox", checked: isOn(flag.default) })
    : el("input", {
      ...common, placeholder: flag.default ?? "", autocomplete: "off", spellcheck: "false",
      type: flag.kind === "str" ? "text" : "number",
      step: flag.kind === "int" ? 1 : flag.kind === "float" ? "any" : null,
    });
  return el("p", {
    class: flag.kind === "bool" ? "field bool" : "field",
    "data-text": `${flag.name} ${flag.name.replaceAll("_", "-")} ${flag.help}`.toLowerCase(),
  }, el("label", { for: id }, flag.name), input, el("small", { id: `${id}-help` }, flag.help));
}

/** Only what differs from the default: the command line then says what was chosen. */
function changedFlags(fields: HTMLElement, flags: Flag[]): Record<string, unknown> {
  const changed: Record<string, unknown> = {};
  for (const flag of flags) {
    const input = fields.querySelector<HTMLInputElement>(`[data-flag="${CSS.escape(flag.name)}"]`)!;
    if (flag.kind === "bool") {
      if (input.checked !== isOn(flag.default)) changed[flag.name] = input.checked;
    } else if (input.value.trim() !== "" && input.value !== flag.default) {
      changed[flag.name] = flag.kind === "str" ? input.value : Number(input.value);
    }
  }
  return changed;
}
