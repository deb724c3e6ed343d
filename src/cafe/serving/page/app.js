// The page: search a collection, look at what is there, and talk about it.
import { RequestError, getJson, showThumbnail } from "./api.js";
import { attach, chatOnly, closeChat, isOpen, onChat, openChat, setImages } from "./chat.js";
import { $, el, formatDay, plural, toast } from "./dom.js";
import { clearSelection, draw, drawSkeletons, focusImage, isSelected, onGallery, selection, shown, toggle } from "./gallery.js";
import { imageOf, toDataUri } from "./images.js";
import { FILTERS, addressOf, isSearch, keepImage, keptImage, readAddress, searchBody } from "./query.js";
import { onViewer, view } from "./viewer.js";

const NUM_RESULTS = 60;
const EXAMPLES = ["sunset over water", "people laughing", "a red car", "handwritten notes"];
const words = $("#words");
const form = $("#filter-form");
const isTouch = matchMedia("(pointer: coarse)").matches;
let collection = null;
let query = {};
let searching = null; // the controller of the search under way

// ---- Searching

/** Search for something else, and put it into the address. */
function go(next) {
  query = Object.fromEntries(Object.entries(next).filter(([, value]) => value));
  const address = addressOf(query);
  if (address !== location.pathname + location.search) history.pushState(null, "", address);
  show();
}

/** Show what the query finds. */
async function show() {
  drawQuery();
  searching?.abort();
  const controller = (searching = new AbortController());
  const isCurrent = () => searching === controller;
  // Quick answers come without a flash of grey.
  const timer = setTimeout(drawSkeletons, 120);
  $("#nothing").hidden = true;
  $("#status").textContent = "Searching…";
  try {
    const { results } = await getJson("/search", { json: searchBody(query, NUM_RESULTS), signal: controller.signal });
    clearTimeout(timer);
    if (!isCurrent()) return;
    // An image is most of all like itself.
    const others = results.filter((image) => image.id !== query.like);
    draw(others);
    report(others.length);
  } catch (error) {
    clearTimeout(timer);
    if (error.name === "AbortError" || !isCurrent()) return;
    draw([]);
    $("#status").textContent = "";
    empty("That did not work", error.message);
    if (!(error instanceof RequestError)) throw error;
  }
}

/** Say how many images there are, and of what kind. */
function report(count) {
  const filtered = FILTERS.some((name) => query[name]);
  if (!isSearch(query)) {
    $("#status").textContent = filtered ? plural(count, "image") : collectionDays();
  } else {
    const parts = [];
    if (query.query) parts.push(`“${query.query}”`);
    if (query.like || query.image) parts.push("your image");
    $("#status").textContent = `${plural(count, "image")} for ${parts.join(" and ")}`;
  }
  if (count) $("#nothing").hidden = true;
  else if (filtered) empty("Nothing passes the filters", "Take some of them away, or search for something else.");
  else empty("There are no images yet", "Index a folder by: cafe index FOLDER");
}

/** Return from when to when the images of the collection are. */
function collectionDays() {
  const { first_day: first, last_day: last } = collection;
  if (!first) return "";
  return first === last ? formatDay(first) : `${formatDay(first)} – ${formatDay(last)}`;
}

function empty(title, text) {
  $("#nothing h2").textContent = title;
  $("#nothing p").textContent = text;
  $("#nothing").hidden = false;
}

/** Show the query in the fields. */
function drawQuery() {
  words.value = query.query ?? "";
  $("#sort").value = query.sort ?? (isSearch(query) ? "score" : "newest");
  $("#sort option").disabled = !isSearch(query);
  const chip = $("#query-image");
  const kept = query.image ? keptImage(query.image) : null;
  chip.hidden = !kept && !query.like;
  if (kept) {
    $("img", chip).src = kept.url;
    $("span", chip).textContent = kept.name;
  } else if (query.like) {
    showThumbnail($("img", chip), query.like, 256);
    $("span", chip).textContent = "like this";
  }
  for (const name of FILTERS) form.elements[name].value = query[name] ?? (name === "min_score" ? 0 : "");
  drawScore();
  const count = FILTERS.filter((name) => query[name]).length;
  $("#filter-count").hidden = !count;
  $("#filter-count").textContent = count;
  $("#hero").hidden = isSearch(query) || count > 0;
  document.title = query.query ? `${query.query} · CAFe` : "CAFe";
}

function drawScore() {
  const { value } = form.elements.min_score;
  $("output", form).value = Number(value) ? Number(value).toFixed(2) : "any";
}

/** Search by an image, together with the words that are there. */
async function searchByImage(file) {
  try {
    const kept = { name: file.name || "pasted image", url: URL.createObjectURL(file), uri: await toDataUri(file) };
    go({ ...query, query: words.value.trim(), like: "", image: keepImage(kept), sort: "" });
  } catch {
    toast("The image cannot be read.");
  }
}

const takeImage = (file) => (collection ? searchByImage(file) : attach(file));
const searchLike = (image) => {
  scrollTo({ top: 0 });
  go({ ...query, query: "", image: "", like: image.id, sort: "" });
};

$("#search").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isTouch) words.blur(); // the keyboard would cover what is found
  go({ ...query, query: words.value.trim(), sort: words.value.trim() === (query.query ?? "") ? query.sort : "" });
});
$("#query-image button").addEventListener("click", () => {
  go({ ...query, image: "", like: "" });
  words.focus();
});
$("#sort").addEventListener("change", () => {
  const usual = isSearch(query) ? "score" : "newest";
  go({ ...query, sort: $("#sort").value === usual ? "" : $("#sort").value });
});
addEventListener("popstate", () => {
  if (addressOf(readAddress()) === addressOf(query)) return; // a link within the page
  query = readAddress();
  show();
});

// ---- Filters

function toggleFilters(open) {
  $("#filters").hidden = !open;
  $("#filter-toggle").setAttribute("aria-expanded", open);
}

$("#filter-toggle").addEventListener("click", () => {
  toggleFilters($("#filters").hidden);
  if (!$("#filters").hidden) form.elements.after.focus();
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const filters = Object.fromEntries(FILTERS.map((name) => [name, form.elements[name].value.trim()]));
  if (!Number(filters.min_score)) filters.min_score = "";
  go({ ...query, ...filters });
});
form.addEventListener("reset", () => go({ ...query, ...Object.fromEntries(FILTERS.map((name) => [name, ""])) }));
form.elements.min_score.addEventListener("input", drawScore);

// ---- Dropping, pasting, choosing

let depth = 0; // of elements that a file is dragged over
const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragenter", (event) => {
  if (!isFile(event)) return;
  event.preventDefault();
  depth++;
  $("#drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (isFile(event) && --depth <= 0) $("#drop").hidden = true;
});
addEventListener("dragover", (event) => {
  if (isFile(event)) event.preventDefault();
});
addEventListener("drop", (event) => {
  depth = 0;
  $("#drop").hidden = true;
  if (!isFile(event)) return;
  event.preventDefault(); // a browser would leave the page for the image
  const file = imageOf(event.dataTransfer);
  if (file) takeImage(file);
  else toast("That is no image.");
});
addEventListener("paste", (event) => {
  const file = imageOf(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  takeImage(file);
});
for (const button of [$("#choose-image"), $("#attach")]) button.addEventListener("click", () => $("#file").click());
$("#file").addEventListener("change", () => {
  const [file] = $("#file").files;
  if (file) takeImage(file);
  $("#file").value = "";
});

// ---- Selecting and talking

function drawSelection() {
  const images = selection();
  $("#selection").hidden = !images.length;
  $("#selected-count").textContent = `${images.length} selected`;
  if (isOpen()) setImages(images);
}

onGallery({ open: (index) => view(shown(), index), like: searchLike, select: drawSelection });
onViewer({
  isSelected,
  toggle,
  like: searchLike,
  ask: (image) => openChat([image]),
  closed: (image) => {
    if (shown().includes(image) && !isOpen()) focusImage(shown().indexOf(image));
  },
});
onChat({ open: view, selection });
$("#ask-selected").addEventListener("click", () => openChat(selection()));
$("#clear-selected").addEventListener("click", clearSelection);
$("#chat-toggle").addEventListener("click", () => (isOpen() ? closeChat() : openChat(selection())));

// ---- Keys and colors

addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const writing = event.target.matches?.("input, textarea, select");
  if (event.key === "/" && !writing && collection) {
    event.preventDefault();
    words.focus();
    words.select();
  } else if (event.key === "Escape") {
    if (isOpen() && collection) closeChat();
    else if (!$("#filters").hidden) {
      toggleFilters(false);
      $("#filter-toggle").focus();
    } else clearSelection();
  } else if (event.key === "ArrowDown" && event.target === words && shown().length) {
    event.preventDefault();
    focusImage(0);
  }
});

$("#theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("theme", root.dataset.theme);
  } catch {
    // Until the page is loaded anew.
  }
});

// ---- Starting

function drawHero() {
  const { images } = collection;
  $("#hero h1").textContent = images ? `Search ${plural(images, "image")}` : "Nothing to search yet";
  const examples = EXAMPLES.map((text) => {
    const button = el("button", { type: "button", className: "example" }, text);
    button.addEventListener("click", () => go({ query: text }));
    return button;
  });
  $("#hero .examples").replaceChildren(...(images ? examples : []));
  $("#folders").replaceChildren(...collection.folders.map((name) => el("option", { value: name })));
}

async function start() {
  if (isTouch) words.placeholder = "Describe a photo";
  try {
    const facts = await getJson("/collection");
    collection = facts.collection;
    if (!collection) {
      chatOnly(facts.model);
      return;
    }
    drawHero();
    document.body.classList.add("ready");
    query = readAddress();
    await show();
    if (!isTouch) words.focus({ preventScroll: true });
  } catch (error) {
    empty("That did not work", error.message);
    if (!(error instanceof RequestError)) throw error;
  }
}

start();
