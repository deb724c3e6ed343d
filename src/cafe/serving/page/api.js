// Requests to this server, with its key if it wants one.
import { $ } from "./dom.js";
import { parseEvents } from "./events.js";

/** Tell in plain words why a request failed. */
export class RequestError extends Error {}

let key = "";
try {
  key = sessionStorage.getItem("key") || "";
} catch {
  // Storage may be forbidden; the key is then kept in memory.
}
let asking = null;

export const hasKey = () => key !== "";

/** Ask for the key, once for all requests that wait for it. */
function askForKey() {
  const dialog = $("#key");
  const input = $("input", dialog);
  asking ??= new Promise((resolve) => {
    input.value = "";
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => resolve(input.value.trim()), { once: true });
  }).finally(() => (asking = null));
  return asking;
}

/** Send a request, and return its response if it succeeded. */
export async function request(path, { json, signal } = {}) {
  for (;;) {
    const used = key;
    const headers = {};
    if (used) headers.Authorization = `Bearer ${used}`;
    if (json !== undefined) headers["Content-Type"] = "application/json";
    const method = json === undefined ? "GET" : "POST";
    const body = json === undefined ? undefined : JSON.stringify(json);
    let response;
    try {
      response = await fetch(path, { method, headers, body, signal, redirect: "error" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new RequestError("The server cannot be reached. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw new RequestError(await explain(response));
    // Another request may have asked for it meanwhile.
    if (used === key) {
      const entered = await askForKey();
      if (!entered) throw new RequestError("Without its key, the server answers nothing.");
      key = entered;
      try {
        sessionStorage.setItem("key", key);
      } catch {
        // Kept in memory alone.
      }
    }
  }
}

/** Return what a response says is wrong. */
async function explain(response) {
  if (response.status === 429) {
    const seconds = Number(response.headers.get("Retry-After")) || 0;
    return `The server is busy. Try again ${seconds ? `in ${seconds} s` : "in a moment"}.`;
  }
  if (response.status === 413) return "That is too large for this server.";
  try {
    const body = await response.json();
    const message = body.error?.message ?? body.detail;
    if (typeof message === "string" && message) return message;
  } catch {
    // No JSON, so the status has to do.
  }
  return `The server could not do that (${response.status}).`;
}

export async function getJson(path, options) {
  return (await request(path, options)).json();
}

/** Yield the JSON objects of a stream, until it ends or is aborted. */
export async function* stream(path, json, signal) {
  const response = await request(path, { json, signal });
  for await (const data of parseEvents(response.body)) {
    if (data === "[DONE]") return;
    yield JSON.parse(data);
  }
}

const thumbnailPath = (id, size) => `/thumbnails/${encodeURIComponent(id)}?size=${size}`;

// An <img> sends no key, so where there is one, images are fetched when they come near the screen.
const near = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      fetchInto(entry.target);
    }
  },
  { rootMargin: "400px" },
);

async function fetchInto(image) {
  const path = image.dataset.path;
  try {
    const url = URL.createObjectURL(await (await request(path)).blob());
    const release = () => URL.revokeObjectURL(url);
    image.addEventListener("load", release, { once: true });
    image.addEventListener("error", release, { once: true });
    if (image.dataset.path === path) image.src = url;
    else release(); // it shows another image by now
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

/** Let an <img> show an image of the collection. */
export function showThumbnail(image, id, size) {
  const path = thumbnailPath(id, size);
  image.dataset.path = path;
  image.decoding = "async";
  if (hasKey()) {
    image.removeAttribute("src");
    near.observe(image);
  } else {
    image.src = path;
  }
}
