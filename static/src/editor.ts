import { autocompletion, closeBrackets, closeBracketsKeymap, completeAnyWord, completionKeymap } from "@codemirror/autocomplete";
import { defaultKeymap, history, historyKeymap, indentLess, indentMore } from "@codemirror/commands";
import { bracketMatching, HighlightStyle, indentOnInput, indentUnit, StreamLanguage, syntaxHighlighting } from "@codemirror/language";
import { highlightSelectionMatches, searchKeymap } from "@codemirror/search";
import { Compartment, EditorState, Prec, type Extension } from "@codemirror/state";
import { drawSelection, EditorView, keymap, placeholder } from "@codemirror/view";
import { tags as t } from "@lezer/highlight";

const highlight = HighlightStyle.define([
  { tag: [t.keyword, t.operatorKeyword, t.controlKeyword, t.definitionKeyword, t.moduleKeyword], color: "var(--code-keyword)" },
  { tag: [t.string, t.special(t.string), t.regexp], color: "var(--code-string)" },
  { tag: [t.number, t.bool, t.null, t.atom], color: "var(--code-number)" },
  { tag: [t.comment, t.meta], color: "var(--code-comment)" },
  { tag: [t.function(t.definition(t.variableName)), t.definition(t.function(t.variableName))], color: "var(--code-name)" },
  { tag: [t.className, t.typeName, t.definition(t.className)], color: "var(--code-type)" },
]);

const theme = EditorView.theme({
  "&": { color: "var(--text)", backgroundColor: "var(--surface)", fontSize: "13px" },
  "&.cm-focused": { outline: "none" },
  ".cm-scroller": { fontFamily: "var(--mono)", lineHeight: "20px", overflowX: "auto" },
  ".cm-content": { padding: "8px 0", caretColor: "var(--text)" },
  ".cm-line": { padding: "0 12px" },
  ".cm-cursor": { borderLeftColor: "var(--text)", borderLeftWidth: "2px" },
  "&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground": { backgroundColor: "var(--selection)" },
  "&.cm-focused .cm-matchingBracket": { backgroundColor: "var(--accent-weak)", outline: "1px solid var(--line-strong)" },
  ".cm-placeholder": { color: "var(--muted)" },
  ".cm-tooltip": { backgroundColor: "var(--surface)", border: "1px solid var(--line)", borderRadius: "6px", color: "var(--text)" },
  ".cm-tooltip-autocomplete > ul > li[aria-selected]": { backgroundColor: "var(--accent-solid)", color: "var(--on-accent)" },
  ".cm-panels": { backgroundColor: "var(--sunken)", color: "var(--text)" },
});

/** The grammar of a language; JavaScript's and the rarer ones are fetched when first used. */
export async function grammar(language: string): Promise<Extension> {
  switch (language) {
    case "python":
      return (await import("@codemirror/lang-python")).python();
    case "javascript":
    case "typescript":
      return (await import("@codemirror/lang-javascript")).javascript({ typescript: language === "typescript" });
    case "java":
      return (await import("@codemirror/lang-java")).java();
    case "bash":
      return StreamLanguage.define((await import("@codemirror/legacy-modes/mode/shell")).shell);
    case "r":
      return StreamLanguage.define((await import("@codemirror/legacy-modes/mode/r")).r);
    default:
      return [];
  }
}

export interface Keys {
  run(then: "next" | "stay" | "insert"): void;
  leave(): void;
  beyond(direction: -1 | 1): void;
}

/**
 * `<sg-editor>`: CodeMirror in a shadow root, whose constructed style sheets a strict style-src allows.
 * Tab indents; Escape leaves the editor for the cell, where Tab moves on again.
 */
export class Editor extends HTMLElement {
  private view?: EditorView;
  private language = new Compartment();
  private naming = new Compartment();
  keys?: Keys;
  changed?: (code: string) => void;

  start(code: string, language: string, label: string): void {
    const cell = (act: (keys: Keys) => void) => () => (this.keys && act(this.keys), true);
    const edge = (direction: -1 | 1) => (view: EditorView) => {
      const { main } = view.state.selection;
      const line = view.state.doc.lineAt(main.head).number;
      if (!main.empty || line !== (direction < 0 ? 1 : view.state.doc.lines)) return false;
      this.keys?.beyond(direction);
      return true;
    };
    this.view = new EditorView({
      parent: this.attachShadow({ mode: "open" }),
      state: EditorState.create({
        doc: code,
        extensions: [
          Prec.highest(
            keymap.of([
              { key: "Shift-Enter", run: cell((keys) => keys.run("next")) },
              { key: "Mod-Enter", run: cell((keys) => keys.run("stay")) },
              { key: "Ctrl-Enter", run: cell((keys) => keys.run("stay")) },
              { key: "Alt-Enter", run: cell((keys) => keys.run("insert")) },
            ]),
          ),
          history(),
          drawSelection(),
          indentOnInput(),
          indentUnit.of("    "),
          bracketMatching(),
          closeBrackets(),
          autocompletion({ activateOnTyping: false }),
          EditorState.languageData.of(() => [{ autocomplete: completeAnyWord }]),
          highlightSelectionMatches(),
          syntaxHighlighting(highlight),
          keymap.of([...closeBracketsKeymap, ...completionKeymap, ...searchKeymap]),
          keymap.of([
            { key: "Escape", run: cell((keys) => keys.leave()) },
            { key: "ArrowUp", run: edge(-1) },
            { key: "ArrowDown", run: edge(1) },
            { key: "Tab", run: indentMore, shift: indentLess },
            ...defaultKeymap,
            ...historyKeymap,
          ]),
          theme,
          EditorView.lineWrapping,
          placeholder("Code: Shift+Enter runs it"),
          this.language.of([]),
          this.naming.of(EditorView.contentAttributes.of({ "aria-label": label })),
          EditorView.updateListener.of((update) => update.docChanged && this.changed?.(this.code)),
        ],
      }),
    });
    void this.speak(language);
  }

  get code(): string {
    return this.view?.state.doc.toString() ?? "";
  }

  set code(code: string) {
    this.view?.dispatch({ changes: { from: 0, to: this.view.state.doc.length, insert: code } });
  }

  name(label: string): void {
    this.view?.dispatch({ effects: this.naming.reconfigure(EditorView.contentAttributes.of({ "aria-label": label })) });
  }

  async speak(language: string): Promise<void> {
    const extension = await grammar(language);
    this.view?.dispatch({ effects: this.language.reconfigure(extension) });
  }

  override focus(): void {
    this.view?.focus();
  }
}

customElements.define("sg-editor", Editor);
