// What is searched for, in the page's address, so that Back and bookmarks work.

const NAMES = ["query", "like", "exclude", "after", "before", "folder", "min_width", "min_height", "min_score", "sort"];
export const FILTERS = ["exclude", "after", "before", "folder", "min_width", "min_height", "min_score"];
const NUMBERS = ["min_width", "min_height", "min_score"];
const images = new Map(); // dropped images by number: an address cannot hold them
let number = 0;

/** Keep a dropped image, and return what the address calls it. */
export function keepImage(image) {
  images.set(String(++number), image);
  return String(number);
}

export const keptImage = (name) => images.get(name) ?? null;

/** Read a query from the page's address. */
export function readAddress() {
  const parameters = new URLSearchParams(location.search);
  const query = {};
  for (const name of [...NAMES, "image"]) if (parameters.get(name)) query[name] = parameters.get(name);
  if (query.image && !images.has(query.image)) delete query.image; // of an earlier visit
  return query;
}

/** Return the address of a query. */
export function addressOf(query) {
  const parameters = new URLSearchParams();
  for (const name of [...NAMES, "image"]) if (query[name]) parameters.set(name, query[name]);
  return parameters.size ? `/?${parameters}` : "/";
}

/** Return the body of a search. */
export function searchBody(query, k) {
  const body = { k };
  for (const name of NAMES) if (query[name]) body[name] = NUMBERS.includes(name) ? Number(query[name]) : query[name];
  if (query.image) body.image = images.get(query.image).uri;
  return body;
}

export const isSearch = (query) => Boolean(query.query || query.like || query.image);
