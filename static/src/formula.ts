import katex from "katex";

// The style sheet and its fonts come with the first formula.
const sheet = document.createElement("link");
sheet.rel = "stylesheet";
sheet.href = new URL("../katex.css", import.meta.url).href; // this module is built into chunks/
document.head.append(sheet);

export { katex };
