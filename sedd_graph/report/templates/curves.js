// Values of curves under the pointer, by touch, and by keyboard (left, right, home, end).
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";

  function read(line) {
    const values = line.dataset.values.split(" ").map((text) => text.split(","));
    const places = line.getAttribute("points").split(" ").map((text) => text.split(",").map(Number));
    const colour = line.getAttribute("stroke");
    return {label: line.dataset.label, colour, points: places.map(([x, y], i) => ({x, y, step: values[i][0], value: values[i][1]}))};
  }

  function nearest(points, x) {
    let best = points[0];
    for (const point of points) if (Math.abs(point.x - x) < Math.abs(best.x - x)) best = point;
    return best;
  }

  for (const svg of document.querySelectorAll("svg.curve[data-over]")) {
    const lines = [...svg.querySelectorAll("polyline")].map(read), output = svg.parentElement.querySelector("output");
    const stops = [...new Set(lines.flatMap((line) => line.points.map((point) => point.x)))].sort((a, b) => a - b);
    const width = svg.viewBox.baseVal.width, height = svg.viewBox.baseVal.height;
    const drawn = document.createElementNS(SVG, "g");
    let at = stops.length - 1;
    if (!stops.length) continue;
    svg.append(drawn);
    svg.setAttribute("tabindex", "0");

    function add(name, attributes) {
      const element = document.createElementNS(SVG, name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      drawn.append(element);
    }

    function show(x) {
      const found = lines.map((line) => [line, nearest(line.points, x)]);
      const close = Math.min(...found.map(([, point]) => Math.abs(point.x - x)));
      const shown = found.filter(([, point]) => Math.abs(point.x - x) <= close + 12);
      const first = shown.find(([, point]) => Math.abs(point.x - x) === close)[1];
      at = stops.indexOf(first.x);
      drawn.replaceChildren();
      add("line", {class: "guide", x1: first.x, x2: first.x, y1: 6, y2: height - 28});
      output.replaceChildren(`${svg.dataset.over} ${Number(first.step).toLocaleString("en")}: `);
      shown.forEach(([line, point], i) => {
        add("circle", {class: "at", cx: point.x, cy: point.y, r: 4.5, fill: line.colour});
        const value = document.createElement("b");
        value.textContent = point.value.replace("\u00b1", " \u00b1 ");
        const step = point.step === first.step ? "" : ` (at ${Number(point.step).toLocaleString("en")})`;
        output.append(i ? ", " : "", lines.length > 1 ? `${line.label} ` : "", value, step);
      });
    }

    function hide() {
      drawn.replaceChildren();
      output.replaceChildren();
    }

    function point(event) {
      const box = svg.getBoundingClientRect();
      show(((event.clientX - box.left) / box.width) * width);
    }

    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && document.activeElement !== svg) hide(); });
    svg.addEventListener("focus", () => { if (!drawn.childElementCount) show(stops[at]); });
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const next = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: stops.length - 1}[event.key];
      if (next === undefined) return;
      event.preventDefault();
      show(stops[Math.min(stops.length - 1, Math.max(0, next))]);
    });
  }
})();
