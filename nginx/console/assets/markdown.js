// An answer's Markdown as nodes. marked reads it, DOMPurify lets through what is listed here; HTML in an answer is text.

import { t } from "./i18n.js";
import { make } from "./page.js";

const escape = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
marked.use({ gfm: true, breaks: true, renderer: { html: ({ text }) => escape(text), image: ({ text, href }) => escape(`${text} (${href})`) } });

const TAGS = ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li",
  "table", "thead", "tbody", "tr", "th", "td", "a"];

/** A fragment. Links open elsewhere and say nothing about where they were; code can be copied. */
export function render(text) {
  let html;
  try {
    html = marked.parse(text);
  } catch {
    html = `<p>${escape(text)}</p>`;   // thousands of nested lists are more than it can read
  }
  const fragment = DOMPurify.sanitize(html, { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "start"], RETURN_DOM_FRAGMENT: true });
  for (const link of fragment.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  if (!navigator.clipboard) return fragment;   // a page without https, from another machine
  for (const block of fragment.querySelectorAll("pre")) {
    const button = make("button", { className: "plain copy", type: "button" }, t("copy"));
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      button.textContent = t("copied");
    });
    block.append(button);
  }
  return fragment;
}
