// Plays the trajectory of one sample. Data: words (null is the mask), the first frame, and the changes of each later one.
const film = JSON.parse(document.getElementById("film-data").textContent);
const view = document.getElementById("film"), slide = document.getElementById("slide");
const play = document.getElementById("play"), at = document.getElementById("at");
const frames = [film.first];
for (const changes of film.changes) {
  const next = frames[frames.length - 1].slice();
  for (const [place, word] of changes) next[place] = word;
  frames.push(next);
}
const last = frames.length - 1;
let timer = null;

function show(number) {
  const now = frames[number], before = frames[Math.max(0, number - 3)];
  view.replaceChildren(...now.map((word, place) => {
    const text = film.words[word];
    if (text !== null && before[place] === word) return document.createTextNode(text);
    const element = document.createElement(text === null ? "i" : "u");
    element.textContent = text === null ? "\u2588" : text;
    return element;
  }));
  slide.value = number;
  at.textContent = "step " + film.steps[number] + " of " + film.steps[last];
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "play";
}

play.onclick = () => {
  if (timer) return stop();
  if (+slide.value >= last) show(0);
  play.textContent = "pause";
  timer = setInterval(() => (+slide.value >= last ? stop() : show(+slide.value + 1)), 70);
};
slide.oninput = () => { stop(); show(+slide.value); };
slide.max = last;
show(last);
view.style.minHeight = view.offsetHeight + "px";  // the content below does not move while the film plays
