// Bundled by esbuild for a page of another origin: the official SDK from a browser. `location.search` has base, key, model.

import OpenAI from "openai";

const asked = new URLSearchParams(location.search);
const client = new OpenAI({ baseURL: `${asked.get("base")}/v1`, apiKey: asked.get("key"), dangerouslyAllowBrowser: true, maxRetries: 0 });
const model = asked.get("model");
const said = {};
try {
  said.models = (await client.models.list()).data.map((one) => one.id);
  const { data, response } = await client.chat.completions.create(
    { model, messages: [{ role: "user", content: "say 3" }], max_tokens: 8 }, { headers: { "X-Request-Id": "from-a-browser" } }).withResponse();
  said.text = data.choices[0].message.content;
  said.worker = response.headers.get("x-owngpt-worker");
  said.id = response.headers.get("x-request-id");
  let events = 0;
  for await (const _ of await client.chat.completions.create({ model, messages: [{ role: "user", content: "say 5" }], stream: true })) events += 1;
  said.events = events;
  const kept = await client.responses.create({ model, input: "a" });
  await client.responses.delete(kept.id);
  said.refused = await client.responses.retrieve(kept.id).catch((error) => error.status);
} catch (error) {
  said.error = String(error);
}
document.body.textContent = JSON.stringify(said);
document.title = "done";
