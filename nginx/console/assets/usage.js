// What this key has used, by day and model.

import { json } from "./api.js";
import { t } from "./i18n.js";
import { $, chart, fill, number } from "./page.js";

const DAYS = 30, DAY_MS = 86_400_000;
let draw = null;

export async function show() {
  draw ??= chart($("usage-chart"), [t("prompt"), t("answers")], "day");
  try {
    const { days } = await json(`/v1/usage?days=${DAYS}`);
    const rows = days.flatMap((day) => Object.entries(day.models).map(([model, used]) =>
      [day.date, model, number(used.requests), number(used.prompt_tokens), number(used.cached_tokens), number(used.completion_tokens)]));
    fill($("usage-table"), [t("day"), t("model"), t("requests"), t("prompt"), t("cached"), t("answers")], rows, t("nothing used"));
    const used = new Map(days.map((day) => [Date.parse(day.date), day.total]));
    const today = new Date().setUTCHours(0, 0, 0, 0);
    const every = Array.from({ length: DAYS }, (_, ago) => today - (DAYS - 1 - ago) * DAY_MS);  // a day without use is a day
    draw([every.map((day) => day / 1000), ...["prompt_tokens", "completion_tokens"].map((kind) => every.map((day) => used.get(day)?.[kind] ?? 0))]);
    $("usage-error").textContent = "";
  } catch (error) {
    $("usage-error").textContent = `${t("no answer")} ${error.message}`;
  }
}
