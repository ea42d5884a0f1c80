// What the server says: /v1 as OpenAI's with a few fields more, /api for this page.

export interface Model {
  id: string;
  created: number;
  context_length: number;
  parameters: number | null;
  loaded: boolean;
  /** A base model without a chat template: it continues text. */
  plain: boolean;
}

export interface TokenChoice {
  token: string;
  logprob: number;
  bytes: number[] | null;
}

export interface Token extends TokenChoice {
  top_logprobs: TokenChoice[];
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
}

export interface Status {
  needs_key: boolean;
  key_ok: boolean;
  default_model: string | null;
  store: string | null;
  device: string;
  version: string;
}

export interface Run {
  id: string;
  stage: string;
  name: string;
  where: "local" | "s3";
  status: "running" | "paused" | "stopped" | "finished" | "failed" | "idle";
  step: number | null;
  steps: number | null;
  updated: number;
  last: Record<string, unknown>;
  has_model: boolean;
  job: string | null;
  error: string | null;
}

export interface Checkpoint {
  step: number | null;
  metric: number | null;
  bytes: number;
  time: number;
  where: "local" | "s3";
  model: string | null;
}

export interface Sample {
  step: number;
  text: string;
}

export interface RunDetail extends Run {
  config: Record<string, unknown>;
  result: Record<string, unknown> | null;
  plots: string[];
  checkpoints: Checkpoint[];
  samples: Sample[];
}

/** A line of metrics.jsonl: numbers, lists of numbers (one entry an expert) or lists of lists. */
export type Row = Record<string, unknown>;

export interface Job {
  id: string;
  stage: string;
  command: string;
  flags: Record<string, unknown>;
  run: string | null;
  status: "starting" | "running" | "stopping" | "paused" | "stopped" | "finished" | "failed";
  started: number;
  exit_code: number | null;
  error: string | null;
}

export interface Flag {
  name: string;
  kind: "int" | "float" | "bool" | "str";
  default: string | null;
  help: string;
}

export interface Stage {
  stage: string;
  title: string;
  commands: { name: string; help: string; flags: Flag[] }[];
}

export type ServerMessage =
  | { type: "hello" | "ping" }
  | { type: "runs"; runs: Run[] }
  | { type: "jobs"; jobs: Job[] }
  | { type: "rows"; run: string; rows: Row[]; reset: boolean }
  | { type: "sample"; run: string; step: number; text: string }
  | { type: "log"; run: string; text: string }
  | { type: "error"; error: { message: string; type?: string; code?: string | null } };
