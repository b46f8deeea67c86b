import { Cell, type Notebook, type Saved } from "./cell";
import { announce, find } from "./dom";
import { clock, usd } from "./format";
import { filesPanel, packagesPanel } from "./panels";
import { Feed, type Message, type Status } from "./socket";

interface Page {
  id: string;
  open: boolean;
  can_run: boolean;
  languages: string[];
  end_at: string;
  example: string;
}

const page: Page = JSON.parse(find("#session-data").textContent!);
const cells: Cell[] = [];
const list = find("#cells");
let current: Cell | undefined;
let queue: Cell[] = [];
let removed: string[] = [];
let wasLost = false;

const memory = `session:${page.id}`;

const notebook: Notebook = {
  run(cell, then) {
    if (page.can_run && page.open && !cell.open && cell.editor.code.trim()) {
      cell.begin("waiting");
      queue.push(cell);
      pump();
    }
    if (then === "next") {
      if (cells.at(-1) === cell) insert(cells.length).edit();
      else notebook.step(cell, 1, false);
    }
    if (then === "insert") insert(cells.indexOf(cell) + 1).edit();
  },
  stop(cell) {
    if (queue.includes(cell)) {
      queue = queue.filter((other) => other !== cell);
      return cell.refuse("");
    }
    cell.wantsStop = true;
    if (cell.state !== "sent") feed.send({ type: "interrupt_request", execution_id: cell.executionId });
  },
  current(cell) {
    current?.element.classList.remove("current");
    current = cell;
    cell.element.classList.add("current");
  },
  step(cell, direction, edit) {
    const next = cells[cells.indexOf(cell) + direction];
    if (!next) return;
    edit ? next.edit() : next.command();
    next.element.scrollIntoView({ block: "nearest" });
  },
  insert(beside, where) {
    insert(cells.indexOf(beside) + (where === "below" ? 1 : 0)).command();
  },
  remove(cell) {
    if (cell.open) return announce("This cell is running: stop it first.");
    const at = cells.indexOf(cell);
    cells.splice(at, 1);
    removed.push(...cell.runs);
    cell.element.remove();
    if (!cells.length) insert(0);
    (cells[at] ?? cells[at - 1])?.command();
    announce("Cell deleted.");
    notebook.save();
  },
  move(cell, direction) {
    const at = cells.indexOf(cell);
    const other = cells[at + direction];
    if (!other) return;
    [cells[at], cells[at + direction]] = [other, cell];
    direction < 0 ? other.element.before(cell.element) : other.element.after(cell.element);
    cell.command();
    notebook.save();
  },
  save() {
    clearTimeout(saving);
    saving = setTimeout(() => {
      try {
        localStorage.setItem(memory, JSON.stringify({ cells: cells.map((cell) => cell.saved), removed: removed.slice(-500) }));
      } catch {
        // full or forbidden: the runs themselves are on the server
      }
    }, 300);
  },
};
let saving = 0;

function insert(at: number, saved: Saved = { code: "", language: current?.language ?? page.languages[0] ?? "python", runs: [] }): Cell {
  const cell = new Cell(notebook, saved, page.languages, page.can_run && page.open);
  const before = cells[at];
  cells.splice(at, 0, cell);
  before ? before.element.before(cell.element) : list.append(cell.element);
  notebook.save();
  return cell;
}

/** Sends the next waiting cell once nothing of this page runs: cells run in the order in which they were asked for. */
function pump(): void {
  if (cells.some((cell) => cell.open && !queue.includes(cell))) return;
  const cell = queue.shift();
  if (!cell) return;
  const clientId = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  cell.begin("sent", clientId);
  feed.send({ type: "execute_request", client_id: clientId, code: cell.editor.code, language: cell.language });
}

function take(message: Message): void {
  if (message.type === "session") return session(message);
  if (message.type === "files_changed") return files.refresh();
  if (message.type === "caught_up") return caughtUp();
  const cell = cellOf(message);
  if (message.type === "notice") {
    if (cell) cell.refuse(message.detail, message.remedy);
    else say("error", `${message.detail} ${message.remedy ?? ""}`);
    abandon();
    return;
  }
  if (!cell) return;
  const was = cell.open;
  cell.take(message);
  if (cell.wantsStop && message.type === "state" && cell.open) {
    cell.wantsStop = false;
    feed.send({ type: "interrupt_request", execution_id: cell.executionId });
  }
  if (was && !cell.open) {
    announce(`${cell.element.getAttribute("aria-label")}.`);
    if (page.open) files.refresh();
    if (cell.state !== "succeeded") abandon();
    pump();
  }
}

/** The cell of a message; a run that another door started in this session gets one of its own. */
function cellOf(message: Message): Cell | undefined {
  const id = message.execution_id;
  const known = cells.find((cell) => (message.client_id && cell.clientId === message.client_id) || (id && cell.executionId === id));
  if (known || !id || message.type !== "execution") return known;
  if (removed.includes(id) || cells.some((cell) => cell.runs.includes(id))) return undefined;
  const last = cells.at(-1);
  const at = last && !last.editor.code.trim() && !last.runs.length ? cells.length - 1 : cells.length;
  const cell = insert(at, { code: message.code, language: message.language, runs: [id] });
  cell.output.clear(id);
  return cell;
}

function abandon(): void {
  for (const cell of queue) cell.refuse("");
  queue = [];
}

function session(message: Message): void {
  if (message.end_at) page.end_at = message.end_at;
  if (message.cost_usd !== undefined) find("#session-cost").textContent = usd(message.cost_usd);
  if (message.open === false && page.open) {
    page.open = false;
    document.body.classList.add("ended");
    find("#session-clock").textContent = "ended";
    say("warning", `This session has ended (${message.reason || "finished"}). Variables are gone; the runs stay.`);
    for (const cell of cells) cell.forbid();
  }
}

function caughtUp(): void {
  if (wasLost) {
    say("good", "Reconnected, nothing lost.");
    announce("Reconnected, nothing lost.");
    setTimeout(() => find("#banner").setAttribute("hidden", ""), 4000);
  }
  wasLost = false;
  if (!cells.length) {
    insert(0, { code: page.open ? page.example : "", language: page.languages[0] ?? "python", runs: [] });
    if (document.activeElement === document.body) cells[0]!.edit();
  }
  list.setAttribute("aria-busy", "false");
}

function status(now: Status, code?: number): void {
  if (now === "lost") {
    wasLost = true;
    say("warning", "The connection broke; runs go on. Trying again, and what was missed will follow.");
  }
  if (now === "closed") say("error", code === 4401 ? "You are signed out: sign in again to go on." : "This session cannot be reached: reload the page.");
}

function say(kind: "warning" | "error" | "good", words: string): void {
  const banner = find("#banner");
  banner.className = `banner ${kind}`;
  find("span", banner).textContent = words;
  banner.hidden = false;
}

function tick(): void {
  for (const cell of cells) if (cell.open) cell.show();
  if (page.open && page.end_at) find("#session-clock").textContent = `${clock((Date.parse(page.end_at) - Date.now()) / 1000)} left`;
}

let lastKey = { key: "", at: 0 };

/** Command mode: the cell itself has the focus. The same keys as Jupyter's. */
function command(event: KeyboardEvent): void {
  const target = event.target as HTMLElement;
  if (!target.classList.contains("cell") || !current) return;
  const twice = lastKey.key === event.key && event.timeStamp - lastKey.at < 800;
  lastKey = { key: twice ? "" : event.key, at: event.timeStamp };
  const act = commandFor(event, current, twice);
  if (!act) return;
  event.preventDefault();
  act();
}

function commandFor(event: KeyboardEvent, cell: Cell, twice: boolean): (() => void) | undefined {
  if (event.key === "Enter") {
    if (event.shiftKey) return () => notebook.run(cell, "next");
    if (event.ctrlKey || event.metaKey) return () => notebook.run(cell, "stay");
    if (event.altKey) return () => notebook.run(cell, "insert");
    return () => cell.edit();
  }
  if (event.ctrlKey || event.metaKey) return undefined;
  if (event.altKey && event.key === "ArrowUp") return () => notebook.move(cell, -1);
  if (event.altKey && event.key === "ArrowDown") return () => notebook.move(cell, 1);
  switch (event.key) {
    case "a":
      return () => notebook.insert(cell, "above");
    case "b":
      return () => notebook.insert(cell, "below");
    case "d":
      return twice ? () => notebook.remove(cell) : () => {};
    case "i":
      return twice ? () => cells.filter((other) => other.open).forEach((other) => notebook.stop(other)) : () => {};
    case "0":
      return twice ? restart : () => {};
    case "ArrowUp":
    case "k":
      return () => notebook.step(cell, -1, false);
    case "ArrowDown":
    case "j":
      return () => notebook.step(cell, 1, false);
    case "?":
      return () => find<HTMLDialogElement>("#keys").showModal();
  }
  return undefined;
}

function restart(): void {
  if (!confirm("Restart? Variables are lost; files stay.")) return;
  abandon();
  feed.send({ type: "restart" });
  announce("Restarting.");
}

function remembered(): Saved[] {
  try {
    const saved = JSON.parse(localStorage.getItem(memory) ?? "null");
    removed = saved?.removed ?? [];
    return saved?.cells ?? [];
  } catch {
    return [];
  }
}

for (const saved of remembered()) insert(cells.length, saved).output.clear(saved.runs.at(-1) ?? "");
const files = filesPanel(page.id, page.open && page.can_run);
packagesPanel(page.id);
const feed = new Feed(`/ws/sessions/${page.id}`, take, status);

list.addEventListener("keydown", command);
list.addEventListener("focusin", (event) => {
  const cell = (event.target as HTMLElement).closest(".cell");
  cell?.classList.toggle("command", event.target === cell);
  find("#mode").textContent = event.target === cell ? "Command mode: Enter edits, Tab moves on, ? lists the keys" : "Editing: Tab indents, Escape leaves the editor";
});
find("#add-cell").addEventListener("click", () => insert(cells.length).edit());
find("#run-all").addEventListener("click", () => cells.forEach((cell) => notebook.run(cell, "stay")));
find("#restart")?.addEventListener("click", restart);
find("#extend")?.addEventListener("click", () => feed.send({ type: "extend" }));
find("#show-keys").addEventListener("click", () => find<HTMLDialogElement>("#keys").showModal());
setInterval(tick, 100);
