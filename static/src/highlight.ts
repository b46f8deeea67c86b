import { ensureSyntaxTree } from "@codemirror/language";
import { EditorState } from "@codemirror/state";
import { classHighlighter, highlightCode } from "@lezer/highlight";
import { grammar } from "./editor";

/** Colours code that already stands in the page; the text itself does not change. */
export async function highlightIn(pre: HTMLElement): Promise<void> {
  const code = pre.textContent ?? "";
  const state = EditorState.create({ doc: code, extensions: await grammar(pre.dataset.language ?? "") });
  const tree = ensureSyntaxTree(state, code.length, 200);
  if (!tree) return; // too long to parse at once: it stays plain
  const coloured = document.createDocumentFragment();
  highlightCode(
    code,
    tree,
    classHighlighter,
    (text, classes) => {
      if (!classes) return coloured.append(text);
      const span = document.createElement("span");
      span.className = classes;
      span.textContent = text;
      coloured.append(span);
    },
    () => coloured.append("\n"),
  );
  pre.replaceChildren(coloured);
}

