// What this key has used, by day and model.

import { json } from "./api.js";
import { t } from "./i18n.js";
import { $, chart, fill, number } from "./page.js";

let draw = null;

export async function show() {
  draw ??= chart($("usage-chart"), [t("prompt"), t("answers")]);
  try {
    const { days } = await json("/v1/usage?days=30");
    const rows = days.flatMap((day) => Object.entries(day.models).map(([model, used]) =>
      [day.date, model, number(used.requests), number(used.prompt_tokens), number(used.cached_tokens), number(used.completion_tokens)]));
    fill($("usage-table"), [t("day"), t("model"), t("requests"), t("prompt"), t("cached"), t("answers")], rows, t("nothing used"));
    const oldFirst = [...days].reverse();
    draw([oldFirst.map((day) => Date.parse(day.date) / 1000), oldFirst.map((day) => day.total.prompt_tokens), oldFirst.map((day) => day.total.completion_tokens)]);
    $("usage-error").textContent = "";
  } catch (error) {
    $("usage-error").textContent = `${t("no answer")} ${error.message}`;
  }
}
