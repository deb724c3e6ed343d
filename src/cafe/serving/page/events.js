// Server-sent events of a response. EventSource cannot send a body, so they are parsed here.

/** Yield the data of each event; chunks may be cut anywhere, also within a character or a line's end. */
export async function* parseEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      buffer += decoder.decode(value, { stream: !done });
      for (;;) {
        const end = /\r\n|\n|\r/.exec(buffer);
        // A carriage return at the end may be the first half of a line's end.
        if (!end || (end[0] === "\r" && end.index === buffer.length - 1 && !done)) break;
        const line = buffer.slice(0, end.index);
        buffer = buffer.slice(end.index + end[0].length);
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) return; // what has no empty line behind it is not complete
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
