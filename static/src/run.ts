import { find } from "./dom";
import { highlightIn } from "./highlight";
import { Output } from "./output";
import { Feed, type Message } from "./socket";

const output = new Output(find("#output"));
const { id, ended } = find("#output").dataset;
output.clear(id!);

function take(message: Message): void {
  if (output.take(message)) find("#output-empty").hidden = true;
  // the figures of a run that has ended are the server's: take the page again, once
  if (message.type === "state" && ENDED.includes(message.state) && !ended) location.reload();
  if (message.type === "state") find("#run-state").dataset.now = message.state;
}

const ENDED = ["succeeded", "failed", "timed_out", "cancelled", "errored"];
for (const pre of document.querySelectorAll<HTMLElement>("pre[data-language]")) void highlightIn(pre);
new Feed(`/ws/executions/${id}`, take, () => {});
