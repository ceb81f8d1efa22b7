// Controls of films (player.js): play both ways, scrubber, speed, choice of row and colours, keyboard.
//
// new seddReel(box, films, {pinned, autoplay, keys}) fills the element `box`; the films, one or two, play together and end
// together. keys: the element whose key events are obeyed (the document, or the box itself by default).
const seddReel = (() => {
  "use strict";
  const LASTS = 8, FASTEST = 60, SLOWEST = 3;  // seconds that a film lasts, and limits of frames per second
  const ICONS = {
    play: "M6 4l14 8-14 8z", pause: "M6 4h4v16H6zM14 4h4v16h-4z", back: "M18 4L4 12l14 8z",
    first: "M5 4h3v16H5zM20 4v16L9 12z", last: "M16 4h3v16h-3zM4 4l11 8-11 8z",
  };
  const SVG = "http://www.w3.org/2000/svg";

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function icon(name) {
    const svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
    svg.setAttribute("viewBox", "0 0 24 24");
    svg.setAttribute("class", "icon");
    svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", ICONS[name]);
    svg.append(path);
    return svg;
  }

  function button(name, label, click) {
    const made = make("button", {type: "button", "aria-label": label, title: label}, icon(name));
    made.onclick = click;
    return made;
  }

  function choice(label, options, change) {
    const select = make("select", {"aria-label": label});
    for (const [value, text] of options) select.append(make("option", {value}, text));
    select.onchange = () => change(select.value);
    return [make("label", {}, label, select), select];
  }

  return class Reel {
    constructor(box, films, {pinned = false, autoplay = false, keys = box} = {}) {
      this.films = films;
      this.rate = 1;
      this.direction = 0;
      this.colours = films.some((film) => film.confident) ? "confidence" : "when";
      box.classList.toggle("pinned", pinned);
      box.replaceChildren(this.options(), this.stages(), this.transport());
      this.box = box;
      this.choose(0);
      this.paint(this.colours);
      keys.addEventListener("keydown", (event) => this.key(event));
      if (autoplay && !seddPlayer.still.matches) {
        this.seek(0);
        this.play(1);
      }
    }

    options() {
      const rows = Math.min(...this.films.map((film) => film.rows.length));
      const names = this.films[0].rows.slice(0, rows).map((row, number) => [number, row.name]);
      const [rowLabel, row] = choice("row", names, (value) => this.choose(+value));
      const speeds = [0.25, 0.5, 1, 2, 4].map((rate) => [rate, `${rate}\u00d7`]);
      const [speedLabel, speed] = choice("speed", speeds, (value) => { this.rate = +value; this.note(); });
      const colours = [["confidence", "confidence"], ["when", "step of the change"], ["none", "nothing"]];
      const [colourLabel, colour] = choice(
        "colour by", this.films.some((film) => film.confident) ? colours : colours.slice(1), (value) => this.paint(value),
      );
      speed.value = "1";
      [this.rowSelect, this.speedSelect, this.colourSelect] = [row, speed, colour];
      rowLabel.hidden = rows < 2;
      this.scale = make("div", {class: "scale"});
      return make("div", {class: "options"}, rowLabel, speedLabel, colourLabel, this.scale);
    }

    stages() {
      const roads = make("div", {class: "roads"});
      this.views = this.films.map((film) => {
        const stage = make("div", {class: "tokens", role: "group", "aria-label": film.label || "tokens"});
        const label = make("p", {}, make("b", {}, film.label));
        if (film.note) label.append(` ${film.note}`);
        roads.append(make("div", {class: "road"}, ...(film.label || film.note ? [label] : []), stage));
        return new seddPlayer.TokenView(stage);
      });
      return roads;
    }

    transport() {
      this.back = button("back", "play backwards", () => this.toggle(-1));
      this.forward = button("play", "play", () => this.toggle(1));
      this.forward.className = "main";
      this.slider = make("input", {type: "range", min: 0, max: 0, value: 0, step: 1, "aria-label": "step"});
      this.slider.oninput = () => { this.stop(); this.seek(+this.slider.value); };
      this.activity = document.createElementNS(SVG, "svg");
      this.activity.setAttribute("class", "activity");
      this.activity.setAttribute("preserveAspectRatio", "none");
      this.activity.setAttribute("aria-hidden", "true");
      this.activity.append(document.createElementNS(SVG, "path"));
      this.output = make("output");
      const ends = [button("first", "first step", () => this.jump(0)), button("last", "last step", () => this.jump(this.last))];
      return make(
        "div", {class: "transport", role: "group", "aria-label": "player"},
        make("div", {class: "buttons"}, ends[0], this.back, this.forward, ends[1]),
        make("div", {class: "track"}, this.activity, this.slider), this.output,
      );
    }

    // Show another row of all films, at the same share of its steps.
    choose(number) {
      const share = this.rows ? this.at / Math.max(1, this.last) : 1;
      this.rows = this.films.map((film) => new seddPlayer.Row(film, number));
      this.last = Math.max(...this.rows.map((row) => row.length)) - 1;
      this.pace = Math.min(FASTEST, Math.max(SLOWEST, this.last / LASTS));
      this.rowSelect.value = String(number);
      this.slider.max = this.last;
      this.draw();
      this.seek(Math.round(share * this.last));
    }

    // Draw how many tokens change in each step.
    draw() {
      const row = this.rows[0], counts = row.changes.slice(1), bins = Math.min(160, counts.length), sums = [];
      for (let i = 0; i < bins; i++) {
        const part = counts.slice(Math.floor((i * counts.length) / bins), Math.floor(((i + 1) * counts.length) / bins));
        sums.push(Math.max(...part, 0));
      }
      const top = Math.max(...sums, 1);
      this.activity.setAttribute("viewBox", `0 0 ${Math.max(1, bins)} 1`);
      this.activity.firstChild.setAttribute("d", sums.map((sum, i) => {
        const height = Math.sqrt(sum / top);
        return `M${i + 0.1} 1v${-height.toFixed(3)}h.8v${height.toFixed(3)}z`;
      }).join(""));
    }

    frameOf(row, number) {
      return Math.round((number / Math.max(1, this.last)) * (row.length - 1));
    }

    seek(number, glide = 0) {
      this.at = Math.min(this.last, Math.max(0, number));
      this.rows.forEach((row, i) => this.views[i].show(row, this.frameOf(row, this.at), glide));
      this.slider.value = this.at;
      this.note();
    }

    note() {
      const row = this.rows[0], steps = this.films[0].steps, now = this.frameOf(row, this.at);
      const seconds = (frames) => (frames / this.pace / this.rate).toFixed(1);
      const step = `step ${steps[now]} of ${steps[row.length - 1]}`, masks = row.masks(now);
      const tokens = row.frames[now].ids.length;
      const left = row.mask >= 0 ? `${masks} of ${tokens} masked` : `${tokens} tokens`;
      this.output.replaceChildren(
        make("b", {}, step), make("br"), make("span", {}, left), " \u00b7 ", make("span", {}, `${seconds(this.at)} of ${seconds(this.last)} s`),
      );
      this.slider.setAttribute("aria-valuetext", `${step}, ${left}`);
    }

    paint(colours) {
      this.colours = this.colourSelect.value = colours;
      for (const view of this.views) view.element.dataset.colours = colours;
      const letter = colours === "confidence" ? "c" : "w", ramp = make("span", {"aria-hidden": "true"});
      for (let i = 0; i < 10; i++) ramp.append(make("i", {class: letter + i}));
      this.scale.hidden = colours === "none";
      this.scale.replaceChildren(...(colours === "confidence" ? ["0 %", ramp, "100 % sure"] : ["early", ramp, "late"]));
    }

    stop() {
      cancelAnimationFrame(this.request);
      this.direction = 0;
      this.mark();
    }

    mark() {
      for (const [button, direction, name, label] of [[this.forward, 1, "play", "play"], [this.back, -1, "back", "play backwards"]]) {
        const running = this.direction === direction;
        button.replaceChildren(icon(running ? "pause" : name));
        for (const attribute of ["aria-label", "title"]) button.setAttribute(attribute, running ? "pause" : label);
      }
    }

    toggle(direction) {
      if (this.direction === direction) this.stop();
      else this.play(direction);
    }

    play(direction) {
      this.stop();
      if (this.last < 1) return;
      const end = direction > 0 ? this.last : 0;
      if (this.at === end) this.seek(this.last - end);
      this.direction = direction;
      this.mark();
      let place = this.at, before = null;
      const tick = (now) => {
        place += direction * this.pace * this.rate * (before === null ? 0 : Math.min(0.25, (now - before) / 1000));
        before = now;
        const next = direction > 0 ? Math.floor(place) : Math.ceil(place);
        if (next !== this.at) this.seek(next, Math.min(320, 2500 / (this.pace * this.rate)));
        if (this.at === end) this.stop();
        else this.request = requestAnimationFrame(tick);
      };
      this.request = requestAnimationFrame(tick);
    }

    jump(number) {
      this.stop();
      this.seek(number);
    }

    step(by) {
      this.stop();
      this.seek(this.at + by, Math.abs(by) === 1 ? 250 : 0);
    }

    shift(select, by) {
      const next = select.selectedIndex + by;
      if (next < 0 || next >= select.options.length) return;
      select.selectedIndex = next;
      select.onchange();
    }

    key(event) {
      const target = event.target;
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || target.closest("dialog, textarea")) return;
      const typing = target.matches("select, input:not([type=range])"), pressing = target.matches("button, summary, a, select");
      const moves = {
        ArrowRight: () => this.step(event.shiftKey ? 10 : 1), ArrowLeft: () => this.step(event.shiftKey ? -10 : -1),
        ArrowDown: () => this.shift(this.rowSelect, 1), ArrowUp: () => this.shift(this.rowSelect, -1),
        Home: () => this.jump(0), End: () => this.jump(this.last),
        "+": () => this.shift(this.speedSelect, 1), "-": () => this.shift(this.speedSelect, -1),
        b: () => this.toggle(-1), c: () => this.shift(this.colourSelect, this.colourSelect.selectedIndex + 1 < this.colourSelect.options.length ? 1 : -this.colourSelect.selectedIndex),
        " ": pressing ? undefined : () => (this.direction ? this.stop() : this.play(1)),
      };
      const other = target !== this.slider && target.matches("input[type=range]");
      if (typing || (other && event.key !== " ") || moves[event.key] === undefined) return;
      event.preventDefault();
      moves[event.key]();
    }
  };
})();
