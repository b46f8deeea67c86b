import { announce, find } from "./dom";

const THEMES = ["system", "light", "dark"] as const;

/** System, light, dark, system …; kept in a cookie, so that the server draws the first paint right. */
function theme(button: HTMLElement): void {
  const root = document.documentElement;
  const say = () => {
    const now = root.dataset.theme ?? "system";
    button.setAttribute("aria-label", `Theme: ${now}`);
    button.title = `Theme: ${now}`;
  };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf((root.dataset.theme as "light") ?? "system") + 1) % 3]!;
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    document.cookie = `theme=${next}; path=/; max-age=${next === "system" ? 0 : 31536000}; samesite=lax`;
    say();
    announce(`Theme: ${next}.`);
  });
  say();
}

/** Buttons that copy: the text of the element they name, or their own value. */
async function copy(button: HTMLElement): Promise<void> {
  const text = button.dataset.copy ? find(button.dataset.copy).textContent! : button.dataset.text!;
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
    const label = button.querySelector("span") ?? button;
    const was = label.textContent;
    label.textContent = "Copied";
    setTimeout(() => (label.textContent = was), 1500);
  } catch {
    announce("Copying is not allowed here: select the text instead.");
  }
}

/** Tabs with arrow keys. */
function tabs(list: HTMLElement): void {
  const all = [...list.querySelectorAll<HTMLElement>("[role=tab]")];
  const choose = (tab: HTMLElement) => {
    for (const other of all) {
      other.setAttribute("aria-selected", String(other === tab));
      other.tabIndex = other === tab ? 0 : -1;
      find(`#${other.getAttribute("aria-controls")}`).hidden = other !== tab;
    }
  };
  list.addEventListener("click", (event) => {
    const tab = (event.target as HTMLElement).closest<HTMLElement>("[role=tab]");
    if (tab) choose(tab);
  });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = all[(all.indexOf(event.target as HTMLElement) + step + all.length) % all.length]!;
    choose(next);
    next.focus();
  });
}

const THEN = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const AGO = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "narrow" });

/** Moments: how long ago, with the exact local time on hover. */
function moments(): void {
  for (const time of document.querySelectorAll<HTMLTimeElement>("time[data-ago]")) {
    const at = new Date(time.dateTime);
    const seconds = (at.getTime() - Date.now()) / 1000;
    const [unit, size] = ([["day", 86400], ["hour", 3600], ["minute", 60]] as const).find(([, s]) => Math.abs(seconds) >= s) ?? ["second", 1];
    time.textContent = Math.abs(seconds) < 5 ? "now" : AGO.format(Math.round(seconds / size), unit);
    time.title = THEN.format(at);
  }
}

document.addEventListener("click", (event) => {
  const target = event.target as HTMLElement;
  const copying = target.closest<HTMLElement>("[data-copy], [data-text]");
  if (copying) void copy(copying);
  for (const menu of document.querySelectorAll("details.menu[open]")) if (!menu.contains(target)) menu.removeAttribute("open");
});
document.addEventListener("keydown", (event) => {
  if (event.key === "k" && (event.metaKey || event.ctrlKey)) {
    event.preventDefault();
    document.querySelector<HTMLInputElement>("#search")?.focus();
  }
  if (event.key === "Escape") for (const menu of document.querySelectorAll("details.menu[open]")) menu.removeAttribute("open");
});
for (const form of document.querySelectorAll<HTMLFormElement>("form[data-confirm]")) {
  form.addEventListener("submit", (event) => confirm(form.dataset.confirm) || event.preventDefault());
}
for (const form of document.querySelectorAll<HTMLFormElement>("form[data-live]")) form.addEventListener("change", () => form.requestSubmit());
const button = document.querySelector<HTMLElement>("#theme");
if (button) theme(button);
document.querySelectorAll<HTMLElement>("[role=tablist]").forEach(tabs);
moments();
setInterval(moments, 30_000);
