// The chat: one user message goes to one or several models, whose answers stand side by side.

import { words } from "./api";
import { button, copy, download, el, load, number, save, setText } from "./dom";
import { generate, newAnswer, type Answer } from "./generate";
import { describe, models, onModels, optionText, refreshModels } from "./models";
import { requestFields, saveSettings, settings, settingsPanel } from "./settings";
import { hidePopover, TokenSpans, tokenText, updateText } from "./tokens";

interface Turn {
  user: string;
  /** One for each column; null where the column was added later. */
  answers: (Answer | null)[];
}

const MAX_COLUMNS = 4;

let columns = load<string[]>("columns", []).slice(0, MAX_COLUMNS);
let turns: Turn[] = load<Turn[]>("conversation", [], sessionStorage);
let mode: "chat" | "text" = "chat";
/** In text mode: what each column wrote last, and the text before it. */
let continued: (Answer | null)[] = [];
let textBefore: string | null = null;
const running = new Map<Answer, AbortController>();
/** Brings what is on the page up to what the answer holds. */
const views = new Map<Answer, () => void>();

// ---------------------------------------------------------------- the frame

const heads = el("div", { class: "heads", testid: "model-bar" });
const conversation = el("div", { class: "conversation", testid: "conversation", role: "log", "aria-live": "off", "aria-label": "Conversation", tabindex: 0 });
const composer = el("textarea", {
  id: "composer", testid: "composer", rows: 2, oninput: () => fit(),
  onkeydown: (event: KeyboardEvent) => {
    // isComposing: Enter then ends the choice of a character in an input method. In text mode
    // Enter belongs to the text, and Ctrl+Enter continues it.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    if (mode === "text" && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    submit();
  },
});
const composerLabel = el("label", { for: "composer", class: "hint" });
const sendButton = el("button", { type: "submit", class: "main", testid: "send" }, "Send");
const stopButton = button("Stop", "stop", () => stopAll(), { title: "Escape" });
const undoButton = button("Undo", "undo", () => {
  if (textBefore !== null) composer.value = textBefore;
  textBefore = null;
  continued = [];
  render();
});
const form = el("form", {
  class: "composer",
  onsubmit: (event: Event) => {
    event.preventDefault();
    submit();
  },
}, composerLabel, el("div", { class: "row end" }, composer, el("div", { class: "stack" }, sendButton, stopButton, undoButton)));

const modeSwitch = el("fieldset", { class: "modes", testid: "modes" },
  el("legend", {}, "A base model continues a text; it was not taught to answer."),
  modeChoice("chat", "Chat"), modeChoice("text", "Continue text"));

const probabilities = el("input", {
  type: "checkbox", testid: "probabilities", checked: settings.probabilities,
  onchange: () => {
    settings.probabilities = probabilities.checked;
    saveSettings();
    render();
  },
});
const addButton = button("Add a model", "add-model", () => {
  columns.push([...models.keys()].find((id) => !columns.includes(id)) ?? columns[0] ?? "");
  columnsChanged();
  heads.querySelectorAll("select")[columns.length - 1]?.focus();
});
const settingsButton = button("Settings", "settings-toggle", () => toggleSettings(), {
  "aria-expanded": "false", "aria-controls": "settings",
});
const panel = settingsPanel(() => toggleSettings(false));
panel.hidden = true;

function modeChoice(value: "chat" | "text", label: string): HTMLElement {
  return el("label", {}, el("input", {
    type: "radio", name: "mode", value, testid: `mode-${value}`, checked: value === mode,
    onchange: () => {
      stopAll();
      mode = value;
      render();
      composer.focus();
    },
  }), label);
}

function toggleSettings(open = panel.hidden): void {
  panel.hidden = !open;
  settingsButton.setAttribute("aria-expanded", String(open));
  if (open) panel.querySelector("textarea")?.focus();
  else settingsButton.focus();
}

export function startChat(host: HTMLElement): void {
  host.append(
    el("div", { class: "chat" },
      el("div", { class: "toolbar" },
        addButton,
        button("New conversation", "new", () => {
          stopAll();
          turns = [];
          continued = [];
          textBefore = null;
          if (mode === "text") composer.value = "";
          render();
          composer.focus();
        }),
        button("Export", "export", () => exportConversation(), { title: "Save the conversation as JSON" }),
        el("label", { class: "check" }, probabilities, "Show probabilities"),
        el("span", { class: "grow" }),
        settingsButton),
      heads, modeSwitch, conversation, form),
    panel);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]") || host.hidden) return;
    const hadPopover = hidePopover();
    if (running.size) stopAll();
    else if (!hadPopover && !panel.hidden && panel.contains(document.activeElement)) toggleSettings(false);
  });
  onModels(() => {
    // A model that is gone (its run was deleted) makes room for one that is there.
    if (models.size) columns = columns.map((id) => (models.has(id) ? id : models.keys().next().value!));
    drawHeads();
  });
  render();
}

/** The server's answer to which model a page begins with. */
export function setDefaultModel(id: string | null): void {
  if (columns.length) return drawHeads();
  columns = [id ?? models.keys().next().value ?? ""];
  // A conversation that is still here from before a reload had no column to stand in.
  render();
}

/** From the training view: this model answers in the first column. */
export function chatWith(id: string): void {
  if (columns.length) columns[0] = id;
  else columns = [id];
  columnsChanged();
  composer.focus();
}

function columnsChanged(): void {
  save("columns", columns);
  render();
}

function drawHeads(): void {
  const focused = document.activeElement instanceof HTMLSelectElement ? document.activeElement.dataset.column : undefined;
  heads.style.setProperty("--columns", String(Math.max(1, columns.length)));
  heads.replaceChildren(...columns.map((id, column) => {
    const select = el("select", {
      testid: "model-select", "data-column": column, "aria-label": columns.length > 1 ? `Model ${column + 1}` : "Model",
      onchange: () => {
        columns[column] = select.value;
        columnsChanged();
      },
    }, ...[...models.values()].map((model) => el("option", { value: model.id, selected: model.id === id }, optionText(model))));
    if (!models.size) select.append(el("option", {}, "no model found"));
    return el("div", { class: "head" },
      el("div", { class: "row" }, select,
        columns.length > 1 && button("Remove", "remove-model", () => {
          for (const turn of turns) {
            const [gone] = turn.answers.splice(column, 1);
            if (gone) running.get(gone)?.abort();
          }
          columns.splice(column, 1);
          continued.splice(column, 1);
          columnsChanged();
        }, { "aria-label": `Remove model ${column + 1}` })),
      el("small", { testid: "model-info" }, describe(models.get(id))));
  }));
  if (focused) heads.querySelector<HTMLSelectElement>(`select[data-column="${focused}"]`)?.focus();
  addButton.disabled = columns.length >= MAX_COLUMNS || !models.size;
  modeSwitch.hidden = mode === "chat" && !columns.some((id) => models.get(id)?.plain);
}

// ---------------------------------------------------------------- the conversation

/** Draws everything anew; follows the end of the conversation only where the reader was there. */
function render(follow = nearEnd()): void {
  views.clear();
  hidePopover();
  drawHeads();
  setText(composerLabel, mode === "chat"
    ? "Message: Enter sends, Shift+Enter makes a new line"
    : "Text to continue: Ctrl+Enter continues it");
  setText(sendButton, mode === "chat" ? "Send" : "Continue");
  composer.rows = mode === "chat" ? 2 : 8;
  fit();
  const parts: HTMLElement[] = [];
  if (mode === "text") {
    if (continued.length) parts.push(answersRow(continued, -1));
  } else {
    turns.forEach((turn, i) => parts.push(userMessage(turn, i), answersRow(turn.answers, i)));
  }
  if (!parts.length) {
    parts.push(el("p", { class: "empty", testid: "empty" }, mode === "chat"
      ? "Write a message below. With several models the same message goes to each."
      : "Write the beginning of a text below. The model goes on from its end."));
  }
  conversation.replaceChildren(...parts);
  if (follow) scrollDown();
  busy();
  keepConversation();
}

function userMessage(turn: Turn, i: number): HTMLElement {
  const message = el("article", { class: "user", testid: "message-user", "aria-label": "You" });
  const text = el("div", { class: "text", testid: "user-text" }, turn.user);
  const copyButton = button("Copy", "copy", () => void copy(turn.user, copyButton));
  message.append(text, el("div", { class: "actions" }, copyButton, button("Edit", "edit", () => {
    const input = el("textarea", {
      testid: "edit-input", value: turn.user, rows: Math.min(10, turn.user.split("\n").length + 1), "aria-label": "Edit your message",
      onkeydown: (event: KeyboardEvent) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          render();
        } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          resend();
        }
      },
    });
    const resend = (): void => {
      if (!input.value.trim()) return;
      stopAll();
      turns = turns.slice(0, i);
      sendMessage(input.value);
    };
    message.replaceChildren(input,
      el("small", {}, "What follows this message is cut off and answered anew."),
      el("div", { class: "actions" },
        el("button", { type: "button", class: "main", testid: "edit-send", onclick: resend }, "Send"),
        button("Cancel", "edit-cancel", () => render())));
    input.focus();
  })));
  return message;
}

function answersRow(answers: (Answer | null)[], i: number): HTMLElement {
  const row = el("div", { class: "answers", "data-columns": columns.length });
  row.style.setProperty("--columns", String(columns.length));
  columns.forEach((_, column) => {
    const answer = answers[column];
    row.append(answer ? answerMessage(answer, i, column) : missingAnswer(i, column));
  });
  return row;
}

function missingAnswer(i: number, column: number): HTMLElement {
  return el("article", { class: "answer missing" },
    el("small", {}, "This model was added later."),
    i === turns.length - 1 && button("Answer this too", "answer-too", () => answerTurn(i, column)));
}

function answerMessage(answer: Answer, i: number, column: number): HTMLElement {
  const text = el("div", { class: "text", testid: "answer-text", "aria-live": "polite", "aria-atomic": "false" });
  const note = el("p", { class: "note", testid: "answer-note", role: "status" });
  const error = el("p", { class: "error", testid: "answer-error", role: "alert" });
  const meta = el("small", { testid: "answer-meta" });
  const copyButton = button("Copy", "copy", () => void copy(answer.text, copyButton));
  const retryButton = button("Retry", "retry", () => (i < 0 ? continueText() : answerTurn(i, column)));
  const message = el("article", { class: "answer", testid: "message-assistant", "data-column": column, "aria-label": `Answer of ${answer.model}` },
    el("h3", {}, answer.model), text, note, error, meta);
  const actions = el("div", { class: "actions" }, copyButton);
  message.append(actions);
  if (i < 0 && columns.length > 1) {
    actions.append(button("Take this text", "take", () => {
      composer.value = (textBefore ?? composer.value) + answer.text;
      textBefore = null;
      continued = [];
      render();
      composer.focus();
    }));
  }
  const spans = new TokenSpans(text);
  const withTokens = settings.probabilities;
  const update = (): void => {
    if (withTokens && answer.tokens.length) spans.update(answer.tokens);
    else updateText(text, answer.text);
    const over = answer.state !== "waiting" && answer.state !== "streaming";
    message.dataset.state = answer.state;
    // Read aloud once it is complete, not token by token.
    text.setAttribute("aria-busy", String(!over));
    setText(note, answer.state === "waiting"
      ? answer.note || (models.get(answer.model)?.loaded === false ? "The model is being loaded first." : "Waiting for the first token.")
      : answer.state === "stopped" ? "Stopped." : answer.finish === "length" && over ? "Cut off at the longest length allowed." : "");
    setText(error, answer.error);
    setText(meta, statistics(answer));
    copyButton.hidden = !answer.text;
    if (over && (i < 0 || i === turns.length - 1)) copyButton.after(retryButton);
    else retryButton.remove();
  };
  views.set(answer, update);
  update();
  return message;
}

function statistics(answer: Answer): string {
  if (answer.first === null || answer.last === null) return "";
  // Without usage (a stopped answer) the pieces that came are about the tokens.
  const exact = answer.usage?.completion_tokens ?? answer.tokens.length;
  const count = exact || answer.pieces;
  const parts = [`${exact ? "" : "about "}${count} tokens`];
  // The first token's time is that of reading the prompt: the rate is of those after it.
  if (count > 1 && answer.last > answer.first) {
    parts.push(`${number(Number(((count - 1) / (answer.last - answer.first)).toPrecision(3)))} tokens/s`);
  }
  parts.push(`first token after ${answer.first.toFixed(2)} s`);
  if (answer.usage) parts.push(`prompt ${answer.usage.prompt_tokens} tokens`);
  return parts.join(", ");
}

// ---------------------------------------------------------------- sending

function submit(): void {
  if (running.size || !columns.length) return;
  if (mode === "text") return continueText();
  const text = composer.value;
  if (!text.trim()) return;
  composer.value = "";
  sendMessage(text);
}

function sendMessage(user: string): void {
  const i = turns.push({ user, answers: columns.map(() => null) }) - 1;
  columns.forEach((_, column) => answerTurn(i, column, false));
  render(true);
}

/** Asks a column's model for its answer to turn i (again, where it has one). */
function answerTurn(i: number, column: number, draw = true): void {
  const messages: { role: string; content: string }[] = [];
  if (settings.system.trim()) messages.push({ role: "system", content: settings.system });
  for (const turn of turns.slice(0, i)) {
    // A turn this column did not see, or got no answer to, would leave two user messages in a row.
    const text = turn.answers[column]?.text;
    if (text) messages.push({ role: "user", content: turn.user }, { role: "assistant", content: text });
  }
  messages.push({ role: "user", content: turns[i]!.user });
  const old = turns[i]!.answers[column];
  if (old) running.get(old)?.abort();
  const answer = newAnswer(columns[column]!);
  turns[i]!.answers[column] = answer;
  run(answer, "/v1/chat/completions", { model: answer.model, messages, ...requestFields(true) });
  if (draw) render();
}

/** The text in the composer goes on: by itself with one model, else each column shows its own. */
function continueText(): void {
  if (running.size) return;
  // A retry goes on from the same place.
  const prompt = textBefore !== null && continued[0] && composer.value === textBefore + continued[0].text ? textBefore : composer.value;
  if (!prompt) return;
  composer.value = prompt;
  textBefore = prompt;
  continued = columns.map((id) => newAnswer(id));
  const [only] = continued;
  for (const answer of continued as Answer[]) {
    run(answer, "/v1/completions", { model: answer.model, prompt, ...requestFields(false) }, () => {
      if (columns.length > 1 || continued[0] !== only) return;
      composer.value = prompt + only!.text;
      fit();
      composer.scrollTop = composer.scrollHeight;
    });
  }
  render();
}

function run(answer: Answer, path: string, body: Record<string, unknown>, after = () => {}): void {
  const controller = new AbortController();
  running.set(answer, controller);
  let planned = false;
  // Many chunks may come within one frame: the page is brought up to date once a frame.
  const changed = (): void => {
    if (planned) return;
    planned = true;
    requestAnimationFrame(() => {
      planned = false;
      show();
    });
  };
  const show = (): void => {
    const atEnd = nearEnd();
    views.get(answer)?.();
    after();
    if (atEnd) scrollDown();
  };
  const wasLoaded = models.get(answer.model)?.loaded;
  void generate(answer, path, body, controller.signal, changed).then(() => {
    running.delete(answer);
    show();
    busy();
    keepConversation();
    if (!wasLoaded) refreshModels().catch((error) => console.warn(words(error)));
  });
}

function stopAll(): void {
  for (const controller of running.values()) controller.abort();
}

/** Shows the buttons of what can be done now; the composer stays usable while an answer comes. */
function busy(): void {
  const active = running.size > 0;
  const hadFocus = document.activeElement === stopButton || document.activeElement === sendButton;
  sendButton.hidden = active;
  stopButton.hidden = !active;
  composer.readOnly = active && mode === "text";
  undoButton.hidden = mode === "chat" || active || columns.length > 1 || textBefore === null;
  if (hadFocus) (active ? stopButton : composer).focus();
}

function fit(): void {
  // As high as its text, up to a third of the window (CSS says so).
  composer.style.height = "auto";
  composer.style.height = `${composer.scrollHeight + 2}px`;
}

function nearEnd(): boolean {
  return conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 60;
}

function scrollDown(): void {
  conversation.scrollTop = conversation.scrollHeight;
}

/** Outlives a reload of the page, not the tab; token probabilities are too large to keep. */
function keepConversation(): void {
  save("conversation", turns.map((turn) => ({
    user: turn.user,
    answers: turn.answers.map((answer) => answer && {
      ...answer, tokens: [], note: "",
      state: answer.state === "waiting" || answer.state === "streaming" ? "stopped" : answer.state,
    }),
  })), sessionStorage);
}

function exportConversation(): void {
  const time = new Date().toISOString();
  const conversations = columns.map((model, column) => ({
    model,
    messages: [
      ...(settings.system.trim() ? [{ role: "system", content: settings.system }] : []),
      ...turns.flatMap((turn) => {
        const answer = turn.answers[column];
        if (!answer) return [];
        return [{ role: "user", content: turn.user }, {
          role: "assistant", content: answer.text, model: answer.model, state: answer.state,
          finish_reason: answer.finish, error: answer.error || undefined, usage: answer.usage,
          seconds_to_first_token: answer.first, seconds: answer.last,
          tokens: answer.tokens.length
            ? answer.tokens.map((token) => ({ ...token, text: tokenText(token) })) : undefined,
        }];
      }),
    ],
  }));
  const text = mode === "text" ? { text: composer.value } : {};
  download(`conversation-${time.slice(0, 19).replaceAll(":", "")}.json`,
    JSON.stringify({ exported: time, settings: requestFields(true), ...text, conversations }, null, 2));
}
