type Attributes = Record<string, string | number | boolean | ((event: never) => void) | undefined>;

/** An element with attributes, listeners (`on…`) and children; false and undefined attributes are left out. */
export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value as EventListener);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children);
  return element;
}

/** An icon of the sprite that stands in base.html. */
export function icon(name: string): SVGSVGElement {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function find<T extends Element = HTMLElement>(selector: string, within: ParentNode = document): T {
  const found = within.querySelector<T>(selector);
  if (!found) throw new Error(`The page has no ${selector}.`);
  return found;
}

/** Says one sentence to screen readers, without moving the focus. */
export function announce(sentence: string): void {
  find("#announce").textContent = sentence;
}

/** Django's CSRF token: the page carries it, since the cookie is out of reach of scripts. */
export const csrf = (): Record<string, string> => ({ "X-CSRFToken": document.body.dataset.csrf ?? "" });

/** What a refused request says, in one sentence. */
export async function refusal(response: Response): Promise<string> {
  try {
    const problem = await response.json();
    return [problem.detail, problem.remedy].filter(Boolean).join(" ");
  } catch {
    return `The server answered ${response.status}. Try again; if it happens again, tell the operator.`;
  }
}
