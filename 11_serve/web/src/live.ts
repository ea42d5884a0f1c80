// The WebSocket: runs, jobs and rows as they come; reconnects by itself and misses nothing.

import { askForKey, currentKey } from "./key";
import type { Job, Row, Run, Sample, ServerMessage } from "./types";

/** The rows of one followed run. A later row of a step replaces the earlier one. */
export class RunRows {
  private rows = new Map<number, Row>();
  private sorted: Row[] | null = null;
  /** The step of the row that came last. Not the largest: after a resume the run logs steps again,
   * and those must be asked for if the connection breaks just then. */
  lastStep = -1;
  /** Metric -> null for a number, its length for a list, [outer, inner] for a list of lists. */
  shapes = new Map<string, null | number | [number, number]>();
  samples = new Map<number, Sample>();

  add(rows: Row[], reset: boolean): void {
    if (reset) {
      this.rows.clear();
      this.shapes.clear();
      this.samples.clear();
      this.lastStep = -1;
    }
    for (const row of rows) {
      if (typeof row.step !== "number") continue;
      this.rows.set(row.step, row);
      this.lastStep = row.step;
      for (const [name, value] of Object.entries(row)) this.see(name, value);
    }
    this.sorted = null;
  }

  private see(name: string, value: unknown): void {
    if (name === "step" || name === "tokens" || name === "time") return;
    if (typeof value === "number") this.shapes.set(name, null);
    else if (Array.isArray(value) && value.length) {
      if (value.every((entry) => typeof entry === "number")) this.shapes.set(name, value.length);
      else if (Array.isArray(value[0])) this.shapes.set(name, [value.length, value[0].length]);
    }
  }

  list(): Row[] {
    return (this.sorted ??= [...this.rows.values()].sort((a, b) => (a.step as number) - (b.step as number)));
  }
}

export const live = {
  runs: [] as Run[],
  jobs: [] as Job[],
  followed: new Map<string, RunRows>(),
  onRuns: (): void => {},
  onJobs: (): void => {},
  onRows: (_run: string): void => {},
  onLog: (_run: string): void => {},
};

let socket: WebSocket | null = null;
let delay = 1;
let lastHeard = 0;
let retryTimer = 0;
let refused: string | null | undefined;
let showState = (_text: string, _state: string): void => {};

export function startLive(show: (text: string, state: string) => void): void {
  showState = show;
  connect();
  window.addEventListener("online", reconnectNow);
  setInterval(() => {
    // The server pings every 15 s: 45 s of silence mean a connection that died without a word.
    if (socket?.readyState === WebSocket.OPEN && Date.now() - lastHeard > 45_000) socket.close();
  }, 5000);
}

export function reconnectNow(): void {
  clearInterval(retryTimer);
  delay = 1;
  if (socket) {
    socket.onclose = null;
    socket.close();
  }
  connect();
}

/** Follows these runs and forgets the others: on a run followed anew everything is sent again. */
export function follow(ids: string[]): void {
  for (const id of [...live.followed.keys()]) if (!ids.includes(id)) live.followed.delete(id);
  for (const id of ids) if (!live.followed.has(id)) live.followed.set(id, new RunRows());
  sendFollow();
}

function sendFollow(): void {
  // The server lets a page follow 50 runs.
  const runs = [...live.followed].slice(-50).map(([id, rows]) => [id, rows.lastStep]);
  send({ type: "follow", runs: Object.fromEntries(runs) });
}

function send(message: unknown): void {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function connect(): void {
  showState("connecting", "connecting");
  const url = new URL("/api/live", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const key = currentKey();
  socket = new WebSocket(url);
  lastHeard = Date.now();
  socket.onopen = () => send({ type: "hello", key });
  socket.onmessage = (event) => {
    lastHeard = Date.now();
    receive(JSON.parse(event.data) as ServerMessage, key);
  };
  socket.onclose = () => {
    let left = delay;
    delay = Math.min(30, delay * 2);
    const tick = (): void => {
      if (left <= 0) {
        clearInterval(retryTimer);
        connect();
      } else showState(`reconnecting in ${left--} s`, "broken");
    };
    clearInterval(retryTimer);
    tick();
    retryTimer = window.setInterval(tick, 1000);
  };
}

function receive(message: ServerMessage, key: string | null): void {
  switch (message.type) {
    case "hello":
      delay = 1;
      showState("live", "live");
      if (live.followed.size) sendFollow();
      return;
    case "ping":
      return send({ type: "pong" });
    case "runs":
      live.runs = message.runs;
      return live.onRuns();
    case "jobs":
      live.jobs = message.jobs;
      return live.onJobs();
    case "rows":
      // Rows under way while a run was let go of are nobody's.
      live.followed.get(message.run)?.add(message.rows, message.reset);
      return live.onRows(message.run);
    case "sample":
      live.followed.get(message.run)?.samples.set(message.step, message);
      return live.onRows(message.run);
    case "log":
      return live.onLog(message.run);
    case "error": {
      console.warn("live:", message.error.message);
      const { code, type, message: said } = message.error;
      // Asked once for a key that was refused; a key that is then saved reconnects by onKeyChange.
      if (/key|auth/i.test(`${code} ${type} ${said}`) && refused !== key) {
        refused = key;
        void askForKey(key);
      }
    }
  }
}
