// The node's API. The key is kept for this tab only, and leaves it only towards the node that served the page.

const KEPT = "blyan-key";

/** Take the key from the address (#key=…), where neither servers nor histories see it, and remove it from there. */
export function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    setKey(given);
    history.replaceState(null, "", location.pathname);
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEPT, key);
}

/** Thrown for answers that are no success; `status` is 0 where the node could not be reached. */
export class Refused extends Error {
  constructor(status, message, partial) {
    super(message);
    this.status = status;
    this.partial = partial;
  }
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEPT);
  const headers = { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the node does not answer: has it stopped?");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Refused(response.status, body.error?.message ?? `status ${response.status}`);
  }
  return response;
}

export async function get(path) {
  return (await request(path)).json();
}

/** Ask for a chat completion; yields the chunks of the stream as they come. */
export async function* stream(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let waiting = "";
  for await (const text of texts(response.body)) {
    waiting += text;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(502, chunk.error.message, chunk.error.partial);
      yield chunk;
    }
  }
}

async function* texts(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
