import { el, icon } from "./dom";
import { Editor } from "./editor";
import { duration, usd } from "./format";
import { Output } from "./output";
import type { Message } from "./socket";

export const LANGUAGES: Record<string, string> = {
  python: "Python",
  bash: "Bash",
  javascript: "JavaScript",
  typescript: "TypeScript",
  r: "R",
  java: "Java",
};

const STATES: Record<string, [icon: string, words: string]> = {
  waiting: ["clock", "waiting for the cell above"],
  sent: ["dots", "sending"],
  queued: ["dots", "queued"],
  starting: ["dots", "starting"],
  running: ["dots", "running"],
  succeeded: ["check", "succeeded"],
  failed: ["cross", "failed"],
  timed_out: ["clock", "timed out"],
  cancelled: ["slash", "stopped"],
  errored: ["alert", "errored"],
};
const OPEN = ["waiting", "sent", "queued", "starting", "running"];

export interface Saved {
  code: string;
  language: string;
  runs: string[];
}

export interface Notebook {
  run(cell: Cell, then: "next" | "stay" | "insert"): void;
  stop(cell: Cell): void;
  current(cell: Cell): void;
  step(cell: Cell, direction: -1 | 1, edit: boolean): void;
  insert(beside: Cell, where: "above" | "below"): void;
  remove(cell: Cell): void;
  move(cell: Cell, direction: -1 | 1): void;
  save(): void;
}

/** One cell: its code, its last run, and what that run said. */
export class Cell {
  readonly element: HTMLElement;
  readonly editor = new Editor();
  readonly output: Output;
  runs: string[];
  language: string;
  clientId = "";
  state = "";
  wantsStop = false;
  private count = el("span", { class: "cell-count" });
  private stateBox = el("span", { class: "state" });
  private facts = el("span", { class: "cell-facts" });
  private noticeBox = el("div", { class: "notice", role: "alert", hidden: true });
  private button = el("button", { type: "button", class: "run" });
  private startedAt = 0;
  private elapsed = 0;
  private cost = 0;
  private backend = "";
  private queue = "";

  constructor(private notebook: Notebook, saved: Saved, languages: string[], private canRun: boolean) {
    this.runs = saved.runs;
    this.language = saved.language;
    const select = el("select", { "aria-label": "Language", title: "Language" });
    for (const name of languages) select.append(el("option", { value: name, ...(name === saved.language ? { selected: true } : {}) }, LANGUAGES[name] ?? name));
    select.addEventListener("change", () => {
      this.language = select.value;
      void this.editor.speak(select.value);
      this.name();
      notebook.save();
    });
    this.button.addEventListener("click", () => (this.open ? notebook.stop(this) : notebook.run(this, "stay")));
    const outputBox = el("div", { class: "output", role: "log", "aria-live": "polite", "aria-label": "Output" });
    this.output = new Output(outputBox);
    this.element = el(
      "section",
      { class: "cell", tabindex: 0 },
      el("div", { class: "cell-bar" }, this.count, this.facts, el("div", { class: "tools" }, select, this.button, this.menu())),
      this.editor,
      this.noticeBox,
      outputBox,
    );
    this.element.addEventListener("focusin", () => notebook.current(this));
    this.editor.start(saved.code, saved.language, "Code");
    this.editor.changed = () => notebook.save();
    this.editor.keys = {
      run: (then) => notebook.run(this, then),
      leave: () => this.command(),
      beyond: (direction) => notebook.step(this, direction, true),
    };
    this.show();
  }

  get saved(): Saved {
    return { code: this.editor.code, language: this.language, runs: this.runs.slice(-20) };
  }

  get executionId(): string {
    return this.runs.at(-1) ?? "";
  }

  get open(): boolean {
    return OPEN.includes(this.state);
  }

  /** From the editor to the cell: the keys are commands now, and Tab moves on. */
  command(): void {
    this.element.focus();
  }

  edit(): void {
    this.editor.focus();
  }

  /** The moment of asking: the button swaps before the server has heard of it. */
  begin(state: "waiting" | "sent", clientId = ""): void {
    this.clientId = clientId;
    this.state = state;
    this.wantsStop = false;
    this.queue = "";
    this.startedAt = performance.now();
    this.elapsed = this.cost = 0;
    this.noticeBox.hidden = true;
    this.output.clear("");
    this.show();
  }

  /** Back to rest, with why where the server said no. */
  refuse(detail: string, remedy = ""): void {
    this.state = "";
    this.noticeBox.replaceChildren(icon("alert"), el("span", {}, `${detail} ${remedy}`.trim()));
    this.noticeBox.hidden = !detail;
    this.show();
  }

  take(message: Message): void {
    if (message.execution_id && message.execution_id !== this.executionId) {
      this.runs.push(message.execution_id);
      this.output.clear(message.execution_id);
      this.notebook.save();
    }
    if (this.output.take(message)) return;
    if (message.type === "state") this.moved(message);
    if (message.type === "queued") this.queue = message.reason ? `${message.position}: ${message.reason}` : String(message.position);
    if (message.type === "usage") {
      this.elapsed = message.elapsed_ms;
      this.startedAt = performance.now() - message.elapsed_ms;
      this.cost = message.cost_usd ?? this.cost;
    }
    this.show();
  }

  private moved(message: Message): void {
    if (message.state === "running" && this.state !== "running") this.startedAt = performance.now();
    this.state = message.state;
    this.backend = message.backend || this.backend;
    if (message.execution_count) this.count.dataset.count = message.execution_count;
    if (!this.open && message.elapsed_ms !== undefined) this.elapsed = message.elapsed_ms;
    if (message.cost_usd !== undefined && message.cost_usd !== null) this.cost = message.cost_usd;
    if (!this.open && message.detail && message.state !== "failed") this.output.element.append(el("p", { class: "cut" }, message.detail));
  }

  /** Redraws the bar; called ten times a second while the cell runs. */
  show(): void {
    const running = this.open;
    this.count.textContent = running ? "[*]" : `[${this.count.dataset.count ?? " "}]`;
    const [symbol, words] = STATES[this.state] ?? ["", ""];
    this.stateBox.className = `state ${this.state}`;
    this.stateBox.replaceChildren(...(symbol ? [icon(symbol), words + (this.queue && this.state === "queued" ? ` at ${this.queue}` : "")] : []));
    const elapsed = running && this.startedAt ? performance.now() - this.startedAt : this.elapsed;
    const facts: (Node | string)[] = this.state ? [this.stateBox] : [];
    if (elapsed && this.state !== "waiting") facts.push(el("span", {}, duration(elapsed)));
    if (this.cost) facts.push(el("span", { title: `${Math.round(this.cost * 1e9).toLocaleString("en")} nano-dollars` }, usd(this.cost)));
    if (this.backend) facts.push(el("span", { class: "badge backend" }, this.backend));
    if (this.executionId && this.state) facts.push(el("a", { href: `/runs/${this.executionId}` }, "run"));
    if (running || !this.facts.contains(document.activeElement)) this.facts.replaceChildren(...facts);
    if (this.button.dataset.open !== String(running)) {
      this.button.dataset.open = String(running);
      this.button.classList.toggle("stop", running);
      this.button.replaceChildren(icon(running ? "stop" : "play"), running ? "Stop" : "Run");
      this.button.title = running ? "Stop (I I)" : "Run (Ctrl+Enter)";
      this.button.disabled = !this.canRun && !running;
      this.name();
    }
  }

  forbid(): void {
    this.canRun = false;
    this.button.disabled = !this.open;
  }

  private name(): void {
    const number = this.count.dataset.count ? ` ${this.count.dataset.count}` : "";
    this.element.setAttribute("aria-label", `Cell${number}, ${LANGUAGES[this.language] ?? this.language}${this.state ? `, ${STATES[this.state]?.[1]}` : ""}`);
    this.editor.name(`Code of cell${number}. Escape leaves the editor.`);
  }

  private menu(): HTMLElement {
    const item = (words: string, key: string, act: () => void) =>
      el("button", { type: "button", class: "quiet", onclick: () => (menu.removeAttribute("open"), act()) }, el("span", { class: "grow" }, words), el("kbd", {}, key));
    const menu = el(
      "details",
      { class: "menu" },
      el("summary", { "aria-label": "More for this cell", title: "More" }, icon("more")),
      el(
        "div",
        {},
        item("Insert above", "A", () => this.notebook.insert(this, "above")),
        item("Insert below", "B", () => this.notebook.insert(this, "below")),
        item("Move up", "Alt ↑", () => this.notebook.move(this, -1)),
        item("Move down", "Alt ↓", () => this.notebook.move(this, 1)),
        item("Clear output", "", () => this.output.clear(this.executionId)),
        item("Delete", "D D", () => this.notebook.remove(this)),
      ),
    );
    return menu;
  }
}
