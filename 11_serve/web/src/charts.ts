// Small charts of the metrics of the compared runs, with one cursor for all.

import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { el, number } from "./dom";
import type { RunRows } from "./live";
import type { Row } from "./types";

export interface ChartOptions {
  x: "step" | "tokens" | "time";
  logY: boolean;
  /** Weight of the past in train_loss's running mean, 0 (off) to 0.99. */
  smoothing: number;
}

export interface ComparedRun {
  id: string;
  color: string;
  rows: RunRows;
}

interface Line {
  label: string;
  color: string;
  width: number;
  dash?: number[];
  /** Drawn without a line in the legend. */
  quiet?: boolean;
  values: (rows: Row[]) => (number | null)[];
}

interface Shown {
  plot: uPlot;
  figure: HTMLElement;
  signature: string;
  zoomed: boolean;
}

/** Eight colours that differ in brightness too and are clear on white and on black. */
export const COLORS = ["#2b7fd0", "#d9682b", "#2f9e58", "#b556b5", "#b8860b", "#d64f70", "#1f9aa5", "#7d7d87"];

const FIRST = ["loss", "val_bpb", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_gib", "reward", "kl", "entropy"];
const TITLES: Record<string, string> = {
  loss: "loss (nats per token)", val_bpb: "val_bpb (bits per byte)", tokens_per_s: "tokens per second",
  memory_gib: "memory (GiB)", lr: "learning rate (lr)", mfu: "share of peak FLOP/s (mfu)",
};

export class Charts {
  private shown = new Map<string, Shown>();
  private resize = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const shown = this.shown.get((entry.target as HTMLElement).dataset.metric!);
      const width = Math.floor(entry.contentRect.width);
      if (shown && width > 0 && width !== shown.plot.width) shown.plot.setSize({ width, height: HEIGHT });
    }
  });

  constructor(private host: HTMLElement) {}

  /** Everything anew: the axes' colours are those of the theme. */
  redraw(): void {
    for (const { plot } of this.shown.values()) plot.redraw(false);
  }

  draw(runs: ComparedRun[], options: ChartOptions): void {
    const charts = chartsOf(runs, options);
    for (const [metric, shown] of this.shown) {
      if (charts.has(metric)) continue;
      this.remove(shown);
      this.shown.delete(metric);
    }
    let before: Element | null = null;
    for (const [metric, perRun] of charts) {
      const lines = [...perRun.values()].flat();
      const data = align(runs, perRun, options.x);
      const positive = data.slice(1).some((column) => (column as (number | null)[]).some((v) => v !== null && v! > 0));
      const log = options.logY && positive;
      if (log) for (const column of data.slice(1)) forget(column as (number | null)[]);
      // Few points are drawn as points: a line through three of them says nothing by itself.
      const sparse = lines.map((_, i) => (data[i + 1] as unknown[]).filter((v) => v !== null && v !== undefined).length < 40);
      const signature = JSON.stringify([lines.map((l) => [l.label, l.color, l.dash, l.quiet]), options.x, log, sparse]);
      let shown = this.shown.get(metric);
      if (shown && shown.signature !== signature) {
        const figure = shown.figure;
        shown.plot.destroy();
        shown = this.create(metric, figure, lines, data, options, log, sparse, signature);
      } else if (!shown) {
        const figure = el("figure", { class: "chart", testid: "chart", "data-metric": metric, "aria-label": `Chart of ${metric}` },
          el("figcaption", {}, TITLES[metric] ?? metric));
        shown = this.create(metric, figure, lines, data, options, log, sparse, signature);
        this.resize.observe(figure);
      } else {
        shown.plot.setData(data, !shown.zoomed);
        // Without a new scale uPlot draws nothing by itself.
        if (shown.zoomed) shown.plot.redraw();
        else latestInLegend(shown.plot);
      }
      if (shown.figure.previousElementSibling !== before || !shown.figure.isConnected) {
        if (before) before.after(shown.figure);
        else this.host.prepend(shown.figure);
        const width = Math.floor(shown.figure.clientWidth);
        if (width > 0) shown.plot.setSize({ width, height: HEIGHT });
      }
      before = shown.figure;
    }
  }

  private remove(shown: Shown): void {
    this.resize.unobserve(shown.figure);
    shown.plot.destroy();
    shown.figure.remove();
  }

  private create(
    metric: string, figure: HTMLElement, lines: Line[], data: uPlot.AlignedData,
    options: ChartOptions, log: boolean, sparse: boolean[], signature: string,
  ): Shown {
    const ink = (): string => getComputedStyle(figure).color;
    const grid = { stroke: () => getComputedStyle(figure).borderTopColor, width: 1 };
    const axis = { stroke: ink, grid, ticks: grid, font: "11px system-ui, sans-serif" };
    const shown: Shown = { figure, signature, zoomed: false, plot: null! };
    shown.plot = new uPlot({
      width: Math.max(200, figure.clientWidth || 320),
      height: HEIGHT,
      cursor: {
        sync: { key: "training" },
        points: { size: 6 },
        drag: { x: true, y: false },
        bind: {
          dblclick: (_plot, _target, handler) => (event) => {
            shown.zoomed = false;
            handler(event);
            return null;
          },
        },
      },
      scales: { x: { time: false }, y: log ? { distr: 3, range: (_plot, low, high) => uPlot.rangeLog(low, high, 10, false) } : {} },
      axes: [
        { ...axis, size: 28, space: 60, values: (_plot, ticks) => ticks.map((v) => xText(v, options.x)) },
        { ...axis, size: 56, space: 28, values: (_plot, ticks) => ticks.map((v) => (v === null ? "" : number(v))) },
      ],
      series: [
        { label: options.x, value: (_plot, v) => (v === null ? "" : xText(v, options.x)) },
        ...lines.map((line, i): uPlot.Series => ({
          label: line.label,
          stroke: line.color,
          width: line.width,
          dash: line.dash,
          spanGaps: true,
          class: line.quiet ? "quiet" : undefined,
          points: { show: sparse[i]!, size: 5, fill: line.color },
          value: (plot, v, s, index) => number(v ?? lastBefore(plot.data[s] as (number | null)[], index)),
        })),
      ],
      hooks: {
        setSelect: [(plot) => {
          if (plot.select.width > 0) shown.zoomed = true;
        }],
        setCursor: [(plot) => {
          if (plot.cursor.idx === null || plot.cursor.left! < 0) latestInLegend(plot);
        }],
      },
    }, data, figure);
    latestInLegend(shown.plot);
    this.shown.set(metric, shown);
    const canvas = figure.querySelector("canvas");
    canvas?.setAttribute("role", "img");
    canvas?.setAttribute("aria-label", `Curves of ${metric}; the latest values stand below`);
    if (canvas) canvas.dataset.testid = "chart-canvas";
    return shown;
  }
}

const HEIGHT = 190;

function xText(value: number, x: ChartOptions["x"]): string {
  if (x !== "time") return number(value);
  if (value < 120) return `${Number(value.toPrecision(3))} s`;
  return value < 7200 ? `${number(Number((value / 60).toPrecision(3)))} min` : `${number(Number((value / 3600).toPrecision(3)))} h`;
}

/** Without a pointer over the charts the legend tells the latest values. */
function latestInLegend(plot: uPlot): void {
  plot.setLegend({ idx: plot.data[0].length - 1 }, false);
}

function lastBefore(column: (number | null)[], index: number | null): number | null {
  for (let i = index ?? column.length - 1; i >= 0; i--) if (column[i] !== null && column[i] !== undefined) return column[i]!;
  return null;
}

/** On a logarithmic axis there is no zero. */
function forget(column: (number | null)[]): void {
  for (let i = 0; i < column.length; i++) if (column[i]! <= 0) column[i] = null;
}

/** Which charts there are, and for each the lines of each run. */
function chartsOf(runs: ComparedRun[], options: ChartOptions): Map<string, Map<ComparedRun, Line[]>> {
  const charts = new Map<string, Map<ComparedRun, Line[]>>();
  const alone = runs.length === 1;
  for (const run of runs) {
    const name = shortName(run.id, runs);
    const add = (metric: string, ...lines: Line[]): void => {
      if (!charts.has(metric)) charts.set(metric, new Map());
      const perRun = charts.get(metric)!;
      perRun.set(run, [...(perRun.get(run) ?? []), ...lines]);
    };
    for (const [metric, shape] of run.rows.shapes) {
      const value = (rows: Row[]): (number | null)[] => rows.map((row) => finite(row[metric]));
      if (metric === "train_loss") {
        const smooth = options.smoothing > 0;
        if (smooth) add("loss", { label: `${name} train, raw`, color: run.color + "55", width: 1, quiet: true, values: value });
        add("loss", {
          label: `${name} train`, color: run.color, width: 1.5,
          values: (rows) => (smooth ? running(value(rows), options.smoothing) : value(rows)),
        });
      } else if (metric === "val_loss") {
        add("loss", { label: `${name} val`, color: run.color, width: 2, dash: [6, 4], values: value });
      } else if (shape === null) add(metric, { label: name, color: run.color, width: 1.5, values: value });
      else if (typeof shape === "number") add(metric, ...entries(run, alone ? "" : name, shape, (row) => row[metric]));
      else {
        // A list for each layer: a chart for each, or sixteen lines would lie on each other.
        for (let layer = 0; layer < shape[0]; layer++) {
          add(`${metric} ${layer}`, ...entries(run, alone ? "" : name, shape[1], (row) => (row[metric] as unknown[] | undefined)?.[layer]));
        }
      }
    }
  }
  const place = (metric: string): number => (FIRST.includes(metric) ? FIRST.indexOf(metric) : FIRST.length);
  return new Map([...charts].sort(([a], [b]) => place(a) - place(b) || a.localeCompare(b, "en", { numeric: true })));
}

/** One line for each entry of a list: in colours of their own where one run is shown (it then needs
 * no name), else from the run's full colour to a pale one. */
function entries(run: ComparedRun, name: string, count: number, list: (row: Row) => unknown): Line[] {
  return Array.from({ length: count }, (_, entry) => {
    const alpha = Math.round(255 * (1 - (0.7 * entry) / Math.max(1, count - 1)));
    return {
      label: `${name} ${entry}`.trim(),
      color: name ? run.color + alpha.toString(16).padStart(2, "0") : COLORS[entry % COLORS.length]!,
      width: 1.5,
      dash: name || entry < COLORS.length ? undefined : [5, 3],
      values: (rows: Row[]) => rows.map((row) => finite((list(row) as unknown[] | null | undefined)?.[entry])),
    };
  });
}

function shortName(id: string, runs: ComparedRun[]): string {
  const name = id.split("/").pop()!;
  return runs.some((other) => other.id !== id && other.id.endsWith("/" + name)) ? id : name;
}

function finite(value: unknown): number | null {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

/** A running mean that leaves gaps as gaps and does not start from zero. */
function running(values: (number | null)[], weight: number): (number | null)[] {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

/** Runs have their own steps: one common x axis, null where a run has no row. */
function align(runs: ComparedRun[], perRun: Map<ComparedRun, Line[]>, x: ChartOptions["x"]): uPlot.AlignedData {
  const tables: uPlot.AlignedData[] = [];
  for (const run of runs) {
    const lines = perRun.get(run);
    if (!lines) continue;
    // Time and tokens never fall within a run, but two rows may share a value: the later one counts.
    const all = run.rows.list().filter((row) => finite(row[x]) !== null);
    const rows = all.filter((row, i) => i + 1 === all.length || (all[i + 1]![x] as number) > (row[x] as number));
    tables.push([rows.map((row) => row[x] as number), ...lines.map((line) => line.values(rows))]);
  }
  return tables.length === 1 ? tables[0]! : uPlot.join(tables);
}
