// The API key, for a server that was given one. Kept in sessionStorage: gone with the tab.

import { button, el } from "./dom";

const NAME = "api-key";
let asking: Promise<boolean> | null = null;
let whenChanged = (): void => {};

export function currentKey(): string | null {
  return sessionStorage.getItem(NAME);
}

export function onKeyChange(callback: () => void): void {
  whenChanged = callback;
}

/** Asks for a key unless another one than `refused` is there by now; true if there is one to try.
 * Requests that fail at the same time share one dialog. */
export function askForKey(refused: string | null): Promise<boolean> {
  if (currentKey() !== refused) return Promise.resolve(true);
  return (asking ??= ask(refused !== null).finally(() => (asking = null)));
}

function ask(wrong: boolean): Promise<boolean> {
  return new Promise((resolve) => {
    const input = el("input", {
      type: "password", id: "key-input", testid: "key-input", autocomplete: "off", required: true,
    });
    const dialog = el(
      "dialog",
      { testid: "key-dialog", "aria-labelledby": "key-title" },
      el(
        "form",
        {
          method: "dialog",
          onsubmit: () => {
            sessionStorage.setItem(NAME, input.value.trim());
            dialog.returnValue = "saved";
          },
        },
        el("h2", { id: "key-title" }, "API key"),
        el("p", {}, wrong
          ? "The server did not accept this key."
          : "This server wants a key. It was given to it when it was started."),
        el("label", { for: "key-input" }, "Key"),
        input,
        el("div", { class: "buttons" },
          el("button", { type: "submit", class: "main", testid: "key-save" }, "Use this key"),
          button("Cancel", "key-cancel", () => dialog.close())),
      ),
    );
    dialog.addEventListener("close", () => {
      const saved = dialog.returnValue === "saved";
      dialog.remove();
      if (saved) whenChanged();
      resolve(saved);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
