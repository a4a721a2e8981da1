// How the stack is doing, every two seconds while somebody looks.

import { json } from "./api.js";
import { t } from "./i18n.js";
import { $, bar, chart, fill, gib, make, number, percent, seconds, usd, whileShown } from "./page.js";

const HOUR_S = 3600;
let draw = null, stop = null;

export function show() {
  draw ??= { speed: chart($("speed-chart"), [t("tokens/s")]), load: chart($("load-chart"), [t("running"), t("waiting")]) };
  stop = whileShown(refresh, 2000);
}

export const hide = () => stop?.();

async function refresh() {
  try {
    put(await json("/v1/status"));
    $("status-error").textContent = "";
  } catch (error) {
    $("status-error").textContent = `${t("no answer")} ${error.message}`;
  }
}

function put(status) {
  const { total, last_minute: minute, cost } = status;
  const tiles = [
    [t("ready"), number(total.ready), total.ready === 0],
    [t("running"), number(total.in_flight)],
    [t("waiting"), number(total.waiting), total.waiting > 10],
    [t("tokens/s"), number(total.tokens_per_s, 1)],
    [t("requests, last minute"), number(minute.requests)],
    [t("failed, last minute"), number(minute.failed), minute.failed > 0],
    [t("first token, median"), seconds(minute.ttft_p50_s)],
    [t("first token, p95"), seconds(minute.ttft_p95_s)],
    [t("prompt cached"), percent(minute.cached_share)],
    [t("from memory"), number(minute.from_memory)],
  ];
  if (cost) {
    tiles.push([t("today"), usd(cost.today_usd)], [t("this month"), usd(cost.month_usd)],
      [t("1M tokens, today"), usd(cost.usd_per_1m_tokens_today)]);
    if (cost.budget_usd) tiles.push([t("budget left"), usd(cost.budget_left_usd), cost.budget_left_usd < 0]);
  }
  $("tiles").replaceChildren(...tiles.map(([name, value, bad]) =>
    make("div", { className: bad ? "tile bad" : "tile" }, make("b", value), make("span", name))));

  fill($("workers"), [t("worker"), t("engine"), t("state"), t("running"), t("waiting"), t("KV blocks"), t("tokens/s"), t("read/s"), t("prompt cached"), t("models")],
    status.workers.map((worker) => [worker.id, worker.format ? `${worker.engine} · ${worker.format}` : worker.engine, worker.state, `${worker.in_flight} / ${worker.slots}`, number(worker.waiting + (worker.wished ?? 0)), bar(worker.kv_use),
      number(worker.tokens_per_s, 1), number(worker.prompt_tokens_per_s, 1), percent(worker.cached_share), worker.models.join(", ")]), t("no worker"));

  const machine = (status.gpus ?? []).map((gpu) => [`GPU ${gpu.gpu} ${gpu.name}`, gpu.utilization === null ? "–" : bar(gpu.utilization),
    `${gib(gpu.memory_used_bytes)} / ${gib(gpu.memory_total_bytes)}`, gpu.power_watts === null ? "–" : `${number(gpu.power_watts)} W`,
    gpu.temperature_celsius === null ? "–" : `${number(gpu.temperature_celsius)} °C`, gpu.throttled.join(", ") || "–"]);
  if (status.host) machine.push([t("CPU"), status.host.cpu_utilization === null ? "–" : bar(status.host.cpu_utilization),
    `${gib(status.host.memory_used_bytes)} / ${gib(status.host.memory_total_bytes)}`, "–", "–", "–"]);
  fill($("machine"), ["", t("busy"), t("memory"), t("power"), t("temperature"), t("throttled")], machine, "–");

  $("alerts").replaceChildren(...(status.alerts ?? []).filter((alert) => alert.state === "firing").map((alert) =>
    make("p", { className: "alert", role: "alert" }, make("strong", alert.name), ` ${alert.summary} (${alert.runbook})`)));

  // The server remembers the hour; its last point is now.
  const points = [...status.last_hour, [status.at, total.tokens_per_s, total.in_flight, total.waiting]];
  if (points[0][0] > status.at - HOUR_S) points.unshift([status.at - HOUR_S, null, null, null]);
  const [at, speed, running, waiting] = [0, 1, 2, 3].map((column) => points.map((point) => point[column]));
  draw.speed([at, speed]);
  draw.load([at, running, waiting]);
}
