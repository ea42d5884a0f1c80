// The page: two views by the address's hash, the theme, the API key, the connection.

import "./style.css";
import { ApiError, get, words } from "./api";
import { chatWith, setDefaultModel, startChat } from "./chat";
import { el, load, save, setText } from "./dom";
import { askForKey, currentKey, onKeyChange } from "./key";
import { reconnectNow, startLive } from "./live";
import { refreshModels } from "./models";
import { refreshTraining, startTraining } from "./training";
import type { Status } from "./types";

const byId = (id: string): HTMLElement => document.getElementById(id)!;
const views = { chat: byId("view-chat"), training: byId("view-training") };

function showView(): void {
  const name = location.hash === "#training" ? "training" : "chat";
  for (const [key, view] of Object.entries(views)) view.hidden = key !== name;
  for (const link of document.querySelectorAll<HTMLAnchorElement>("header nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name === "training") refreshTraining();
}

const THEMES = ["auto", "light", "dark"] as const;

function setTheme(theme: (typeof THEMES)[number]): void {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  setText(byId("theme"), `Theme: ${theme}`);
}

function startTheme(): void {
  let theme = load<(typeof THEMES)[number]>("theme", "auto");
  if (!THEMES.includes(theme)) theme = "auto";
  setTheme(theme);
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]!;
    save("theme", theme);
    setTheme(theme);
    refreshTraining();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refreshTraining);
}

/** What the server is, whether it wants a key, and its models; tried again while it is not there. */
async function begin(): Promise<void> {
  try {
    const status = await get<Status>("/api/status");
    byId("key-button").hidden = !status.needs_key;
    byId("connection").title = [status.device, status.store, `version ${status.version}`].filter(Boolean).join(", ");
    if (status.needs_key && !status.key_ok && !(await askForKey(currentKey()))) {
      say("This server wants an API key: nothing can be shown without it.");
      return;
    }
    await refreshModels();
    setDefaultModel(status.default_model);
    say("");
  } catch (error) {
    say(words(error));
    // Without a key there is nothing to try again: a key that is saved begins anew.
    if (!(error instanceof ApiError && error.status === 401)) setTimeout(() => void begin(), 5000);
  }
}

const banner = el("p", { class: "error banner", role: "alert", testid: "banner", hidden: true });

function say(text: string): void {
  banner.hidden = !text;
  setText(banner, text);
}

document.querySelector("header")!.after(banner);
startTheme();
startChat(views.chat);
startTraining(views.training, (model) => {
  location.hash = "#chat";
  showView(); // now: the event comes later, and what is hidden takes no focus
  chatWith(model);
});
showView();
window.addEventListener("hashchange", showView);
byId("key-button").addEventListener("click", () => void askForKey(currentKey()));
document.querySelector(".skip")!.addEventListener("click", (event) => {
  // The hash names the view, so the link moves the focus itself.
  event.preventDefault();
  byId("main").focus();
});
onKeyChange(() => {
  reconnectNow();
  void begin();
});
startLive((text, state) => {
  const connection = byId("connection");
  connection.dataset.state = state;
  setText(connection, text);
});
void begin();
