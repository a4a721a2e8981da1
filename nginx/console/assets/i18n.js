// Words of the console in English and Chinese. `data-i18n` marks what is in the page; `t` is for what is made here.

const ZH = {
  chat: "对话", status: "状态", usage: "用量", tuning: "微调", leave: "忘记密钥", welcome: "欢迎",
  key_why: "粘贴您的 API 密钥。它只留在此标签页中，关闭即消失。", key: "API 密钥", open: "打开",
  key_where: "make up 会打印一个密钥；make key NAME=alice 可再建一个。",
  settings: "设置", model: "模型", system: "系统提示词", temperature: "温度", own_default: "模型默认", max_tokens: "回答上限（token）", new_chat: "新对话",
  question: "您的消息", question_hint: "请提问。Enter 发送，Shift+Enter 换行。", send: "发送", stop: "停止",
  tokens_per_s: "每秒 token", requests_now: "运行中与排队的请求", workers: "工作节点", machine: "机器",
  usage_what: "此密钥最近 30 天的用量（UTC）。", tokens_per_day: "每天 token",
  new_job: "您自己的模型", new_job_what: "JSONL 文件，每行一个对话；见 docs/fine-tuning.md。",
  choose_file: "选择文件，或拖放到此处", base: "基础模型", suffix: "命名", epochs: "轮数（留空则按数据量决定）",
  train: "上传并训练", jobs: "任务", loss: "损失", events: "事件", pause: "暂停", resume: "继续", cancel: "取消",
  try_it: "在对话中试用",
  "key refused": "此密钥无效，或已被撤销。", "no answer": "服务没有响应：", "first token": "首 token", "tokens": "token",
  "worker": "节点", "engine": "引擎", "cached prompt": "缓存的提示", "from memory": "来自缓存", "stopped": "已停止", "request": "请求",
  "ready": "就绪节点", "running": "运行中", "waiting": "排队", "tokens/s": "token/秒", "requests, last minute": "请求（近一分钟）",
  "failed, last minute": "失败（近一分钟）", "first token, median": "首 token 中位数", "first token, p95": "首 token p95",
  "prompt cached": "提示缓存命中", "today": "今天", "this month": "本月", "budget left": "预算剩余", "1M tokens, today": "每百万 token（今天）",
  "state": "状态", "KV blocks": "KV 块", "models": "模型", "read/s": "读取/秒", "CPU": "CPU", "memory": "内存", "power": "功率",
  "temperature": "温度", "busy": "利用率", "throttled": "降频", "no worker": "没有工作节点。", "day": "日期", "requests": "请求",
  "prompt": "提示", "cached": "缓存", "answers": "回答", "nothing used": "尚无用量。", "no jobs": "尚无任务。", "show": "查看",
  "succeeded": "成功", "failed": "失败", "queued": "排队中", "cancelled": "已取消", "validating_files": "正在校验", "paused": "已暂停",
  batches: "批处理", batch_new: "大批请求", batch_what: "JSONL 文件，每行一个请求；见 docs/batches.md。它们在空闲时回答。", conversations: "对话记录",
  kept_here: "只保存在此浏览器中，直到您删除。", last_hour: "最近一小时", send_batch: "上传并开始",
  "copy": "复制", "copied": "已复制", "delete": "删除", "done": "完成", "results": "结果", "mistakes": "错误", "no batches": "尚无批处理。",
  "not a batch": "第一行不是带有 url 的 JSON 请求。", "completed": "已完成", "in_progress": "进行中", "validating": "正在校验", "finalizing": "正在收尾",
  "expired": "已过期", "cancelling": "正在取消", "made": "创建时间", "uploading": "正在上传……", "checking": "已上传。正在检查每一行……", "training loss": "训练损失",
  "validation loss": "验证损失", "step": "步", "left": "剩余",
};

let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
const english = new Map();

const EN = { "key refused": "This key is not valid, or was revoked.", "no answer": "The stack does not answer:", "validating_files": "validating", "in_progress": "in progress",
  "not a batch": "The first line is no JSON request with a url." };

/** A text in the reader's language; what is not in EN is its own English. */
export const t = (text) => (language === "zh" ? ZH : EN)[text] ?? text;

/** Put the chosen language into everything the page came with. */
export function translate(root = document) {
  document.documentElement.lang = language;
  for (const node of root.querySelectorAll("[data-i18n]")) {
    if (!english.has(node)) english.set(node, [...node.childNodes].map((child) => child.cloneNode(true)));
    const text = language === "zh" ? ZH[node.dataset.i18n] : undefined;
    node.replaceChildren(...(text ? [text] : english.get(node).map((child) => child.cloneNode(true))));
  }
  for (const node of root.querySelectorAll("[data-i18n-placeholder]")) {
    node.dataset.en ??= node.placeholder;
    node.placeholder = language === "zh" ? ZH[node.dataset.i18nPlaceholder] : node.dataset.en;
  }
}

/** Switch between the two. */
export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  translate();
  return language;
}

export const currentLanguage = () => language;
