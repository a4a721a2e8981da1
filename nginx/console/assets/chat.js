// Chat: streams an answer, can stop it, and says under it how fast it came, who wrote it and what was cached.

import { call, events, json, key } from "./api.js";
import * as kept from "./conversations.js";
import { t } from "./i18n.js";
import { render } from "./markdown.js";
import { $, make, number, seconds } from "./page.js";

const DRAW_MS = 80;
let talk = fresh();
let running = null;
let temperature; // not said until the slider is moved: the model's own then

function fresh() {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", messages: [] };
}

/** Fill the picker: base models first, adapters and aliases below, those that the key may use. */
export async function show() {
  const chosen = $("model").value;
  const models = (await json("/v1/models")).data;
  const own = models.filter((model) => model.parent), base = models.filter((model) => !model.parent);
  $("model").replaceChildren(...[...base, ...own].map((model) =>
    make("option", { value: model.id }, model.parent ? `${model.id} ← ${model.parent}` : model.format ? `${model.id} · ${model.format}` : model.id)));
  if (models.some((model) => model.id === chosen)) $("model").value = chosen;
  list();
}

/** Another key's, or nobody's: what is shown is not theirs. */
export function forget() {
  open(fresh());
  $("conversations").replaceChildren();
}

function open(conversation) {
  running?.abort();
  talk = conversation;
  $("messages").replaceChildren();
  for (const { role, content } of talk.messages) put(add(role, ""), role, content);
  if (talk.model && [...$("model").options].some((option) => option.value === talk.model)) $("model").value = talk.model;
}

/** The conversations that this browser keeps. */
function list() {
  $("conversations").replaceChildren(...kept.all().map((conversation) => {
    const name = make("button", { className: "plain", type: "button", title: conversation.title }, conversation.title);
    if (conversation.id === talk.id) name.setAttribute("aria-current", "true");
    name.addEventListener("click", () => {
      open(conversation);
      list();
    });
    const gone = make("button", { className: "plain", type: "button", title: t("delete") }, "×");
    gone.setAttribute("aria-label", `${t("delete")}: ${conversation.title}`);
    gone.addEventListener("click", () => {
      kept.remove(conversation.id);
      if (conversation.id === talk.id) open(fresh());
      list();
    });
    return make("li", name, gone);
  }));
}

/** Choose a model in the picker. */
export function choose(model) {
  $("model").value = model;
  $("question").focus();
}

export function setUp() {
  if (matchMedia("(max-width: 46rem)").matches) $("settings").open = false;
  $("temperature").addEventListener("input", () => {
    $("temperature-shown").removeAttribute("data-i18n");
    $("temperature-shown").value = temperature = Number($("temperature").value);
  });
  $("new-chat").addEventListener("click", () => {
    open(fresh());
    list();
    $("question").focus();
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("question").value.trim();
    if (text && !running) ask(text);
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
}

async function ask(text) {
  $("question").value = "";
  const asked = talk;   // another one may be opened meanwhile
  asked.messages.push({ role: "user", content: text });
  asked.title ||= text.slice(0, 60);
  asked.model = $("model").value;
  put(add("user", ""), "user", text);
  const item = add("assistant", "");
  item.classList.add("writing");
  running = new AbortController();
  busy(true);
  const started = performance.now();
  let drawn = 0;
  const seen = { first: null, last: null, text: "", usage: null, headers: null, stopped: false };
  try {
    const system = $("system").value.trim();
    const answer = await call("/v1/chat/completions", {
      signal: running.signal,
      json: {
        model: $("model").value, stream: true, stream_options: { include_usage: true },
        messages: [...(system ? [{ role: "system", content: system }] : []), ...asked.messages],
        temperature, max_tokens: Number($("max-tokens").value) || undefined,
      },
    });
    seen.headers = answer.headers;
    for await (const part of events(answer)) {
      const piece = part.choices?.[0]?.delta?.content;
      if (piece) {
        seen.last = performance.now();
        seen.first ??= seen.last;
        seen.text += piece;
        if (seen.last - drawn > DRAW_MS) {
          drawn = seen.last;
          put(item, "assistant", seen.text);
        }
      }
      seen.usage = part.usage ?? seen.usage;
    }
  } catch (error) {
    seen.stopped = error.name === "AbortError";
    if (!seen.stopped) item.append(make("p", { className: "error" }, error.code ? `${error.message} (${error.code})` : String(error.message)));
  } finally {
    running = null;
    busy(false);
    item.classList.remove("writing");
  }
  put(item, "assistant", seen.text);
  if (seen.text) asked.messages.push({ role: "assistant", content: seen.text });
  kept.keep(asked);
  if (key()) list();
  item.append(facts(seen, started));
  $("messages").scrollTop = $("messages").scrollHeight;
}

/** The line under an answer. */
function facts(seen, started) {
  const { usage, headers } = seen;
  const said = [];
  if (seen.first) said.push(`${t("first token")} ${seconds((seen.first - started) / 1000)}`);
  const tokens = usage?.completion_tokens;
  if (tokens > 1 && seen.last > seen.first) said.push(`${number((tokens - 1) / ((seen.last - seen.first) / 1000), 1)} ${t("tokens/s")}`);
  if (tokens) said.push(`${tokens} ${t("tokens")}`);
  if (headers?.get("x-owngpt-cache") === "hit") said.push(t("from memory"));
  else if (usage?.prompt_tokens_details?.cached_tokens) said.push(`${t("cached prompt")} ${usage.prompt_tokens_details.cached_tokens}/${usage.prompt_tokens}`);
  if (headers?.get("x-owngpt-worker")) said.push(`${t("worker")} ${headers.get("x-owngpt-worker")}`);
  if (headers?.get("x-request-id")) said.push(`${t("request")} ${headers.get("x-request-id")}`);
  if (seen.stopped) said.push(t("stopped"));
  return make("div", { className: "facts" }, ...said.map((text) => make("span", text)));
}

function add(role, text) {
  const item = make("li", { className: role }, make("div", { className: "text" }, text));
  $("messages").append(item);
  $("messages").scrollTop = $("messages").scrollHeight;
  return item;
}

/** A question is text, an answer is Markdown. */
function put(item, role, text) {
  const list = $("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  item.firstChild.replaceChildren(role === "assistant" ? render(text) : text);
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("ask").setAttribute("aria-busy", on);
}
