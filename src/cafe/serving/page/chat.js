// The panel that talks about images: those of the collection, or without one those that are dropped.
import { RequestError, showThumbnail, stream } from "./api.js";
import { $, el, icon, plural, toast } from "./dom.js";
import { toDataUri } from "./images.js";

const MAX_TOKENS = 256;
const MAX_IMAGES = 8;
const LOST = "The connection was lost while the answer came.";
const log = $("#log");
const panel = $("#chat");
const question = $("#question");
let handlers = {};
let model = ""; // its name, where there is no collection
let conversation = begin([]);
let pending = null; // the images that the next question begins a conversation about; null for those of this one
let attached = []; // dropped images of a server without a collection
let controller = null; // of the answer under way

/** Begin a conversation about images. */
function begin(images) {
  return { images, turns: [], attached: [] };
}

export function onChat(functions) {
  handlers = functions;
}

export const isOpen = () => !panel.hidden;

/** Open the panel, about images if any are given. */
export function openChat(images = null) {
  panel.hidden = false;
  document.body.classList.add("chatting");
  $("#chat-toggle").setAttribute("aria-expanded", "true");
  setImages(images);
  if (!log.children.length) drawHint();
  question.focus();
}

export function closeChat() {
  if (panel.hidden || model) return;
  panel.hidden = true;
  document.body.classList.remove("chatting");
  $("#chat-toggle").setAttribute("aria-expanded", "false");
  $("#chat-toggle").focus();
}

/** Let the next question be about these images, if it is not already. */
export function setImages(images) {
  if (!images?.length) {
    pending = null;
  } else {
    const ids = (list) => list.map((image) => image.id).join(" ");
    pending = conversation.turns.length && ids(images) === ids(conversation.images) ? null : images;
  }
  drawAbout();
}

/** Talk to the model alone: the server has no collection. */
export function chatOnly(name) {
  model = name;
  document.body.classList.add("chat-only");
  $("#attach").hidden = false;
  $("#chat-close").hidden = true;
  $("h2", panel).textContent = name;
  $("#drop span").textContent = "Drop the image to ask about it";
  openChat();
}

/** Add a dropped image to the next question. */
export async function attach(file) {
  if (attached.length + conversation.attached.length >= MAX_IMAGES) {
    toast(`A conversation can be about ${MAX_IMAGES} images at most.`);
    return;
  }
  attached.push({ name: file.name, url: URL.createObjectURL(file), uri: await toDataUri(file) });
  drawAbout();
}

/** Say what can be asked, while nothing was. */
function drawHint() {
  if (!model) {
    const text = "Select images and ask about them. With none selected, a question is answered from the images that fit it best.";
    log.replaceChildren(el("p", { className: "hint" }, text));
    return;
  }
  const text = "Drop an image here, paste one or choose one. Without an image, the model answers from what it knows.";
  log.replaceChildren(el("div", { className: "hint welcome" }, icon("image"), el("h3", {}, "Ask about an image"), el("p", {}, text)));
}

/** Show which images the next question is about. */
function drawAbout() {
  const about = $("#about");
  about.replaceChildren();
  for (const image of attached) {
    const remove = el("button", { type: "button", className: "thumb", title: `Remove ${image.name}` });
    remove.append(el("img", { src: image.url, alt: "" }));
    remove.setAttribute("aria-label", `Remove ${image.name}`);
    remove.addEventListener("click", () => {
      attached = attached.filter((other) => other !== image);
      URL.revokeObjectURL(image.url);
      drawAbout();
    });
    about.append(remove);
  }
  if (pending) {
    const text = pending.length > MAX_IMAGES ? `the first ${MAX_IMAGES} of ${pending.length} images` : plural(pending.length, "image");
    about.append(...pending.slice(0, MAX_IMAGES).map((image) => thumbnail(image, pending)), el("span", {}, `Ask about ${text}`));
  } else if (!model && conversation.images.length) {
    about.append(el("span", {}, `Continues about ${plural(conversation.images.length, "image")}`));
  }
  about.hidden = !about.children.length;
}

/** Make a small image that opens large. */
function thumbnail(image, images, number = null) {
  const picture = el("img", { alt: "" });
  showThumbnail(picture, image.id, 256);
  const button = el("button", { type: "button", className: "thumb" }, picture);
  button.setAttribute("aria-label", number === null ? `Open ${image.name}` : `Source ${number}: ${image.name}`);
  button.title = image.name;
  if (number !== null) button.append(el("b", {}, String(number)));
  button.addEventListener("click", () => handlers.open(images, images.indexOf(image)));
  return button;
}

/** Write an answer; the numbers of sources in it open them. */
function writeAnswer(element, text, sources) {
  const parts = text.split(/(\[\d{1,3}\])/);
  element.replaceChildren(
    ...parts.map((part, index) => {
      const number = index % 2 ? Number(part.slice(1, -1)) : 0;
      if (number < 1 || number > sources.length) return part;
      const cite = el("button", { type: "button", className: "cite" }, String(number));
      cite.setAttribute("aria-label", `Source ${number}: ${sources[number - 1].name}`);
      cite.addEventListener("click", () => handlers.open(sources, number - 1));
      return cite;
    }),
  );
}

/** Ask, and show the answer as it comes. */
async function ask(text) {
  if (pending) conversation = begin(pending.slice(0, MAX_IMAGES));
  pending = null;
  const current = conversation;
  const asked = el("div", { className: "turn question" }, el("p", {}, text));
  if (attached.length) {
    asked.prepend(el("div", { className: "thumbs" }, ...attached.map((image) => el("img", { src: image.url, alt: image.name }))));
  }
  const turn = { question: text, answer: "", attached };
  attached = [];
  const body = el("p", { className: "text" });
  const thumbs = el("div", { className: "thumbs" });
  const answer = el("div", { className: "turn answer waiting" }, thumbs, body);
  $(".hint", log)?.remove();
  log.append(asked, answer);
  log.setAttribute("aria-busy", "true");
  drawAbout();
  toEnd();

  controller = new AbortController();
  setRunning(true);
  const write = () => {
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    writeAnswer(body, turn.answer, current.images);
    answer.classList.toggle("waiting", !turn.answer);
    if (atEnd) toEnd();
  };
  try {
    for await (const event of pieces(current, turn, controller.signal)) {
      if (event.sources) {
        current.images = event.sources;
        thumbs.replaceChildren(...event.sources.map((image, index) => thumbnail(image, event.sources, index + 1)));
      }
      if (event.text) turn.answer += event.text;
      write();
    }
    if (!turn.answer.trim()) body.textContent = "The model had nothing to say.";
  } catch (error) {
    if (error.name === "AbortError") {
      answer.append(el("p", { className: "note" }, "Stopped."));
    } else {
      const message = error instanceof RequestError ? error.message : LOST;
      answer.append(el("p", { className: "note error" }, message));
      if (!turn.answer) question.value ||= text; // to try again
    }
  } finally {
    // What was answered so far is what the next question follows.
    if (turn.answer.trim()) {
      current.turns.push(turn);
      current.attached.push(...turn.attached);
    }
    answer.classList.remove("waiting");
    log.setAttribute("aria-busy", "false");
    controller = null;
    setRunning(false);
    drawAbout();
    toEnd();
  }
}

/** Yield the events of an answer: sources once, then pieces of text. */
async function* pieces(current, turn, signal) {
  const path = model ? "/v1/chat/completions" : "/ask";
  let isComplete = false;
  for await (const event of stream(path, model ? chatBody(current, turn) : askBody(current, turn), signal)) {
    if (event.error) throw new RequestError(event.error.message || "The model could not answer.");
    isComplete ||= Boolean(model ? event.choices?.[0]?.finish_reason : event.done);
    if (model) yield { text: event.choices?.[0]?.delta?.content };
    else yield event;
  }
  // A proxy may end a stream in good order that the server did not end.
  if (!isComplete) throw new RequestError(LOST);
}

/** Return the body of a question about images of the collection. */
function askBody(current, turn) {
  const history = current.turns.slice(-8).map(({ question, answer }) => ({ question, answer }));
  return { question: turn.question, ids: current.images.map((image) => image.id), history, max_tokens: MAX_TOKENS };
}

/** Return the body of a chat about dropped images. */
function chatBody(current, turn) {
  const messages = [];
  for (const { question, answer, attached } of [...current.turns, turn]) {
    const images = attached.map((image) => ({ type: "image_url", image_url: { url: image.uri } }));
    messages.push({ role: "user", content: [...images, { type: "text", text: question }] });
    if (answer) messages.push({ role: "assistant", content: answer });
  }
  return { model, messages, stream: true, max_tokens: MAX_TOKENS, temperature: 0 };
}

function setRunning(running) {
  const hadFocus = [$("#send"), $("#stop")].includes(document.activeElement);
  $("#send").hidden = running;
  $("#stop").hidden = !running;
  if (hadFocus) (running ? $("#stop") : question).focus();
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

/** Let the box grow with what is written. */
function fit() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, 140)}px`;
}

$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || controller) return;
  question.value = "";
  fit();
  ask(text);
});
question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  // Not while a word is being composed, as in Japanese.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("#composer").requestSubmit();
  }
});
$("#stop").addEventListener("click", () => controller?.abort());
$("#chat-close").addEventListener("click", closeChat);
$("#chat-new").addEventListener("click", () => {
  controller?.abort();
  conversation = begin([]);
  log.replaceChildren();
  setImages(handlers.selection());
  drawHint();
  question.focus();
});
