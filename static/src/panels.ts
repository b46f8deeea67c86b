import { announce, csrf, el, find, icon, refusal } from "./dom";
import { bytes } from "./format";

interface Entry {
  name: string;
  path: string;
  type: string;
  size_bytes: number;
}

const HOME = "/home/user";

/** The files of the sandbox's home: list, open a folder, download, upload by picker or drop. */
export function filesPanel(sessionId: string, writable: boolean): { refresh(): void } {
  const panel = find("#files");
  const listing = find("ul", panel);
  const says = find(".says", panel);
  const url = `/sessions/${sessionId}/files`;
  let folder = HOME;
  let pending = 0;

  async function refresh(): Promise<void> {
    const mine = ++pending;
    const response = await fetch(`${url}?path=${encodeURIComponent(folder)}`);
    if (mine !== pending) return;
    if (!response.ok) {
      listing.replaceChildren();
      says.textContent = await refusal(response);
      return;
    }
    const { entries } = (await response.json()) as { entries: Entry[] };
    says.textContent = entries.length ? "" : "No files yet.";
    const up = folder.split("/").slice(0, -1).join("/");
    listing.replaceChildren(...(folder === HOME ? [] : [row("..", () => enter(up))]), ...entries.map(entry));
  }

  function enter(path: string): void {
    folder = path;
    void refresh();
  }

  function row(name: string, open: () => void): HTMLElement {
    return el("li", {}, icon("folder"), el("button", { type: "button", class: "quiet name", onclick: open }, name));
  }

  function entry({ name, path, type, size_bytes: size }: Entry): HTMLElement {
    if (type === "directory") return row(name, () => enter(path));
    const link = el("a", { class: "name", href: `${url}/download?path=${encodeURIComponent(path)}`, download: name, title: name }, name);
    return el("li", {}, icon("file"), link, el("span", { class: "num" }, bytes(size)));
  }

  async function upload(file: File): Promise<void> {
    says.textContent = `Uploading ${file.name}, ${bytes(file.size)} …`;
    const path = `${folder}/${file.name}`;
    const response = await fetch(`${url}?path=${encodeURIComponent(path)}`, { method: "PUT", body: file, headers: csrf() });
    if (!response.ok) {
      says.textContent = `${file.name}: ${await refusal(response)}`;
      return;
    }
    announce(`${file.name} uploaded.`);
    await refresh();
  }

  async function uploadAll(files: Iterable<File>): Promise<void> {
    for (const file of files) await upload(file);
  }

  const drop = find(".drop", panel);
  if (writable) {
    const picker = find<HTMLInputElement>("input[type=file]", panel);
    picker.addEventListener("change", async () => {
      await uploadAll(picker.files ?? []);
      picker.value = "";
    });
    find("button", drop).addEventListener("click", () => picker.click());
    drop.addEventListener("dragover", (event) => (event.preventDefault(), drop.classList.add("over")));
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      void uploadAll(event.dataTransfer?.files ?? []);
    });
  } else drop.hidden = true;
  find(".refresh", panel).addEventListener("click", refresh);
  void refresh();
  return { refresh: () => void refresh() };
}

/** Installs packages into the session and says what became of them. */
export function packagesPanel(sessionId: string): void {
  const form = document.querySelector<HTMLFormElement>("#packages form");
  if (!form) return;
  const says = find(".says", find("#packages"));
  const button = find<HTMLButtonElement>("button", form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const packages = String(new FormData(form).get("packages")).split(/[\s,]+/).filter(Boolean);
    if (!packages.length) return;
    button.disabled = true;
    says.textContent = `Installing ${packages.join(", ")} …`;
    const response = await fetch(`/sessions/${sessionId}/packages`, {
      method: "POST",
      body: JSON.stringify({ packages }),
      headers: { "Content-Type": "application/json", ...csrf() },
    });
    button.disabled = false;
    if (!response.ok) return void (says.textContent = await refusal(response));
    const { sentence } = await response.json();
    says.textContent = sentence;
    form.reset();
  });
}
