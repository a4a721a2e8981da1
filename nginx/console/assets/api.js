// The API with the key of this tab. The key is in sessionStorage and nowhere else.

const KEY = "api-key";

export const key = () => sessionStorage.getItem(KEY);
export const remember = (value) => sessionStorage.setItem(KEY, value);
export const forget = () => sessionStorage.removeItem(KEY);

/** What the API answered instead: `status`, `code` and the message. */
export class ApiError extends Error {
  constructor(status, { message, code, param } = {}) {
    super(message ?? `HTTP ${status}`);
    Object.assign(this, { status, code, param });
  }
}

/** A response that is not an error. Throws ApiError, or TypeError when nobody answers. */
export async function call(path, options = {}) {
  const headers = { Authorization: `Bearer ${key()}`, ...options.headers };
  let body = options.body;
  if (options.json !== undefined) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(options.json);
  }
  const method = options.method ?? (body === undefined ? "GET" : "POST");
  const answer = await fetch(path, { method, headers, body, signal: options.signal, cache: "no-store" });
  if (!answer.ok) {
    if (answer.status === 401) dispatchEvent(new Event("refused"));
    const said = await answer.json().catch(() => ({}));
    throw new ApiError(answer.status, said.error ?? {});
  }
  return answer;
}

export const json = async (path, options) => (await call(path, options)).json();

/** Keep a file of the reader's. Returns its id. */
export async function upload(file, purpose) {
  const form = new FormData();
  form.append("purpose", purpose);
  form.append("file", file);
  return (await json("/v1/files", { body: form })).id;
}

/** The JSON documents of a stream of server-sent events. Throws ApiError for an error event. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (!data) continue;
        if (data === "[DONE]") return;
        const document = JSON.parse(data);
        if (document.error) throw new ApiError(answer.status, document.error);
        yield document;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
