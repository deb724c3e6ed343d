// Small helpers for elements. Data reaches the page as text alone, never as markup.

export const $ = (selector, root = document) => root.querySelector(selector);

/** Make an element: properties, then children, of which strings become text. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Make an icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.classList.add("icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Say for a while what went wrong. */
export function toast(message) {
  const close = el("button", { type: "button", className: "ghost round", "aria-label": "Dismiss" }, icon("close"));
  const note = el("div", { className: "toast" }, el("span", {}, message), close);
  const remove = () => note.remove();
  close.addEventListener("click", remove);
  setTimeout(remove, 8000);
  const toasts = $("#toasts");
  while (toasts.children.length > 2) toasts.firstElementChild.remove();
  toasts.append(note);
}

const dayFormat = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", year: "numeric" });

/** Return a day in words; times of images are in local time and have no zone. */
export function formatDay(time) {
  const [year, month, day] = time.slice(0, 10).split("-").map(Number);
  const date = new Date(2000, month - 1, day);
  date.setFullYear(year); // `Date` takes the years 0 to 99 for 1900 to 1999
  return dayFormat.format(date);
}

export const plural = (count, word) => `${count.toLocaleString()} ${word}${count === 1 ? "" : "s"}`;
