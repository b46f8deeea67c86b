import { AnsiUp } from "ansi_up";
import { el } from "./dom";
import { render } from "./mime";
import { Stream } from "./stream";
import type { Message } from "./socket";

/** What one execution said, in the order in which it said it. */
export class Output {
  private stream?: { name: string; stream: Stream };
  private runUrl = "";

  constructor(readonly element: HTMLElement) {}

  clear(executionId: string): void {
    this.runUrl = executionId ? `/runs/${executionId}` : "";
    this.stream = undefined;
    this.element.replaceChildren();
  }

  /** Takes stdout, stderr, result, error and truncated; answers whether the message was one of those. */
  take(message: Message): boolean {
    switch (message.type) {
      case "stdout":
      case "stderr":
        this.text(message.type, message.text);
        return true;
      case "result":
        this.place(render(message.mime, `${this.runUrl}/frames/${message.seq}`));
        return true;
      case "error":
        this.place(failure(message));
        return true;
      case "truncated":
        this.place(el("p", { class: "cut" }, "The output was cut: it reached the limit of this sandbox. "));
        return true;
    }
    return false;
  }

  private text(name: "stdout" | "stderr", text: string): void {
    if (this.stream?.name !== name) {
      const url = `${this.runUrl}/output.txt`;
      this.stream = { name, stream: new Stream(name, () => url) };
      this.element.append(this.stream.stream.element);
    }
    this.stream.stream.append(text);
  }

  /** Holds the place at once, so that a shape that is fetched first does not end up last. */
  private place(content: HTMLElement | Promise<HTMLElement>): void {
    this.stream = undefined;
    if (content instanceof HTMLElement) return this.element.append(content);
    const place = el("div");
    this.element.append(place);
    content.then(
      (shape) => place.replaceWith(shape),
      () => place.replaceWith(el("p", { class: "cut" }, "This result cannot be shown; it stands in the run's JSON.")),
    );
  }
}

function failure({ name, value, traceback }: Message): HTMLElement {
  const text = String(traceback || `${name}: ${value}`);
  const plain = new AnsiUp();
  plain.use_classes = true;
  const pre = el("pre");
  pre.innerHTML = plain.ansi_to_html(text.slice(-200_000)).replace(/<span style="[^"]*"/g, "<span"); // escaped by ansi_up
  return el("div", { class: "failure" }, el("p", {}, el("strong", {}, String(name)), ` ${String(value).slice(0, 500)}`), pre);
}
