// The grid of images: drawn from results, selected, and walked through by keyboard.
import { showThumbnail } from "./api.js";
import { $, el, formatDay, icon } from "./dom.js";

const list = $("#gallery");
const selected = new Map(); // id -> image, in the order of selection
let images = [];
let anchor = 0; // where a range of selected images begins
let handlers = {};

export const shown = () => images;
export const selection = () => [...selected.values()];
export const isSelected = (id) => selected.has(id);

/** Say what happens when an image is opened, its like are wanted, or the selection changes. */
export function onGallery(functions) {
  handlers = functions;
}

/** Draw images; those that are selected stay so. */
export function draw(results) {
  images = results;
  anchor = 0;
  list.replaceChildren(...images.map(card));
  list.setAttribute("aria-busy", "false");
  setActive(0);
}

/** Draw grey cards while a search is under way. */
export function drawSkeletons() {
  const shapes = [1.5, 1, 1.33, 0.75, 1.5, 1.78, 1, 1.33, 0.8, 1.5, 1.33, 1];
  images = [];
  list.setAttribute("aria-busy", "true");
  list.replaceChildren(
    ...shapes.map((ratio) => {
      const item = el("li", { className: "card skeleton", "aria-hidden": "true" }, el("div", { className: "frame" }), el("p"));
      item.style.setProperty("--ratio", ratio);
      return item;
    }),
  );
}

/** Make the card of an image. */
function card(image, index) {
  const picture = el("img", { alt: image.caption || image.name, loading: "lazy", draggable: false });
  const frame = el("button", { type: "button", className: "frame", tabIndex: -1 }, picture);
  frame.setAttribute("aria-label", describe(image));
  frame.title = image.folder ? `${image.folder}/${image.name}` : image.name;
  const check = el("button", { type: "button", className: "check", tabIndex: -1, "aria-label": `Select ${image.name}` }, icon("check"));
  const like = el("button", { type: "button", className: "like", tabIndex: -1, title: "More like this" }, icon("similar"));
  like.setAttribute("aria-label", `More like ${image.name}`);
  const score = image.score === null ? null : el("span", { className: "score", title: "Score" }, image.score.toFixed(2));
  const page = image.page === null ? null : el("span", { className: "page" }, `p. ${image.page}`);
  const day = el("time", { dateTime: image.taken_at }, formatDay(image.taken_at));
  const facts = el("p", { className: "facts" }, score, day, page);
  const item = el("li", { className: "card", dataset: { id: image.id } }, frame, check, like, facts);

  // Rows are as wide as the page because each card grows by its shape; very wide and very tall ones are cut.
  const ratio = Math.min(Math.max(image.width / image.height, 0.6), 2.4);
  item.style.setProperty("--ratio", ratio.toFixed(4));
  if (Math.max(image.width, image.height) < 96) item.classList.add("pixels");
  picture.addEventListener("load", () => item.classList.add("loaded"));
  picture.addEventListener("error", () => item.classList.add("gone"));
  showThumbnail(picture, image.id, 512);
  mark(item, selected.has(image.id));

  frame.addEventListener("click", (event) => {
    setActive(index);
    if (event.shiftKey) selectTo(index);
    else if (event.ctrlKey || event.metaKey) toggle(images[index]);
    else handlers.open(index);
  });
  check.addEventListener("click", (event) => {
    setActive(index);
    if (event.shiftKey) selectTo(index);
    else toggle(images[index]);
  });
  like.addEventListener("click", () => handlers.like(image));
  return item;
}

function describe(image) {
  const score = image.score === null ? "" : `, score ${image.score.toFixed(2)}`;
  return `${image.caption || image.name}, ${formatDay(image.taken_at)}${score}`;
}

function mark(item, on) {
  item.classList.toggle("selected", on);
  $(".check", item)?.setAttribute("aria-pressed", on);
}

/** Select an image, or no longer. */
export function toggle(image) {
  if (selected.has(image.id)) selected.delete(image.id);
  else selected.set(image.id, image);
  anchor = Math.max(images.indexOf(image), 0);
  changed();
}

/** Select all images from the one that was selected last to this one. */
function selectTo(index) {
  const [first, last] = [Math.min(anchor, index), Math.max(anchor, index)];
  for (const image of images.slice(first, last + 1)) selected.set(image.id, image);
  changed();
}

export function clearSelection() {
  selected.clear();
  changed();
}

function changed() {
  for (const item of list.children) mark(item, selected.has(item.dataset.id));
  handlers.select();
}

/** Make one card the one that Tab comes to; the others are reached by arrows. */
function setActive(index) {
  for (const button of list.querySelectorAll("button")) button.tabIndex = -1;
  const item = list.children[index];
  for (const button of item?.querySelectorAll("button") ?? []) button.tabIndex = 0;
}

export function focusImage(index) {
  const frame = list.children[index] && $(".frame", list.children[index]);
  if (!frame) return;
  setActive(index);
  frame.focus();
  frame.scrollIntoView({ block: "nearest" });
}

/** Return the card in the row above or below that is nearest. */
function vertical(index, direction) {
  const items = [...list.children];
  const from = items[index].getBoundingClientRect();
  const center = from.left + from.width / 2;
  let best = index;
  let distance = Infinity;
  let row = null;
  for (let next = index + direction; next >= 0 && next < items.length; next += direction) {
    const box = items[next].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    row ??= box.top;
    if (Math.abs(box.top - row) >= 4) break;
    const away = Math.abs(box.left + box.width / 2 - center);
    if (away < distance) [best, distance] = [next, away];
  }
  return best;
}

list.addEventListener("keydown", (event) => {
  const item = event.target.closest(".card");
  if (!item || !images.length) return;
  const index = [...list.children].indexOf(item);
  const moves = {
    ArrowRight: () => Math.min(index + 1, images.length - 1),
    ArrowLeft: () => Math.max(index - 1, 0),
    ArrowDown: () => vertical(index, 1),
    ArrowUp: () => vertical(index, -1),
    Home: () => 0,
    End: () => images.length - 1,
  };
  if (moves[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    const next = moves[event.key]();
    focusImage(next);
    if (event.shiftKey) selectTo(next);
  } else if (event.key === " " && event.target.classList.contains("frame")) {
    event.preventDefault(); // a button would be clicked
    if (event.shiftKey) selectTo(index);
    else toggle(images[index]);
  }
});
// Firefox clicks a button when the space bar is let go.
list.addEventListener("keyup", (event) => {
  if (event.key === " " && event.target.classList.contains("frame")) event.preventDefault();
});
