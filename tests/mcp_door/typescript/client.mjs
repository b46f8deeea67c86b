// The official TypeScript client goes once through everything; what it saw is printed as JSON for the test.
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

const [url, key] = process.argv.slice(2);
const headers = { Authorization: `Bearer ${key}` };
const client = new Client({ name: "test", version: "1" });
await client.connect(new StreamableHTTPClientTransport(new URL(url), { requestInit: { headers } }));

const call = (name, args, onprogress) =>
  client.callTool({ name, arguments: args }, undefined, onprogress ? { onprogress } : {});
const progress = [];
const tools = (await client.listTools()).tools;
const first = await call("execute_code", { code: "#> hello\n#~ 2.5\n#= 1" }, (heard) => progress.push(heard.message));
const session_id = first.structuredContent.session_id;
const second = await call("execute_code", { code: "#= 2", session_id });
const refused = await call("execute_code", { code: "#= 1", language: "cobol" });
const long = await call("execute_code", { code: "#> " + "x".repeat(20_000), session_id });
const link = long.content.find((part) => part.type === "resource_link");
const whole = (await client.readResource({ uri: link.uri })).contents[0].text;
const listed = (await client.listResources()).resources.map((resource) => resource.uri);
const ended = await call("end_session", { session_id });
await client.close();

console.log(
  JSON.stringify({
    tools: tools.map((tool) => tool.name),
    schemas: tools.every((tool) => tool.outputSchema),
    first: first.content[0].text,
    count: second.structuredContent.execution_count,
    refused: [refused.isError, refused.structuredContent.code],
    progress,
    whole: whole.length,
    listed: listed.includes(link.uri.replace("/output", "")),
    ended: ended.structuredContent.state,
  }),
);
