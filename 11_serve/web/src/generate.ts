// One streamed answer: sends the request, reads the events into `answer`, keeps time.

import { ApiError, events, request, words } from "./api";
import type { Token, Usage } from "./types";

export interface Answer {
  model: string;
  text: string;
  tokens: Token[];
  /** Chunks with text: one a token, or fewer. */
  pieces: number;
  state: "waiting" | "streaming" | "done" | "stopped" | "failed";
  /** What it waits for, while it waits. */
  note: string;
  error: string;
  finish: string | null;
  usage: Usage | null;
  /** Seconds from the request to the first and to the last piece of text. */
  first: number | null;
  last: number | null;
}

export function newAnswer(model: string): Answer {
  return {
    model, text: "", tokens: [], pieces: 0, state: "waiting", note: "", error: "",
    finish: null, usage: null, first: null, last: null,
  };
}

/** Fills `answer` from a streamed completion and calls `changed` after each piece. Never throws:
 * what goes wrong is in answer.error. A 429 is tried once more after the time the server names. */
export async function generate(
  answer: Answer,
  path: string,
  body: Record<string, unknown>,
  signal: AbortSignal,
  changed: () => void,
): Promise<void> {
  for (let attempt = 0; ; attempt++) {
    try {
      await stream(answer, path, body, signal, changed);
    } catch (error) {
      if (error instanceof ApiError && error.status === 429 && attempt === 0 && !signal.aborted) {
        const note = "The server is busy (429). Trying again by itself in";
        if (await countdown(error.retryAfter, signal, (left) => {
          answer.note = `${note} ${left} s.`;
          changed();
        })) continue;
      }
      answer.state = signal.aborted ? "stopped" : "failed";
      if (!signal.aborted) {
        answer.error = error instanceof TypeError ? "The connection broke off." : words(error);
        if (error instanceof ApiError && error.status === 429) {
          answer.error = `The server is still busy (429). Wait ${error.retryAfter} s, then retry.`;
        }
      }
    }
    answer.note = "";
    changed();
    return;
  }
}

async function stream(
  answer: Answer,
  path: string,
  body: Record<string, unknown>,
  signal: AbortSignal,
  changed: () => void,
): Promise<void> {
  const start = performance.now();
  const response = await request(path, {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response)) {
    // Read on to the end of the stream: leaving here would look like a broken connection to the server.
    if (data === "[DONE]") continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The model failed.", 500);
    if (chunk.usage) answer.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const piece: string = choice.delta?.content ?? choice.text ?? "";
    const tokens = tokensOf(choice.logprobs);
    if (piece || tokens.length) {
      answer.last = (performance.now() - start) / 1000;
      answer.first ??= answer.last;
      answer.state = "streaming";
      answer.note = "";
      answer.text += piece;
      answer.pieces++;
      answer.tokens.push(...tokens);
    }
    if (choice.finish_reason) answer.finish = choice.finish_reason;
    changed();
  }
  if (!answer.finish) throw new ApiError("The connection broke off before the answer was complete.", 0);
  if (answer.finish === "error") throw new ApiError("The model failed in the middle of the answer.", 500);
  answer.state = "done";
}

/** Token entries of a choice: the chat's form, or the parallel lists of OpenAI's older /v1/completions. */
function tokensOf(logprobs: any): Token[] {
  if (!logprobs) return [];
  if (Array.isArray(logprobs.content)) return logprobs.content;
  if (!Array.isArray(logprobs.tokens)) return [];
  return logprobs.tokens.map((token: string, i: number) => ({
    token,
    logprob: logprobs.token_logprobs[i] ?? 0,
    bytes: null,
    top_logprobs: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([other, logprob]) => ({
      token: other, logprob: logprob as number, bytes: null,
    })),
  }));
}

/** Waits and tells the seconds left; false if it was stopped. */
async function countdown(seconds: number, signal: AbortSignal, tell: (left: number) => void): Promise<boolean> {
  for (let left = Math.ceil(seconds); left > 0; left--) {
    tell(left);
    await new Promise<void>((resolve) => {
      const done = (): void => {
        clearTimeout(timer);
        signal.removeEventListener("abort", done);
        resolve();
      };
      const timer = setTimeout(done, 1000);
      signal.addEventListener("abort", done);
    });
    if (signal.aborted) return false;
  }
  return true;
}
