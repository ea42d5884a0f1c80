// Tokens of an answer as spans, tinted by probability, with the alternatives in a small popover.

import { el, setText } from "./dom";
import type { Token, TokenChoice } from "./types";

/** A token's text; bytes that are not whole UTF-8 (a part of a letter) in hex. */
export function tokenText(token: TokenChoice): string {
  if (!token.bytes) return token.token;
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(token.bytes));
  } catch {
    return "<" + token.bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ") + ">";
  }
}

/** With spaces and line ends made visible, for the popover. */
function visible(text: string): string {
  if (text === "") return "(nothing)";
  return text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replace(/^ +| +$/g, (s) => "\u2423".repeat(s.length));
}

function percent(logprob: number): string {
  const value = 100 * Math.exp(logprob);
  return value >= 10 ? `${value.toFixed(0)}%` : value >= 0.1 ? `${value.toFixed(1)}%` : "<0.1%";
}

/** 0 (nearly sure) to 5 (unlikely): the strength of the tint. */
function tint(logprob: number): number {
  const prob = Math.exp(logprob);
  return [0.9, 0.7, 0.45, 0.2, 0.05].filter((limit) => prob < limit).length;
}

/** The spans of one answer. Only one is in the tab order; arrow keys go from token to token. */
export class TokenSpans {
  private count = 0;

  constructor(private host: HTMLElement) {
    host.addEventListener("keydown", (event) => {
      const span = event.target as HTMLElement;
      if (!span.classList.contains("token")) return;
      const next =
        event.key === "ArrowRight" ? span.nextElementSibling
        : event.key === "ArrowLeft" ? span.previousElementSibling
        : event.key === "Home" ? host.firstElementChild
        : event.key === "End" ? host.lastElementChild
        : null;
      if (!(next instanceof HTMLElement) || !next.classList.contains("token")) return;
      event.preventDefault();
      span.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  update(tokens: Token[]): void {
    for (; this.count < tokens.length; this.count++) {
      const token = tokens[this.count]!;
      const text = tokenText(token);
      const span = el("span", {
        class: `token p${tint(token.logprob)}${text.includes("\n") ? " newline" : ""}`,
        testid: "token",
        tabindex: this.count === 0 ? 0 : -1,
        "data-prob": Math.exp(token.logprob).toFixed(4),
      }, text);
      const show = (): void => showPopover(span, token);
      span.addEventListener("mouseenter", show);
      span.addEventListener("focus", show);
      span.addEventListener("click", show);
      span.addEventListener("mouseleave", hidePopover);
      span.addEventListener("blur", hidePopover);
      this.host.append(span);
    }
  }
}

const popover = el("div", { id: "token-popover", role: "tooltip", testid: "token-popover", hidden: true });
let shownFor: HTMLElement | null = null;

function showPopover(span: HTMLElement, token: Token): void {
  hidePopover();
  // The chosen token is usually among the alternatives; where it is not, it goes first.
  const choices = token.top_logprobs.some((other) => same(other, token))
    ? token.top_logprobs
    : [token, ...token.top_logprobs];
  popover.replaceChildren(
    el("p", {}, `${visible(tokenText(token))}  ${percent(token.logprob)}`),
    el("ul", {}, ...choices.map((choice) => {
      const bar = el("span", { class: "bar", "aria-hidden": "true" });
      bar.style.width = `${(100 * Math.exp(choice.logprob)).toFixed(1)}%`;
      return el("li", { class: same(choice, token) ? "chosen" : "", testid: "token-alternative" },
        bar, el("code", {}, visible(tokenText(choice))), el("span", {}, percent(choice.logprob)));
    })),
  );
  if (!popover.isConnected) document.body.append(popover);
  popover.hidden = false;
  shownFor = span;
  span.setAttribute("aria-describedby", popover.id);
  // Below the token where there is room, else above; never beyond the window's edges. A token
  // broken over two lines has two boxes: the first.
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = popover;
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8));
  const below = box.bottom + 4 + height <= window.innerHeight;
  popover.style.left = `${left}px`;
  popover.style.top = `${Math.max(4, below ? box.bottom + 4 : box.top - 4 - height)}px`;
}

function same(a: TokenChoice, b: TokenChoice): boolean {
  return a.token === b.token && String(a.bytes) === String(b.bytes);
}

/** Hides the popover; true if one was shown. */
export function hidePopover(): boolean {
  if (!shownFor) return false;
  shownFor.removeAttribute("aria-describedby");
  shownFor = null;
  popover.hidden = true;
  return true;
}

document.addEventListener("scroll", hidePopover, { capture: true, passive: true });

/** Text grows at its end only: the text node is changed where the text does. */
export function updateText(host: HTMLElement, text: string): void {
  const node = host.firstChild;
  const old = node?.textContent ?? "";
  if (node instanceof Text && text.startsWith(old)) {
    if (text.length > old.length) node.appendData(text.slice(old.length));
  } else setText(host, text);
}
