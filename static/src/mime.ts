import DOMPurify from "dompurify";
import { el } from "./dom";

export type Bundle = Record<string, unknown>;

/** The richest first; what is not listed is offered as text. */
const ORDER: [mime: string, label: string][] = [
  ["text/html", "table"],
  ["image/svg+xml", "SVG"],
  ["image/png", "PNG"],
  ["image/jpeg", "JPEG"],
  ["text/markdown", "text"],
  ["text/latex", "formula"],
  ["application/json", "JSON"],
  ["text/plain", "raw"],
];

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName === "IMG" && !/^data:image\//i.test(node.getAttribute("src") ?? "")) node.removeAttribute("src"); // asks nobody
  node.removeAttribute("srcset");
  if (node.nodeName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

const ACTIVE = /<(script|iframe|object|embed|svg|canvas|form|video|audio|style(?![^>]*\bscoped))\b/i; // pandas' style is scoped

/** Takes away what the page's policy would report while the HTML is only parsed; DOMPurify decides what is safe. */
function quiet(html: string): string {
  const bare = html.replace(/<style\b[\s\S]*?(<\/style\s*>|$)/gi, "");
  return bare.replace(/<[a-z][^>]*>/gi, (tag) => tag.replace(/(\s|\/)(style|on\w+)(?=\s*=)/gi, "$1data-was-$2"));
}

/** HTML without scripts, styles, forms, frames or ids, so that it can neither act nor pose as the console. */
function clean(html: string): { content: DocumentFragment; active: boolean } {
  const content = DOMPurify.sanitize(quiet(html), {
    RETURN_DOM_FRAGMENT: true,
    USE_PROFILES: { html: true },
    FORBID_TAGS: ["style", "form", "input", "button", "textarea", "select", "option", "dialog", "audio", "video", "base", "link", "meta"],
    FORBID_ATTR: ["style", "id", "name", "class", "is", "slot", "part", "tabindex", "accesskey", "popover", "contenteditable", "autofocus", "border", "bgcolor", "background"],
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
  });
  for (const empty of content.querySelectorAll("thead th:empty")) empty.replaceWith(el("td"));
  return { content, active: ACTIVE.test(html) };
}

function imageText(bundle: Bundle): string {
  const chart = bundle["e2b/chart"] as { title?: string; type?: string } | undefined;
  if (chart?.type && chart.type !== "unknown") return chart.title ? `${chart.type} chart: ${chart.title}` : `${chart.type} chart`;
  return String(bundle["text/plain"] ?? "Image");
}

function image(mime: string, data: string, alt: string): HTMLElement {
  const base64 = mime === "image/svg+xml" ? btoa(Array.from(new TextEncoder().encode(data), (b) => String.fromCharCode(b)).join("")) : data.replace(/\s/g, "");
  return el("img", { src: `data:${mime};base64,${base64}`, alt });
}

async function formula(tex: string): Promise<HTMLElement> {
  const box = el("div", { class: "rich" });
  const katex = (await import("./formula")).katex;
  const display = /^\s*(\$\$|\\\[|\\begin)/.test(tex);
  const bare = tex.trim().replace(/^(\$\$?|\\\[|\\\()/, "").replace(/(\$\$?|\\\]|\\\))$/, "");
  katex.render(bare, box, { displayMode: display || tex.includes("displaystyle"), throwOnError: false, trust: false, maxSize: 50, maxExpand: 1000 });
  return box;
}

async function shape(mime: string, bundle: Bundle, frameUrl: string): Promise<HTMLElement> {
  const data = bundle[mime];
  const text = typeof data === "string" ? data : JSON.stringify(data, null, 2);
  switch (mime) {
    case "text/html": {
      const { content, active } = clean(text);
      const box = el("div", { class: "rich", tabindex: 0, role: "group", "aria-label": "HTML output" }, content);
      if (active && frameUrl) box.append(framing(frameUrl));
      return box;
    }
    case "image/svg+xml": // an image never runs the scripts in it
    case "image/png":
    case "image/jpeg":
      return image(mime, text, imageText(bundle));
    case "text/markdown": {
      const { marked } = await import("marked");
      return el("div", { class: "rich markdown" }, clean(await marked.parse(text)).content);
    }
    case "text/latex":
      return formula(text);
    case "application/json":
      return el("pre", {}, JSON.stringify(typeof data === "string" ? parsed(data) : data, null, 2));
    default:
      return el("pre", {}, text);
  }
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

/** Interactive output runs only on request, in a frame of an origin of its own that reaches neither page nor network. */
function framing(url: string): HTMLElement {
  const open = el("button", { type: "button" }, "Show the interactive version in an isolated frame");
  open.addEventListener("click", () => {
    open.replaceWith(el("iframe", { src: url, sandbox: "allow-scripts", title: "Interactive output", referrerpolicy: "no-referrer" }));
  });
  return el("p", {}, open);
}

/** One result: its richest shape, and buttons for the others. */
export async function render(bundle: Bundle, frameUrl = ""): Promise<HTMLElement> {
  const shapes = ORDER.filter(([mime]) => bundle[mime] !== undefined && bundle[mime] !== null);
  if (!shapes.length) return el("pre", {}, JSON.stringify(bundle, null, 2));
  const figure = el("div", { class: "result" });
  let current = await shape(shapes[0]![0], bundle, frameUrl);
  if (shapes.length > 1) {
    const bar = el("div", { class: "shapes", role: "group", "aria-label": "Shown as" });
    for (const [mime, label] of shapes) {
      const button = el("button", { type: "button", class: "quiet", "aria-pressed": String(mime === shapes[0]![0]) }, mime === "text/html" && !/<table/i.test(String(bundle[mime])) ? "HTML" : label);
      button.addEventListener("click", async () => {
        const next = await shape(mime, bundle, frameUrl);
        current.replaceWith(next);
        current = next;
        for (const other of bar.children) other.setAttribute("aria-pressed", String(other === button));
      });
      bar.append(button);
    }
    figure.append(bar);
  }
  figure.append(current);
  return figure;
}
