// Conversations of this key, kept in this browser until they are deleted. Nothing of them is on a server.

import { key } from "./api.js";

const MOST = 100;
const place = () => `conversations:${key()?.split("_")[1]}`;   // a key's public part

/** All of them, latest first: {id, title, model, messages}. */
export const all = () => JSON.parse(localStorage.getItem(place()) ?? "[]");

/** Keep one, or its new state; not what was deleted meanwhile, here or in another tab. The oldest make room. */
export function keep(conversation) {
  const others = all().filter((other) => other.id !== conversation.id);
  if (!key() || (conversation.kept && others.length === all().length)) return;
  conversation.kept = true;
  const found = [conversation, ...others].slice(0, MOST);
  while (found.length) {
    try {
      localStorage.setItem(place(), JSON.stringify(found));
      return;
    } catch {
      found.pop();
    }
  }
}

export function remove(id) {
  const left = all().filter((conversation) => conversation.id !== id);
  if (left.length) localStorage.setItem(place(), JSON.stringify(left));
  else localStorage.removeItem(place());
}
