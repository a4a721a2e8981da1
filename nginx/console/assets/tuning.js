// Fine-tuning: upload a file, see every bad line, watch the loss, try the result.

import { call, json, upload } from "./api.js";
import { t } from "./i18n.js";
import { $, acting, busy, chart, fill, make, seconds, takesFile, whileShown } from "./page.js";

const OVER = new Set(["succeeded", "failed", "cancelled"]);
let chosen = null, stop = null, drawLoss = null, openChat = () => {};
let listed = "", settled = "";   // what the list and the job show already, so that a button is not replaced under a finger

export function setUp(toChat) {
  openChat = toChat;
  takesFile($("file"), $("file-name"));
  $("tune").addEventListener("submit", (event) => {
    event.preventDefault();
    busy($("tune"), train);
  });
  for (const verb of ["pause", "resume", "cancel"]) {
    $(`job-${verb}`).addEventListener("click", () => act(() => call(`/v1/fine_tuning/jobs/${chosen}/${verb}`, { method: "POST" })));
  }
}

export async function show() {
  const models = (await json("/v1/models")).data.filter((model) => !model.parent);
  settled = "";   // the language may be another
  $("base").replaceChildren(...models.map((model) => make("option", { value: model.id }, model.id)));
  stop = whileShown(refresh, 2000);
}

export const hide = () => stop?.();

const act = acting($("tune-error"), () => refresh());

async function train() {
  const file = $("file").files[0];
  if (!file) return;
  $("tune-said").textContent = t("uploading");
  await act(async () => {
    const id = await upload(file, "fine-tune");
    const epochs = $("epochs").value;
    const job = await json("/v1/fine_tuning/jobs", {
      json: {
        model: $("base").value, training_file: id, suffix: $("suffix").value || undefined,
        hyperparameters: epochs ? { n_epochs: Number(epochs) } : undefined,
      },
    });
    chosen = job.id;
    $("tune-said").textContent = t("checking");
  });
  if ($("tune-error").textContent) $("tune-said").textContent = "";
}

async function refresh() {
  let jobs;
  try {
    jobs = (await json("/v1/fine_tuning/jobs?limit=20")).data;
  } catch (error) {
    $("tune-error").textContent = `${t("no answer")} ${error.message}`;
    return;
  }
  const now = JSON.stringify([t("show"), jobs.map((job) => [job.id, job.status, job.paused, job.fine_tuned_model])]);
  if (now !== listed) list(jobs);
  listed = now;
  const job = jobs.find((one) => one.id === chosen);
  $("job").hidden = !job;
  if (job && settled !== job.id) await showJob(job);
}

function list(jobs) {
  fill($("jobs"), ["", t("state"), t("model"), t("made")], jobs.map((job) => {
    const button = make("button", { className: "plain", type: "button" }, t("show"));
    button.addEventListener("click", () => {
      chosen = job.id;
      refresh();
    });
    return [button, t(job.paused ? "paused" : job.status), job.fine_tuned_model ?? job.model, new Date(job.created_at * 1000).toLocaleString()];
  }), t("no jobs"));
}

async function showJob(job) {
  const events = [];
  for (let after = ""; ;) {
    const page = await json(`/v1/fine_tuning/jobs/${job.id}/events?limit=100${after && `&after=${after}`}`);
    events.push(...page.data);
    if (!page.has_more) break;
    after = page.data.at(-1).id;
  }
  if (chosen !== job.id) return;
  const metrics = events.filter((event) => event.type === "metrics").map((event) => event.data).sort((a, b) => a.step - b.step);
  const last = metrics.at(-1);
  $("job-title").textContent = job.fine_tuned_model ?? job.id;
  $("job-line").textContent = [
    t(job.paused ? "paused" : job.status),
    last?.total_steps ? `${t("step")} ${last.step}/${last.total_steps}` : "",
    last && !OVER.has(job.status) && last.eta_s ? `${t("left")} ${seconds(last.eta_s)}` : "",
    job.error?.message ?? "",
  ].filter(Boolean).join(" · ");
  $("job-pause").hidden = OVER.has(job.status) || job.paused;
  $("job-resume").hidden = !job.paused;
  $("job-cancel").hidden = OVER.has(job.status);
  $("job-chat").hidden = !job.fine_tuned_model;
  $("job-chat").onclick = () => openChat(job.fine_tuned_model);
  if (OVER.has(job.status) || metrics.length) $("tune-said").textContent = "";
  settled = OVER.has(job.status) ? job.id : "";

  drawLoss ??= chart($("loss-chart"), [t("training loss"), t("validation loss")], "step", 240);
  const bySteps = new Map();
  for (const data of metrics) bySteps.set(data.step, { ...bySteps.get(data.step), ...data });
  const points = [...bySteps.values()];
  drawLoss([points.map((p) => p.step), points.map((p) => p.train_loss ?? null), points.map((p) => p.full_valid_loss ?? p.valid_loss ?? null)]);

  $("problems").replaceChildren(...events.filter((event) => event.level === "error").reverse().map((event) => make("li", event.message)));
  $("events").replaceChildren(...events.filter((event) => event.type === "message").map((event) =>
    make("li", `${new Date(event.created_at * 1000).toLocaleTimeString()} ${event.message}`)));
}
