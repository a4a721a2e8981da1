// Batches: upload a file of requests, watch it, stop it, fetch what came out.

import { call, json, upload } from "./api.js";
import { t } from "./i18n.js";
import { $, acting, busy, fill, make, takesFile, whileShown } from "./page.js";

const OVER = new Set(["completed", "failed", "expired", "cancelled"]);
let stop = null, listed = "";

export function setUp() {
  takesFile($("batch-file"), $("batch-name"));
  $("batch").addEventListener("submit", (event) => {
    event.preventDefault();
    busy($("batch"), () => act(start));
  });
}

export function show() {
  listed = "";   // the language may be another
  stop = whileShown(refresh, 2000);
}

export const hide = () => stop?.();

const act = acting($("batch-error"), () => refresh());

/** The file says by its first line where its requests go. */
async function start() {
  const file = $("batch-file").files[0];
  if (!file) return;
  const first = (await file.slice(0, 1 << 20).text()).split("\n", 1)[0];
  let endpoint = null;
  try {
    endpoint = JSON.parse(first).url;
  } catch { /* said below */ }
  if (typeof endpoint !== "string") throw new Error(t("not a batch"));
  const id = await upload(file, "batch");
  await json("/v1/batches", { json: { input_file_id: id, endpoint, completion_window: "24h" } });
}

async function refresh() {
  let batches;
  try {
    batches = (await json("/v1/batches?limit=50")).data;
    $("batches-error").textContent = "";
  } catch (error) {
    $("batches-error").textContent = `${t("no answer")} ${error.message}`;
    return;
  }
  const now = JSON.stringify([t("show"), batches.map((batch) => [batch.id, batch.status, batch.request_counts])]);
  if (now !== listed) list(batches);
  listed = now;
}

function list(batches) {
  fill($("batches-table"), [t("state"), t("done"), t("failed"), t("made"), ""], batches.map((batch) => {
    const { total, completed, failed } = batch.request_counts ?? { total: 0, completed: 0, failed: 0 };
    const buttons = make("span", { className: "buttons" });
    if (!OVER.has(batch.status)) buttons.append(button("cancel", () => act(() => call(`/v1/batches/${batch.id}/cancel`, { method: "POST" }))));
    if (batch.output_file_id) buttons.append(button("results", () => act(() => save(batch.output_file_id, `${batch.id}.jsonl`))));
    if (batch.error_file_id) buttons.append(button("mistakes", () => act(() => save(batch.error_file_id, `${batch.id}.errors.jsonl`))));
    const problems = batch.errors?.data?.map((problem) => make("div", { className: "error" }, `${problem.line ?? ""} ${problem.message}`)) ?? [];
    return [make("span", t(batch.status), ...problems.slice(0, 5)), total ? make("span", make("progress", { value: completed + failed, max: total }), ` ${completed + failed}/${total}`) : "–",
      String(failed), new Date(batch.created_at * 1000).toLocaleString(), buttons];
  }), t("no batches"));
}

function button(word, work) {
  const made = make("button", { className: "plain", type: "button" }, t(word));
  made.addEventListener("click", work);
  return made;
}

/** A file of the API's as a download of the browser's. */
async function save(id, name) {
  const link = make("a", { href: URL.createObjectURL(await (await call(`/v1/files/${id}/content`)).blob()), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}
