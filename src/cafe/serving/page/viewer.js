// One image, large, with those around it.
import { showThumbnail } from "./api.js";
import { $, formatDay } from "./dom.js";

const dialog = $("#viewer");
const picture = $("img", dialog);
let images = [];
let index = 0;
let handlers = {};

export function onViewer(functions) {
  handlers = functions;
}

/** Open an image of a list. */
export function view(list, start) {
  images = list;
  show(start);
  if (!dialog.open) dialog.showModal();
}

function show(next) {
  index = (next + images.length) % images.length;
  const image = images[index];
  const facts = [formatDay(image.taken_at), `${image.width} × ${image.height}`];
  if (image.folder) facts.push(image.folder);
  if (image.page !== null) facts.push(`page ${image.page}`);
  if (image.score !== null) facts.push(`score ${image.score.toFixed(2)}`);

  dialog.classList.add("loading");
  dialog.classList.remove("gone");
  dialog.classList.toggle("pixels", Math.max(image.width, image.height) < 200);
  picture.alt = image.caption || image.name;
  picture.style.setProperty("--ratio", image.width / image.height);
  showThumbnail(picture, image.id, 1024);
  $("#viewer-name").textContent = image.name;
  $("#viewer-facts").textContent = facts.join(" · ");
  $("#viewer-caption").textContent = image.caption;
  $("#viewer-previous").hidden = $("#viewer-next").hidden = images.length < 2;
  markSelected();
}

function markSelected() {
  const on = handlers.isSelected(images[index].id);
  const button = $("#viewer-select");
  button.setAttribute("aria-pressed", on);
  $("span", button).textContent = on ? "Selected" : "Select";
}

picture.addEventListener("load", () => dialog.classList.remove("loading"));
picture.addEventListener("error", () => {
  dialog.classList.remove("loading");
  dialog.classList.add("gone");
});
$("#viewer-previous").addEventListener("click", () => show(index - 1));
$("#viewer-next").addEventListener("click", () => show(index + 1));
$("#viewer-close").addEventListener("click", () => dialog.close());
$("#viewer-select").addEventListener("click", () => {
  handlers.toggle(images[index]);
  markSelected();
});
$("#viewer-like").addEventListener("click", () => {
  dialog.close();
  handlers.like(images[index]);
});
$("#viewer-ask").addEventListener("click", () => {
  dialog.close();
  handlers.ask(images[index]);
});
// A click beside the image closes it.
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(index - 1);
  else if (event.key === "ArrowRight") show(index + 1);
});
dialog.addEventListener("close", () => {
  picture.removeAttribute("src");
  delete picture.dataset.path;
  handlers.closed(images[index]);
});
