// Plays trajectories, forwards and backwards. Data of a film: its roads, which play together, each with a label, words (null is
// the mask), the first frame, and the changes of each later one.
for (const box of document.querySelectorAll(".reel")) {
  const roads = JSON.parse(box.querySelector("script").textContent);
  const slide = box.querySelector("input"), at = box.querySelector("span");
  const [forward, backward] = box.querySelectorAll("button");
  const views = [...box.querySelectorAll(".film")];
  const films = roads.map((road) => {
    const frames = [road.first];
    for (const changes of road.changes) {
      const next = frames[frames.length - 1].slice();
      for (const [place, word] of changes) next[place] = word;
      frames.push(next);
    }
    return frames;
  });
  const last = Math.max(...films.map((frames) => frames.length)) - 1;
  let timer = null;

  // roads of different lengths end together
  const frameOf = (frames, number) => Math.round((number / Math.max(1, last)) * (frames.length - 1));

  function show(number, from) {
    films.forEach((frames, road) => {
      const here = frameOf(frames, number), now = frames[here];
      const before = frames[Math.min(frames.length - 1, Math.max(0, here + (from < 0 ? 3 : -3)))];
      views[road].replaceChildren(...now.map((word, place) => {
        const text = roads[road].words[word];
        if (text !== null && before[place] === word) return document.createTextNode(text);
        const element = document.createElement(text === null ? "i" : "u");
        element.textContent = text === null ? "\u2588" : text;
        return element;
      }));
    });
    slide.value = number;
    const steps = roads[0].steps;
    at.textContent = "step " + steps[frameOf(films[0], number)] + " of " + steps[steps.length - 1];
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    forward.textContent = "play";
    backward.textContent = "backwards";
  }

  function play(button, by) {
    const running = timer && button.textContent === "pause";
    stop();
    if (running) return;
    const end = by > 0 ? last : 0;
    if (+slide.value === end) show(last - end, by);
    button.textContent = "pause";
    timer = setInterval(() => (+slide.value === end ? stop() : show(+slide.value + by, by)), 70);
  }

  forward.onclick = () => play(forward, 1);
  backward.onclick = () => play(backward, -1);
  slide.oninput = () => { stop(); show(+slide.value, 1); };
  slide.max = last;
  show(last, 1);
  for (const view of views) view.style.minHeight = view.offsetHeight + "px";  // the content below does not move
}
