// Heat maps (JSON, made by sedd_graph/report/heat.py): a map of a port at a training step, on a canvas.
const seddHeat = (() => {
  "use strict";
  const MISSING = 255;

  function colour(name) {
    const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const long = text.length === 4 ? [...text.slice(1)].map((digit) => digit + digit).join("") : text.slice(1, 7);
    return [0, 2, 4].map((at) => parseInt(long.slice(at, at + 2), 16));
  }

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  return class Heat {
    constructor(box, ports) {
      this.ports = ports;
      this.select = make("select", {}, ...ports.map((port, i) => make("option", {value: i}, port.name)));
      this.slider = make("input", {type: "range", min: 0, value: 0, "aria-label": "record"});
      this.canvas = make("canvas", {role: "img", tabindex: 0});
      this.output = make("output");
      this.ends = [make("span"), make("span")];
      this.select.onchange = () => this.choose();
      this.slider.oninput = () => this.draw();
      this.canvas.onpointermove = (event) => this.point(event);
      this.canvas.onpointerleave = () => this.note();
      const scale = make("span", {class: "scale"}, this.ends[0], make("i", {class: "ramp", "aria-hidden": "true"}), this.ends[1]);
      const options = make(
        "div", {class: "options"}, make("label", {}, "port", this.select), make("label", {}, "record", this.slider), scale,
      );
      box.replaceChildren(options, this.canvas, this.output);
      this.choose();
    }

    choose() {
      this.port = this.ports[+this.select.value];
      const text = atob(this.port.values);
      this.values = Uint8Array.from(text, (character) => character.charCodeAt(0));
      this.slider.max = this.port.steps.length - 1;
      this.slider.value = this.slider.max;
      this.slider.parentElement.hidden = this.port.steps.length < 2;
      this.ends[0].textContent = (-this.port.limit).toPrecision(2);
      this.ends[1].textContent = this.port.limit.toPrecision(2);
      this.draw();
    }

    draw() {
      const {height, width} = this.port, low = colour("--low"), zero = colour("--zero"), high = colour("--high");
      Object.assign(this.canvas, {width, height});
      const context = this.canvas.getContext("2d"), image = context.createImageData(width, height);
      const offset = +this.slider.value * height * width;
      for (let i = 0; i < height * width; i++) {
        const value = this.values[offset + i], share = (value - 127) / 127, end = share < 0 ? low : high;
        for (let k = 0; k < 3; k++) image.data[4 * i + k] = value === MISSING ? 128 : zero[k] + Math.abs(share) * (end[k] - zero[k]);
        image.data[4 * i + 3] = 255;
      }
      context.putImageData(image, 0, 0);
      this.note();
    }

    note(more = "") {
      const {name, steps, axes} = this.port, [tall, wide, kind] = axes;
      const text = `${name} at training step ${steps[+this.slider.value]}: ${tall} ${kind}s down, ${wide} features across`;
      this.output.textContent = more || text;
      this.canvas.setAttribute("aria-label", `heat map of ${text}`);
    }

    point(event) {
      const {height, width, limit, axes} = this.port, box = this.canvas.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width) * width), y = Math.floor(((event.clientY - box.top) / box.height) * height);
      if (x < 0 || y < 0 || x >= width || y >= height) return;
      const value = this.values[(+this.slider.value * height + y) * width + x];
      const shown = value === MISSING ? "not finite" : `${(((value - 127) / 127) * limit).toPrecision(3)}${value === 0 || value === 254 ? " or beyond" : ""}`;
      const range = (at, cells, size) => {
        const from = Math.floor((at * size) / cells), to = Math.floor(((at + 1) * size) / cells) - 1;
        return from >= to ? `${from}` : `${from} to ${to}`;
      };
      this.note(`${axes[2]} ${range(y, height, axes[0])}, feature ${range(x, width, axes[1])}: ${shown}`);
    }
  };
})();
