/** What the server says; contract.md, "Console socket". `seq` counts within one execution. */
export interface Message {
  type: string;
  seq?: number;
  execution_id?: string;
  client_id?: string;
  [field: string]: any;
}

const JOURNAL = new Set(["stdout", "stderr", "result", "error", "truncated"]);

export type Status = "connecting" | "live" | "lost" | "closed";

const REFUSED = 4400; // close codes from here on are answers, not breaks: no point in trying again

/**
 * A socket that comes back by itself and asks for what it missed. Requests made while it is down wait here;
 * the server knows a request by its client_id, so that sending one twice runs it once.
 */
export class Feed {
  private socket?: WebSocket;
  private attempt = 0;
  private waiting: object[] = [];
  private unanswered = new Map<string, object>();
  private ack?: { execution_id: string; seq: number };
  readonly seen = new Map<string, number>();

  constructor(
    private path: string,
    private onMessage: (message: Message) => void,
    private onStatus: (status: Status, code?: number) => void,
  ) {
    this.open();
    addEventListener("offline", () => this.socket?.close());
    addEventListener("online", () => this.socket?.readyState === WebSocket.CLOSED && this.open());
  }

  send(message: { type: string; client_id?: string; [field: string]: unknown }): void {
    if (message.client_id) this.unanswered.set(message.client_id, message);
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
    else if (!message.client_id) this.waiting.push(message);
  }

  private open(): void {
    this.onStatus("connecting");
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${this.path}`);
    this.socket = socket;
    socket.onopen = () => {
      this.attempt = 0;
      socket.send(JSON.stringify({ type: "subscribe", after_seq: Object.fromEntries(this.seen) }));
      for (const message of [...this.unanswered.values(), ...this.waiting.splice(0)]) socket.send(JSON.stringify(message));
    };
    socket.onmessage = ({ data }) => this.take(JSON.parse(data));
    socket.onclose = ({ code }) => {
      if (code >= REFUSED) return this.onStatus("closed", code);
      this.onStatus("lost");
      const pause = Math.min(5000, 250 * 2 ** this.attempt++);
      setTimeout(() => this.socket === socket && this.open(), pause * (0.5 + Math.random() / 2));
    };
  }

  private take(message: Message): void {
    const { execution_id: id, seq } = message;
    if (id && seq && JOURNAL.has(message.type)) {
      if (seq <= (this.seen.get(id) ?? 0)) return;
      this.seen.set(id, seq);
      this.acknowledge(id, seq);
    }
    if (message.client_id) this.unanswered.delete(message.client_id);
    if (message.type === "caught_up") this.onStatus("live");
    this.onMessage(message);
  }

  /** Every quarter of a second at most: what is not acknowledged is bounded, and then the server waits. */
  private acknowledge(execution_id: string, seq: number): void {
    if (!this.ack) setTimeout(() => (this.send({ type: "ack", ...this.ack }), (this.ack = undefined)), 250);
    this.ack = { execution_id, seq };
  }
}
