// Conversations of this key, kept in this browser until they are deleted. Nothing of them is on a server.

import { key } from "./api.js";

const MOST = 100;
const removed = new Set();   // what is being answered still must not come back
const place = () => `conversations:${key()?.split("_")[1]}`;   // a key's public part

/** All of them, latest first: {id, title, model, messages}. */
export const all = () => JSON.parse(localStorage.getItem(place()) ?? "[]");

/** Keep one, or its new state. When the browser has no more room the oldest go. */
export function keep(conversation) {
  if (!key() || removed.has(conversation.id)) return;
  const found = [conversation, ...all().filter((other) => other.id !== conversation.id)].slice(0, MOST);
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
  removed.add(id);
  const left = all().filter((conversation) => conversation.id !== id);
  if (left.length) localStorage.setItem(place(), JSON.stringify(left));
  else localStorage.removeItem(place());
}
