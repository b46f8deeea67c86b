// Builds static/src into static/console, the same bytes each time: `npm ci && npm run build`.
import { build } from "esbuild";
import { copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync, readdirSync } from "node:fs";

const out = "../console";
rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });

// KaTeX lists each font three times; browsers that run this bundle read woff2.
const woff2Only = {
  name: "woff2-only",
  setup(api) {
    api.onLoad({ filter: /katex(\.min)?\.css$/ }, ({ path }) => ({
      contents: readFileSync(path, "utf8").replace(/,\s*url\([^)]*\.(?:woff|ttf)\)\s*format\(["'](?:woff|truetype)["']\)/g, ""),
      loader: "css",
    }));
  },
};

const { metafile } = await build({
  entryPoints: ["console.ts", "session.ts", "run.ts", "console.css", "katex.css"],
  outdir: out,
  bundle: true,
  splitting: true,
  format: "esm",
  target: ["es2022", "chrome123", "firefox120", "safari17.5"] /* light-dark() */,
  minify: true,
  legalComments: "none", // the texts stand in LICENSES.txt
  chunkNames: "chunks/[name]-[hash]",
  assetNames: "fonts/[name]-[hash]",
  loader: { ".woff2": "file" },
  plugins: [woff2Only],
  metafile: true,
  logLevel: "warning",
});

copyFileSync("icon.svg", `${out}/icon.svg`);

const names = new Set();
for (const input of Object.keys(metafile.inputs)) {
  const found = input.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)\//);
  if (found) names.add(found[1]);
}
const licences = [...names].sort().map((name) => {
  const folder = `node_modules/${name}`;
  const { version, license } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
  if (!file) throw new Error(`${name} has no licence file`);
  return `${name} ${version} (${license})\n\n${readFileSync(`${folder}/${file}`, "utf8").trim()}\n`;
});
writeFileSync(`${out}/LICENSES.txt`, licences.join(`\n${"-".repeat(80)}\n\n`));
