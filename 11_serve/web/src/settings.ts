// The panel of sampling settings, kept in localStorage.

import { el, load, save } from "./dom";

interface Field {
  name: string;
  label: string;
  hint: string;
  initial: number | null;
  /** The value at which the setting does nothing: it is then not sent. */
  neutral: number | null;
  min?: number;
  max?: number;
  step: number;
}

const FIELDS: Field[] = [
  { name: "temperature", label: "Temperature", hint: "0 takes the likeliest token each time", initial: 0.7, neutral: null, min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top p", hint: "likeliest tokens that make up this probability; 1 is off", initial: 0.95, neutral: null, min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", hint: "only the k likeliest tokens; 0 is off", initial: 0, neutral: 0, min: 0, step: 1 },
  { name: "min_p", label: "Min p", hint: "at least this share of the likeliest; 0 is off", initial: 0, neutral: 0, min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Max tokens", hint: "longest answer", initial: 512, neutral: null, min: 1, step: 1 },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "1 is off", initial: 1, neutral: 1, min: 0.1, max: 3, step: 0.05 },
  { name: "presence_penalty", label: "Presence penalty", hint: "0 is off", initial: 0, neutral: 0, min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", hint: "0 is off", initial: 0, neutral: 0, min: -2, max: 2, step: 0.1 },
  { name: "seed", label: "Seed", hint: "the same seed gives the same answer; empty is random", initial: null, neutral: null, step: 1 },
];

interface Values {
  system: string;
  /** One stop string a line; \n and \t are a line end and a tab. */
  stop: string;
  probabilities: boolean;
  numbers: Record<string, number | null>;
}

function initial(): Values {
  return {
    system: "", stop: "", probabilities: false,
    numbers: Object.fromEntries(FIELDS.map((field) => [field.name, field.initial])),
  };
}

const stored = load<Partial<Values>>("settings", {});
export const settings: Values = { ...initial(), ...stored, numbers: { ...initial().numbers, ...stored.numbers } };

export function saveSettings(): void {
  save("settings", settings);
}

/** The settings as fields of a request; `chat` says which of the two forms of logprobs is asked. */
export function requestFields(chat: boolean): Record<string, unknown> {
  const fields: Record<string, unknown> = {};
  for (const { name, neutral } of FIELDS) {
    const value = settings.numbers[name];
    if (value !== null && value !== undefined && value !== neutral) fields[name] = value;
  }
  const stop = settings.stop.split("\n").filter(Boolean)
    .map((text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  if (stop.length) fields.stop = stop;
  if (settings.probabilities) Object.assign(fields, chat ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 });
  return fields;
}

export function settingsPanel(close: () => void): HTMLElement {
  const panel = el("aside", { class: "settings", testid: "settings-panel", "aria-label": "Settings", id: "settings" });
  const draw = (): void => {
    panel.replaceChildren(
      el("div", { class: "row" },
        el("h2", {}, "Settings"), el("span", { class: "grow" }),
        el("button", { type: "button", testid: "settings-close", onclick: close }, "Close")),
      area("system", "System message", "said to the model before the conversation", 3),
      el("div", { class: "pairs" }, ...FIELDS.map(numberField)),
      area("stop", "Stop strings", "one a line, at most 4; \\n is a line end", 2),
      el("button", {
        type: "button", testid: "settings-reset",
        onclick: () => {
          Object.assign(settings, initial(), { probabilities: settings.probabilities });
          saveSettings();
          draw();
        },
      }, "Back to the defaults"),
    );
  };
  draw();
  return panel;
}

function area(name: "system" | "stop", label: string, hint: string, rows: number): HTMLElement {
  return el("p", { class: "field" },
    el("label", { for: `set-${name}` }, label),
    el("textarea", {
      id: `set-${name}`, testid: `set-${name}`, rows, value: settings[name], "aria-describedby": `hint-${name}`,
      oninput: (event: InputEvent) => {
        settings[name] = (event.target as HTMLTextAreaElement).value;
        saveSettings();
      },
    }),
    el("small", { id: `hint-${name}` }, hint));
}

function numberField(field: Field): HTMLElement {
  const { name, label, hint, min, max, step } = field;
  return el("p", { class: "field" },
    el("label", { for: `set-${name}` }, label),
    el("input", {
      type: "number", id: `set-${name}`, testid: `set-${name}`, min, max, inputmode: "decimal",
      // Any value in the range is fine; the step is for the arrows.
      step, value: settings.numbers[name] ?? "", "aria-describedby": `hint-${name}`,
      onchange: (event: Event) => {
        const input = event.target as HTMLInputElement;
        // Kept in its range; emptied, it goes back to its default.
        let value = input.value === "" ? field.initial : Number(input.value);
        if (value !== null) {
          value = Math.min(max ?? Infinity, Math.max(min ?? -Infinity, value));
          if (step === 1) value = Math.round(value);
        }
        settings.numbers[name] = value;
        input.value = value === null ? "" : String(value);
        saveSettings();
      },
    }),
    el("small", { id: `hint-${name}` }, hint));
}
