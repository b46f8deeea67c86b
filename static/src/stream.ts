import { AnsiUp } from "ansi_up";
import { el } from "./dom";

const LINES = 5000;
const CHARACTERS = 1_000_000; // one endless line is cut here

/**
 * The text of one stream. Colours carry over from piece to piece, a carriage return starts the line anew (progress
 * bars), and what exceeds 5,000 lines is counted and left to the file.
 */
export class Stream {
  readonly element: HTMLElement;
  private readonly settled = el("span");
  private readonly line = el("span");
  private readonly ansi = new AnsiUp();
  private html = "";
  private returned = false;
  private lines = 0;
  private characters = 0;
  private beyond = 0;
  private readonly cut = el("p", { class: "cut", hidden: true });

  constructor(name: "stdout" | "stderr", private wholeUrl: () => string) {
    this.ansi.use_classes = true;
    this.ansi.boldStyle = "font-weight:600";
    this.element = el("div", { class: name }, el("pre", { class: "stream" }, this.settled, this.line), this.cut);
  }

  append(text: string): void {
    let done = "";
    for (const part of text.split(/(\r\n|\n|\r)/)) {
      if (part === "\r") this.returned = true;
      else if (part.endsWith("\n")) {
        if (this.full) this.beyond++;
        else done += this.html + "\n";
        this.lines++;
        this.html = "";
        this.returned = false;
      } else if (part && !this.full) {
        if (this.returned) this.html = "";
        this.returned = false;
        this.characters += part.length;
        this.html += this.render(part.slice(0, CHARACTERS));
        if (this.html.length > 16_384) {
          done += this.html;
          this.html = "";
        }
      }
    }
    if (done) this.settled.append(fragment(done));
    this.line.replaceChildren(fragment(this.html));
    if (this.full) this.sayCut();
    this.stickToEnd();
  }

  private get full(): boolean {
    return this.lines >= LINES || this.characters >= CHARACTERS;
  }

  /** A style attribute would break the page's policy: the colours are set through the style object instead. */
  private render(text: string): string {
    return this.ansi.ansi_to_html(text).replaceAll('<span style="', '<span data-style="');
  }

  private sayCut(): void {
    const more = this.beyond ? ` ${this.beyond.toLocaleString("en")} more.` : "";
    this.cut.replaceChildren(`Cut at 5,000 lines.${more} `, el("a", { href: this.wholeUrl(), download: true }, "Whole output as a file"));
    this.cut.hidden = false;
  }

  /** Follows the output while the reader is at its end, and stays put while they are reading above. */
  private stickToEnd(): void {
    const box = this.line.parentElement!;
    const scrollable = box.scrollHeight > box.clientHeight;
    if (scrollable && !box.hasAttribute("tabindex")) {
      box.tabIndex = 0; // reachable by keyboard
      box.dataset.follow = "";
      box.addEventListener("scroll", () => {
        box.toggleAttribute("data-follow", box.scrollTop + box.clientHeight >= box.scrollHeight - 8);
      });
    }
    if ("follow" in box.dataset) box.scrollTop = box.scrollHeight;
  }
}

function fragment(html: string): DocumentFragment {
  const template = document.createElement("template");
  template.innerHTML = html; // ansi_up has escaped all but its own tags
  for (const span of template.content.querySelectorAll<HTMLElement>("[data-style]")) {
    for (const declaration of span.dataset.style!.split(";")) {
      const [name, value] = declaration.split(":");
      if (name && value) span.style.setProperty(name, value);
    }
    span.removeAttribute("data-style");
  }
  for (const link of template.content.querySelectorAll("a")) {
    link.rel = "noopener noreferrer";
    link.target = "_blank";
  }
  return template.content;
}
