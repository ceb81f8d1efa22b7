// Rows of tokens that change step by step.
//
// A film (JSON, made by sedd_graph/report/film.py):
//   {label, words, mask, steps, confident, rows: [{name, frames}]}
//   words      text of each symbol; an array of bytes where they are no whole UTF-8 text; null for a token without text
//   mask       the symbol of the mask, or -1
//   steps      the sampler's step of each frame
//   confident  whether changes hold confidences
//   frames     base64 of unsigned LEB128 integers. Each frame: the number of its changes, and of each change
//              4 * (tokens to skip) + (0 replace, 1 insert, 2 delete), then, unless it deletes, the symbol, and, if confident, one
//              byte: 254 times the probability that the model gave the token, or 255 if it is not known. The first
//              frame changes the empty row.
//
// Usage, of a film:            const row = new seddPlayer.Row(film, 0), view = new seddPlayer.TokenView(element);
//                              view.show(row, 17);
// and of frames as they come:  view.feed(["The", null, " cat"], [0.9, null, 0.4]);   // null: a mask; unknown
// An element needs the class "tokens"; its attribute data-colours is "confidence", "when" or "none".
const seddPlayer = (() => {
  "use strict";
  const REPLACE = 0, INSERT = 1, UNKNOWN = 255, NEW = 3, SLIDES = 120, MASK = -1;
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  function bytesOf(base64) {
    const text = atob(base64), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  // One row of a film. frames[i] has, for each token, ids (the same as long as the token is neither deleted nor inserted), symbols,
  // confidences (0 to 254, or 255) and since: the frame in which the token last changed.
  class Row {
    constructor(film, number) {
      this.film = film;
      this.frames = [];
      this.changes = [];
      this.mask = film.mask;
      const bytes = bytesOf(film.rows[number].frames);
      let at = 0, made = 0, now = {ids: [], symbols: [], sure: [], since: []};
      const integer = () => {
        let value = 0, scale = 1, byte;
        do {
          byte = bytes[at++];
          value += (byte & 127) * scale;
          scale *= 128;
        } while (byte > 127);
        return value;
      };
      while (at < bytes.length) {
        const number = this.frames.length, next = {ids: [], symbols: [], sure: [], since: []};
        const keep = (from, to) => {
          for (const key in next) for (let i = from; i < to; i++) next[key].push(now[key][i]);
        };
        let place = 0, moved = false;
        const count = integer();
        for (let i = 0; i < count; i++) {
          const code = integer(), op = code % 4, skip = (code - op) / 4;
          keep(place, place + skip);
          place += skip;
          if (op === REPLACE || op === INSERT) {
            next.symbols.push(integer());
            next.sure.push(film.confident ? bytes[at++] : UNKNOWN);
            next.since.push(number);
            next.ids.push(op === INSERT ? made++ : now.ids[place]);
          }
          if (op !== INSERT) place++;
          moved = moved || op !== REPLACE;
        }
        keep(place, now.ids.length);
        if (!moved) next.ids = now.ids;
        this.frames.push(now = next);
        this.changes.push(count);
      }
    }

    get length() { return this.frames.length; }

    // tokens of a frame that are masks
    masks(number) {
      let count = 0;
      for (const symbol of this.frames[number].symbols) count += symbol === this.mask;
      return count;
    }
  }

  // Shows one frame at a time in an element; touches only the spans that change.
  class TokenView {
    constructor(element) {
      this.element = element;
      this.reset();
      element.addEventListener("pointerover", (event) => this.explain(event.target));
    }

    reset() {
      this.spans = new Map();  // by id
      this.order = [];         // ids as shown
      this.fresh = new Set();  // entries with the class "new"
      this.words = [];
      this.own = null;
      this.element.replaceChildren();
    }

    // The text of a mask is as wide as a usual word.
    use(words, mask) {
      this.words = words;
      this.maskSymbol = mask;
      let length = 0, count = 0;
      words.forEach((word, symbol) => {
        if (typeof word === "string" && symbol !== mask) { length += Math.min(8, word.length); count++; }
      });
      this.blank = "\u00a0".repeat(Math.max(1, Math.min(4, Math.round(length / Math.max(1, count))))) + "\u200b";
    }

    // Show frame `number` of a row; `glide`: milliseconds in which tokens slide to their new places, 0 for none.
    show(row, number, glide = 0) {
      if (this.own !== row) {
        this.reset();
        this.own = row;
        this.use(row.film.words, row.mask);
      }
      this.draw(row.frames[number], number, row.length - 1, glide);
    }

    // Show words (null: a mask) with their confidences (0 to 1; null: not known) as the next frame.
    feed(words, confidences = [], glide = 0) {
      if (this.own !== this) {
        this.reset();
        this.own = this;
        this.number = this.made = 0;
        this.symbols = new Map();
        this.table = [];
        this.last = {ids: [], symbols: [], sure: [], since: []};
      }
      const symbols = words.map((word) => {
        if (word === null) return MASK;
        if (!this.symbols.has(word)) { this.symbols.set(word, this.table.length); this.table.push(word); }
        return this.symbols.get(word);
      });
      this.use(this.table, MASK);
      const was = this.last, same = symbols.length === was.symbols.length;
      let head = 0, tail = 0;  // of a row whose length changes, the equal ends keep their places
      const most = same ? 0 : Math.min(symbols.length, was.symbols.length);
      while (head < most && symbols[head] === was.symbols[head]) head++;
      while (tail < most - head && symbols[symbols.length - 1 - tail] === was.symbols[was.symbols.length - 1 - tail]) tail++;
      const next = {ids: [], symbols, sure: [], since: []};
      symbols.forEach((symbol, i) => {
        const old = same || i < head ? i : i >= symbols.length - tail ? i - symbols.length + was.symbols.length : -1;
        const sure = confidences[i] == null ? UNKNOWN : Math.round(254 * confidences[i]);
        next.ids.push(old < 0 ? this.made++ : was.ids[old]);
        next.sure.push(sure);
        next.since.push(old >= 0 && was.symbols[old] === symbol ? was.since[old] : this.number);
      });
      this.last = next;
      this.draw(next, this.number++, null, glide);
    }

    draw(frame, number, end, glide) {
      const {ids, symbols, sure, since} = frame, touched = [];
      const moves = ids.length !== this.order.length || ids.some((id, i) => id !== this.order[i]);
      const slide = moves && glide > 0 && !still.matches && this.order.length > 0;
      const before = slide ? this.places() : null;
      if (moves) this.arrange(ids, slide ? glide : 0);
      for (let i = 0; i < ids.length; i++) {
        const entry = this.spans.get(ids[i]);
        if (entry.symbol !== symbols[i]) {
          entry.symbol = symbols[i];
          touched.push(i);
        }
        const when = end === null ? 9 : Math.round((9 * since[i]) / Math.max(1, end));
        const fresh = since[i] > 0 && number - since[i] < NEW && entry.symbol !== this.maskSymbol;
        entry.since = since[i];
        const look = (sure[i] << 8) | (when << 4) | (fresh << 1) | (symbols[i] === this.maskSymbol);
        if (entry.look !== look) {
          entry.look = look;
          entry.span.className = this.classOf(symbols[i], sure[i], when, fresh);
        }
      }
      this.order = ids;
      this.spell(touched, symbols, moves);
      if (slide) this.slide(before, glide);
    }

    classOf(symbol, sure, when, fresh) {
      if (symbol === this.maskSymbol) return "m";
      const word = this.words[symbol];
      const level = sure === UNKNOWN ? "" : ` c${Math.min(9, Math.floor(10 * Math.sqrt(sure / 254)))}`;
      const blank = typeof word === "string" && word.trim() === "" && word.includes("\n");  // a ring around nothing
      return `${word === null ? "x" : "t"}${level} w${when}${fresh && !blank ? " new" : ""}`;
    }

    // Say of the token under the pointer what is known of it.
    explain(span) {
      for (const entry of this.spans.values()) {
        if (entry.span !== span || entry.look === null) continue;
        const sure = entry.look >> 8, parts = [];
        if (sure !== UNKNOWN && !(entry.look & 1)) parts.push(`probability ${(sure / 254).toFixed(sure < 26 ? 3 : 2)}`);
        if (this.own?.film && entry.since > 0) parts.push(`since step ${this.own.film.steps[entry.since]}`);
        span.title = parts.join(", ");
      }
    }

    // Create, move and remove spans so that they are those of `ids`, in this order.
    arrange(ids, glide) {
      const wanted = new Set(ids);
      for (const [id, entry] of this.spans) {
        if (wanted.has(id)) continue;
        this.spans.delete(id);
        if (glide) this.fade(entry.span, glide);
        entry.span.remove();
      }
      let next = this.element.firstChild;
      for (const id of ids) {
        let entry = this.spans.get(id);
        if (entry === undefined) {
          entry = {span: document.createElement("span"), symbol: null, look: null, since: 0, slide: null};
          this.spans.set(id, entry);
          if (glide) entry.span.animate([{opacity: 0}, {opacity: 1}], {duration: glide});
        }
        while (next !== null && next.classList.contains("gone")) next = next.nextSibling;
        if (entry.span === next) next = next.nextSibling;
        else this.element.insertBefore(entry.span, next);
      }
    }

    // Leave a deleted token where it was, and let it fade.
    fade(span, glide) {
      if (this.element.querySelectorAll(".gone").length > 60) return;
      const ghost = span.cloneNode(true);
      ghost.className = "gone";
      ghost.setAttribute("aria-hidden", "true");
      ghost.style.left = `${span.offsetLeft}px`;
      ghost.style.top = `${span.offsetTop}px`;
      this.element.append(ghost);
      ghost.animate([{opacity: 0.9}, {opacity: 0}], {duration: glide}).onfinish = () => ghost.remove();
    }

    places() {
      this.element.classList.add("moving");
      const found = new Map();
      for (const id of this.order) {
        const span = this.spans.get(id).span;
        found.set(id, [span.offsetLeft, span.offsetTop]);
      }
      return found;
    }

    // Tokens slide along their line to their new places; a token that has changed its line appears there.
    slide(before, glide) {
      for (const id of this.order) this.spans.get(id).slide?.cancel();
      const moved = [];
      for (const id of this.order) {
        const was = before.get(id);
        if (was === undefined) continue;
        const entry = this.spans.get(id), left = was[0] - entry.span.offsetLeft;
        if (was[1] === entry.span.offsetTop && Math.abs(left) > 0.5) moved.push([entry, left]);
      }
      for (const [entry, left] of moved.slice(0, SLIDES)) {
        entry.slide = entry.span.animate([{left: `${left}px`}, {left: "0px"}], {duration: glide, easing: "ease-out"});
        entry.slide.onfinish = () => { entry.slide = null; };
      }
    }

    // Write the text of tokens. Bytes of neighbours that form a character together stand in the first of them.
    spell(touched, symbols, moved) {
      const done = new Set();
      const partial = (i) => Array.isArray(this.words[symbols[i]]);
      const places = moved ? symbols.keys() : touched;
      const set = (i, text) => {
        const span = this.spans.get(this.order[i]).span;
        if (span.textContent !== text) span.textContent = text;
      };
      for (const i of places) {
        if (!partial(i)) set(i, this.textOf(symbols[i]));
        for (const near of [i - 1, i, i + 1]) {
          if (near < 0 || near >= symbols.length || done.has(near) || !partial(near)) continue;
          let first = near, last = near;
          while (first > 0 && partial(first - 1)) first--;
          while (last + 1 < symbols.length && partial(last + 1)) last++;
          joined(symbols.slice(first, last + 1).map((symbol) => this.words[symbol]))
            .forEach((text, k) => { done.add(first + k); set(first + k, text); });
        }
      }
    }

    textOf(symbol) {
      if (symbol === this.maskSymbol) return this.blank;
      return this.words[symbol] ?? "\u220e";
    }
  }

  // Texts of tokens whose bytes are decoded together: each character is in the token of its first byte.
  function joined(tokens) {
    const texts = tokens.map(() => ""), owner = [], bytes = [];
    tokens.forEach((token, k) => token.forEach((byte) => { owner.push(k); bytes.push(byte); }));
    const decoder = new TextDecoder();
    for (let at = 0; at < bytes.length;) {
      const lead = bytes[at], size = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
      let text = decoder.decode(new Uint8Array(bytes.slice(at, at + size)));
      const whole = !text.includes("\ufffd") || (size === 3 && bytes[at + 1] === 0xbf && bytes[at + 2] === 0xbd);
      if (!whole) text = "\ufffd";
      texts[owner[at]] += text;
      at += whole ? size : 1;
    }
    return texts;
  }

  return {Row, TokenView, still};
})();
