// Requests to the server: the API key, errors in plain words, server-sent events.

import { askForKey, currentKey } from "./key";

export class ApiError extends Error {
  constructor(
    message: string,
    public status: number,
    /** Seconds to wait, of a 429. */
    public retryAfter = 0,
  ) {
    super(message);
  }
}

export async function request(path: string, options: RequestInit = {}): Promise<Response> {
  for (let attempt = 0; ; attempt++) {
    const headers = new Headers(options.headers);
    const key = currentKey();
    if (key) headers.set("Authorization", `Bearer ${key}`);
    if (options.body) headers.set("Content-Type", "application/json");
    let response: Response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ApiError("The server does not answer. Is it still running?", 0);
    }
    if (response.ok) return response;
    if (response.status === 401 && attempt === 0 && (await askForKey(key))) continue;
    throw await errorOf(response);
  }
}

async function errorOf(response: Response): Promise<ApiError> {
  let message = "";
  try {
    message = (await response.json())?.error?.message ?? "";
  } catch {
    // Not ours: a proxy's page, say.
  }
  if (response.status === 401) message = "The server wants an API key, or another one than this.";
  const wait = Number(response.headers.get("Retry-After"));
  return new ApiError(
    message || `The server answered with status ${response.status}.`,
    response.status,
    response.status === 429 ? Math.min(Math.max(wait || 5, 1), 600) : 0,
  );
}

export async function get<T>(path: string): Promise<T> {
  return (await request(path)).json() as Promise<T>;
}

export async function post<T>(path: string, body: unknown = {}): Promise<T> {
  return (await request(path, { method: "POST", body: JSON.stringify(body) })).json() as Promise<T>;
}

export function words(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** An id such as 05_scaling/run-4035d0 as part of a path: its slash separates, the rest is escaped. */
export function runPath(id: string): string {
  return "/api/runs/" + id.split("/").map(encodeURIComponent).join("/");
}

/** Cuts a byte stream into the data of its server-sent events, however the network cut the bytes:
 * in the middle of a letter, between \r and \n, or several events at once. */
export class EventParser {
  private decoder = new TextDecoder();
  private rest = "";
  private data: string[] = [];

  push(chunk: Uint8Array): string[] {
    this.rest += this.decoder.decode(chunk, { stream: true });
    return this.take(false);
  }

  end(): string[] {
    this.rest += this.decoder.decode();
    return this.take(true);
  }

  private take(last: boolean): string[] {
    const events: string[] = [];
    const line = /([^\r\n]*)(\r\n|\n|\r)/y;
    let used = 0;
    for (let match; (match = line.exec(this.rest)); used = line.lastIndex) {
      // A \r at the very end may be half of a \r\n: wait for what follows.
      if (match[2] === "\r" && line.lastIndex === this.rest.length && !last) break;
      this.line(match[1] ?? "", events);
    }
    this.rest = this.rest.slice(used);
    if (last) {
      if (this.rest) this.line(this.rest, events);
      this.line("", events);
      this.rest = "";
    }
    return events;
  }

  private line(text: string, events: string[]): void {
    if (text === "") {
      if (this.data.length) events.push(this.data.join("\n"));
      this.data = [];
    } else if (text.startsWith("data:")) {
      this.data.push(text.slice(text[5] === " " ? 6 : 5));
    }
  }
}

/** The data of each server-sent event of an answer. */
export async function* events(response: Response): AsyncGenerator<string> {
  const parser = new EventParser();
  const reader = response.body!.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* done ? parser.end() : parser.push(value);
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
