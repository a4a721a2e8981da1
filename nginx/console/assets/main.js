// The frame: a key, five views, two languages.

import * as api from "./api.js";
import * as batches from "./batches.js";
import * as chat from "./chat.js";
import { currentLanguage, switchLanguage, t, translate } from "./i18n.js";
import { $ } from "./page.js";
import * as status from "./status.js";
import * as tuning from "./tuning.js";
import * as usage from "./usage.js";

const VIEWS = { chat, status, usage, tuning, batches };
let shown = null;

async function open(name) {
  VIEWS[shown]?.hide?.();
  shown = name;
  for (const view of document.querySelectorAll(".view")) view.hidden = view.id !== name;
  for (const tab of document.querySelectorAll("#tabs button")) {
    if (tab.dataset.view === name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  location.hash = name;
  await VIEWS[name].show();
}

function askForKey(why = "") {
  VIEWS[shown]?.hide?.();
  shown = null;
  chat.forget();
  api.forget();
  for (const view of document.querySelectorAll(".view")) view.hidden = true;
  $("enter").hidden = false;
  $("tabs").hidden = $("leave").hidden = true;
  $("key-error").textContent = why;
  $("key").focus();
}

/** Let the key's owner in, or say why not. */
async function enter() {
  try {
    await api.json("/v1/models");
  } catch (error) {
    if (error.status !== 401) askForKey(`${t("no answer")} ${error.message}`);
    return;
  }
  $("enter").hidden = true;
  $("tabs").hidden = $("leave").hidden = false;
  const wanted = location.hash.slice(1);
  await open(wanted in VIEWS ? wanted : "chat");
  if (shown === "chat") $("question").focus();
}

for (const tab of document.querySelectorAll("#tabs button")) tab.addEventListener("click", () => open(tab.dataset.view));
$("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const tabs = [...document.querySelectorAll("#tabs button")];
  tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length].focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.remember($("key").value.trim());
  $("key").value = "";
  enter();
});
addEventListener("refused", () => askForKey(t("key refused")));   // also when it is revoked while the page is open
$("leave").addEventListener("click", () => askForKey());
const nameLanguage = () => ($("language").textContent = currentLanguage() === "zh" ? "English" : "中文");
$("language").addEventListener("click", () => {
  switchLanguage();
  nameLanguage();
  if (shown) open(shown);
});

translate();
nameLanguage();
chat.setUp();
batches.setUp();
tuning.setUp(async (model) => {
  await open("chat");
  chat.choose(model);
});
if (api.key()) enter();
else askForKey();
