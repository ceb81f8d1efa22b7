// The page of `sedd-graph serve`: a text with holes, an answer that fills in, a pinned one beside it, and what was asked before.
// All text of users and of the model is put into the page as text (textContent), never as HTML.
(() => {
  "use strict";
  const at = (id) => document.getElementById(id), FIELDS = ["sampler", "steps", "temperature", "top_p", "max_tokens", "seed", "matching", "forbid"];
  const FRAMES = 2000, REPLAY_MS = 6000, KEPT = 100, HOLE = /\[\[\s*\d*\s*\]\]/;
  const NAMES = {top_p: "top-p", max_tokens: "new tokens", matching: "matches", forbid: "never"};
  let known = null, running = null, current = null, pinned = null;
  const past = [];

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function button(label, title, click) {
    const made = make("button", {type: "button", class: "plain", title}, label);
    made.onclick = click;
    return made;
  }

  // -- errors ----------------------------------------------------------------------------------------------------------

  class Failure extends Error {
    constructor(message, param = null, status = 0) {
      super(message);
      this.param = param;
      this.status = status;
    }
  }

  async function failureOf(response) {
    let told = null;
    try { told = (await response.json()).error; } catch { /* no JSON: the status says what there is to say */ }
    return new Failure(told?.message ?? `the server answered ${response.status} ${response.statusText}`, told?.param, response.status);
  }

  function complain(error) {
    const box = at("alert");
    for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    box.hidden = error === null;
    if (error === null) return;
    const plain = error instanceof TypeError ? "the server cannot be reached: is it still running?" : error.message;
    const text = plain.charAt(0).toUpperCase() + plain.slice(1);
    const name = String(error.param ?? "").split(/[.[]/)[0];
    box.replaceChildren(make("b", {}, "This did not work. "), /[.!?]$/.test(text) ? text : `${text}.`);
    if (["prompt", ...FIELDS].includes(name)) at(name).setAttribute("aria-invalid", "true");
    if (FIELDS.includes(name)) at("settings").open = true;
    if (error.status === 401) {
      at("keybox").hidden = false;
      at("key").focus();
    }
    box.scrollIntoView({block: "nearest"});
  }

  function headers() {
    const key = at("key").value.trim();
    return {"content-type": "application/json", ...(key ? {authorization: `Bearer ${key}`} : {})};
  }

  // -- an answer -------------------------------------------------------------------------------------------------------

  // One answer, in one of the two panels: its text as it is written, the facts of its run, and what may be done with it.
  class Answer {
    constructor(asked, prompt) {
      this.asked = asked;
      this.prompt = prompt;
      this.frames = [];
      this.given = new Set();
      this.text = "";
      this.filled = null;
      this.state = "running";
      this.began = performance.now();
      this.step = 0;
      this.seed = asked.seed ?? null;
      this.tokens = null;
    }

    get facts() {
      const found = {};
      for (const name of FIELDS) {
        const value = name === "seed" ? this.seed : this.asked[name];
        if (value !== undefined && value !== null) found[name] = Array.isArray(value) ? value.join(", ") : String(value);
      }
      return found;
    }

    // The parts of the final text: [text, whether the model wrote it].
    get parts() {
      const filled = this.filled ?? [];
      const around = HOLE.test(this.prompt) ? this.prompt.split(new RegExp(HOLE, "g")) : [this.prompt, ""];
      const parts = [];
      around.forEach((text, i) => {
        parts.push([text, false]);
        if (i + 1 < around.length) parts.push([filled[i] ?? "", true]);
      });
      const whole = parts.map((part) => part[0]).join("");
      const text = this.whole;
      return around.length === filled.length + 1 && whole === text ? parts : [[text, true]];
    }

    get whole() { return HOLE.test(this.prompt) ? this.text : this.prompt + this.text; }
  }

  class Panel {
    constructor(element, title) {
      this.element = element;
      this.title = make("b", {}, title);
      this.meter = make("span", {class: "meter"});
      this.line = make("i");
      this.tokens = make("div", {class: "tokens", "data-colours": "confidence", "data-empty": "The answer appears here."});
      this.tokens.tabIndex = 0;
      this.view = new seddPlayer.TokenView(this.tokens);
      this.facts = make("ul", {class: "facts"});
      this.foot = make("div", {class: "foot"});
      this.track = make("div", {class: "track", "aria-hidden": "true"}, this.line);
      element.append(make("div", {class: "head"}, this.title, this.meter), this.track, this.tokens, this.facts, this.foot);
      this.answer = null;
      this.timer = 0;
    }

    show(answer) {
      cancelAnimationFrame(this.timer);
      this.answer = answer;
      this.view.reset();
      this.paint();
      const last = answer.frames.at(-1);
      if (answer.state === "done") this.settle();
      else if (last) this.draft(last);
      this.element.classList.toggle("broken", answer.state === "failed" || answer.state === "stopped");
    }

    clear() {
      this.answer = null;
      this.view.reset();
      this.meter.textContent = "";
      this.line.style.width = "0";
      this.facts.replaceChildren();
      this.element.classList.remove("broken");
    }

    draft(frame) {
      const given = this.answer.given;
      this.view.feed(frame, frame.map((word, i) => (given.has(i) ? null : 1)));
    }

    // Show the final text.
    settle() {
      this.view.reset();
      const spans = this.answer.parts.filter(([text]) => text).map(([text, own]) => make("span", {class: own ? "t c9" : "t"}, text));
      this.tokens.append(...spans);
    }

    paint() {
      const answer = this.answer, seconds = ((answer.ended ?? performance.now()) - answer.began) / 1000;
      const words = {running: "writing", done: "", failed: "failed", stopped: "stopped"}[answer.state];
      const steps = !answer.step ? "" : answer.state === "running" ? `step ${answer.step}` : `${answer.step} steps`, count = answer.tokens === null ? "" : `${answer.tokens} tokens`;
      this.meter.textContent = [words, steps, count, `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`].filter(Boolean).join(" \u00b7 ");
      this.line.style.width = answer.state === "done" ? "100%" : `${Math.round(100 * progress(answer))}%`;
    }

    replay() {
      const answer = this.answer;
      if (answer === null || answer.state === "running" || answer.frames.length < 2) return;
      cancelAnimationFrame(this.timer);
      this.view.reset();
      const count = answer.frames.length, lasts = Math.min(REPLAY_MS, Math.max(1200, count * 60)), began = performance.now();
      let shown = -1;
      const tick = (now) => {
        const number = Math.min(count - 1, Math.floor((count * (now - began)) / lasts));
        while (shown < number) this.draft(answer.frames[++shown]);
        this.line.style.width = `${(100 * (number + 1)) / count}%`;
        if (now - began < lasts) this.timer = requestAnimationFrame(tick);
        else this.show(answer);
      };
      this.timer = requestAnimationFrame(tick);
    }
  }

  // share of the masks that are gone; known while drafts come
  function progress(answer) {
    const last = answer.frames.at(-1);
    if (!last || !answer.masks) return 0;
    return Math.max(0, 1 - last.filter((word) => word === null).length / answer.masks);
  }

  const right = new Panel(at("right"), "Answer"), left = new Panel(at("left"), "Pinned");

  function paintFacts() {
    for (const panel of [left, right]) {
      if (panel.answer === null) continue;
      const other = panel === left ? current : pinned, own = panel.answer.facts;
      const differs = (name) => other !== null && other !== panel.answer && other.facts[name] !== own[name];
      panel.facts.replaceChildren(...Object.entries(own).map(([name, value]) =>
        make("li", differs(name) ? {class: "differs", title: "differs from the other answer"} : {}, `${NAMES[name] ?? name} ${value}`)));
    }
  }

  function paintButtons() {
    const copy = (panel) => button("Copy", "copy the text", async (event) => {
      const made = event.currentTarget;
      try {
        await navigator.clipboard.writeText(panel.answer.whole);
        made.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(panel.tokens);
        made.textContent = "Selected: press Ctrl+C";
      }
      setTimeout(() => { made.textContent = "Copy"; }, 1600);
    });
    const replay = (panel) => (panel.answer.frames.length > 1 ? [button("Replay", "how it was written (r)", () => panel.replay())] : []);
    if (current !== null && current.state !== "running") {
      const same = pinned === current;
      right.foot.replaceChildren(
        copy(right), ...replay(right),
        button(same ? "Unpin" : pinned ? "Pin instead" : "Pin", "keep it beside the next answer (p)", pin),
        button("Edit", "make this text the prompt", () => { at("prompt").value = current.whole; hint(); at("prompt").focus(); }),
      );
    } else right.foot.replaceChildren();
    at("left").hidden = pinned === null || pinned === current;
    if (pinned !== null && pinned !== current) left.foot.replaceChildren(copy(left), ...replay(left), button("Unpin", "take it away (p)", unpin));
    right.title.textContent = pinned !== null && pinned === current ? "Answer, pinned" : "Answer";
    paintFacts();
  }

  function pin() {
    if (current === null || current.state === "running") return;
    if (pinned === current) return unpin();
    pinned = current;
    left.show(pinned);
    paintButtons();
    tell("pinned: the next answer appears beside it");
    return undefined;
  }

  function unpin() {
    pinned = null;
    paintButtons();
  }

  function tell(text) { at("status").textContent = text; }

  // -- running ---------------------------------------------------------------------------------------------------------

  function number(name) {
    const text = at(name).value.trim();
    if (text === "") {
      if (at(name).validity.badInput) throw new Failure(`${NAMES[name] ?? name} is not a number`, name);
      return undefined;
    }
    const value = Number(text);
    if (!Number.isFinite(value)) throw new Failure(`${name} is not a number: ${text}`, name);
    return value;
  }

  // A seed may have more digits than a number of JavaScript: it is sent as it stands.
  function asked(prompt) {
    const found = {model: known.model, prompt, stream: true, drafts: Boolean(known.drafts), stream_options: {include_usage: true}};
    if (at("sampler").value && at("sampler").value !== known.sampler) found.sampler = at("sampler").value;
    for (const name of ["steps", "temperature", "top_p"]) if (!at(name).closest("label").hidden) found[name] = number(name);
    if (!HOLE.test(prompt) || known.chooses_lengths) found.max_tokens = number("max_tokens");
    if (at("matching").value && known.matching) found.matching = at("matching").value;
    const forbid = at("forbid").value.split(",").map((text) => text.trim()).filter(Boolean);
    if (forbid.length && known.forbid) found.forbid = forbid;
    const seed = at("seed").value.trim();
    if (seed !== "" && !/^-?\d{1,19}$/.test(seed)) throw new Failure(`the seed is a whole number, not ${seed}`, "seed");
    if (seed !== "") found.seed = seed;
    return found;
  }

  function bodyOf(found) {
    const {seed, ...rest} = found, text = JSON.stringify(rest);
    return seed === undefined ? text : `${text.slice(0, -1)},"seed":${seed.replace(/^(-?)0+(?=\d)/, "$1")}}`;
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      held += value;
      const whole = held.split("\n\n");
      held = whole.pop();
      for (const event of whole) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield [JSON.parse(data), data];
      }
    }
  }

  function take(answer, message, raw) {
    if (message.error) throw new Failure(message.error.message, message.error.param);
    answer.seed = /"seed":\s*(-?\d+)/.exec(raw)?.[1] ?? answer.seed;
    if (message.usage) answer.tokens = message.usage.completion_tokens;
    for (const choice of message.choices) {
      answer.text += choice.text ?? "";
      if (choice.filled) answer.filled = choice.filled;
      if (choice.given) answer.given = new Set(choice.given);
      answer.step = Math.max(answer.step, choice.step ?? 0);
      if (!choice.draft) continue;
      answer.masks ??= choice.draft.filter((word) => word === null).length;
      if (answer.frames.length < FRAMES) answer.frames.push(choice.draft);
      else answer.frames[FRAMES - 1] = choice.draft;
    }
  }

  async function run() {
    if (running !== null || known === null) return;
    complain(null);
    const prompt = at("prompt").value;
    let answer = null;
    const before = current, stop = new AbortController();
    try {
      const found = asked(prompt);
      answer = new Answer({sampler: known.sampler, ...found}, prompt);
      running = stop;
      current = answer;
      at("run").hidden = true;
      at("stop").hidden = false;
      right.show(answer);
      paintButtons();
      tell("writing");
      if (innerWidth <= 860) at("right").scrollIntoView({block: "nearest", behavior: seddPlayer.still.matches ? "auto" : "smooth"});
      const response = await fetch("v1/completions", {method: "POST", headers: headers(), body: bodyOf(found), signal: stop.signal});
      if (!response.ok) throw await failureOf(response);
      let waiting = 0;
      const paint = () => {
        waiting = 0;
        if (right.answer !== answer || answer.state !== "running") return;
        const last = answer.frames.at(-1);
        if (last) right.draft(last);
        right.paint();
      };
      for await (const [message, raw] of events(response)) {
        take(answer, message, raw);
        waiting ||= requestAnimationFrame(paint);
      }
      if (answer.filled === null) throw new Failure("the server ended the answer before it was complete");
      answer.state = "done";
    } catch (error) {
      if (answer === null) return complain(error);
      answer.state = stop.signal.aborted ? "stopped" : "failed";
      if (!stop.signal.aborted) complain(error);
    } finally {
      if (answer !== null) end(answer, before);
    }
    return undefined;
  }

  // An answer of which nothing came leaves the one before in its place.
  function end(answer, before) {
    answer.ended = performance.now();
    running = null;
    at("stop").hidden = true;
    at("run").hidden = false;
    tell(answer.state === "done" ? "the answer is complete" : answer.state);
    const nothing = answer.state !== "done" && answer.frames.length === 0;
    current = nothing ? before : answer;
    if (current === null) right.clear();
    else right.show(current);
    paintButtons();
    if (nothing) return;
    past.unshift(answer);
    past.length = Math.min(past.length, KEPT);
    paintPast();
  }

  // -- this visit ------------------------------------------------------------------------------------------------------

  function paintPast() {
    at("empty").hidden = past.length > 0;
    at("clear").hidden = past.length === 0;
    at("past").replaceChildren(...past.map((answer) => {
      const facts = Object.entries(answer.facts).map(([name, value]) => `${NAMES[name] ?? name} ${value}`).join(", ");
      const made = make("button", {type: "button", title: "show this answer and its settings again"},
        make("span", {class: "says"}, answer.state === "done" ? (answer.whole || "(empty)").replace(/\s+/g, " ") : `${answer.prompt} (stopped)`),
        make("small", {}, facts));
      if (answer === current) made.setAttribute("aria-current", "true");
      made.onclick = () => recall(answer);
      return make("li", {}, made);
    }));
  }

  function recall(answer) {
    if (running !== null) return;
    complain(null);
    current = answer;
    at("prompt").value = answer.prompt;
    for (const name of FIELDS) at(name).value = "";
    choose(answer.asked.sampler ?? known.sampler);
    for (const name of FIELDS) if (name !== "sampler" && answer.facts[name] !== undefined) at(name).value = answer.facts[name];
    for (const name of ["temperature", "top_p"]) slide(name);
    hint();
    right.show(answer);
    paintButtons();
    paintPast();
  }

  // -- settings --------------------------------------------------------------------------------------------------------

  function choose(name) {
    const found = known.samplers.find((sampler) => sampler.name === name) ?? known.samplers[0];
    if (!found) return;
    at("sampler").value = found.name;
    for (const key of ["steps", "temperature", "top_p"]) {
      at(key).closest("label").hidden = found[key] === null || found[key] === undefined;
      at(key).value = found[key] ?? "";
    }
    for (const key of ["temperature", "top_p"]) slide(key);
  }

  function slide(name) { at(`${name}-slide`).value = at(name).value === "" ? 1 : at(name).value; }

  function hint() {
    const text = at("prompt").value, holes = [...text.matchAll(new RegExp(HOLE, "g"))].length;
    const said = known === null ? "" : holes
      ? `${holes} hole${holes > 1 ? "s" : ""} to fill in.`
      : text ? "The model continues the text. " + (known.infilling ? "Put a hole where it should write instead." : "")
        : "Empty: the model writes a text of its own.";
    at("hint").textContent = said;
    if (known === null) return;
    const fixed = holes > 0 && !known.chooses_lengths;  // the holes say how many tokens are new
    at("max_tokens").closest("label").hidden = fixed;
    at("seedbox").classList.toggle("wide", fixed);
  }

  function insertHole() {
    if (!known?.infilling) return;
    const field = at("prompt"), text = known.chooses_lengths ? "[[]]" : `[[${Math.max(1, Math.round(Number(at("size").value)) || 1)}]]`;
    field.focus();
    field.setRangeText(text, field.selectionStart, field.selectionEnd, "end");
    hint();
  }

  function setUp(found) {
    known = found;
    at("lead").textContent = [found.process, found.weights ? `weights ${found.weights.replace(/^checkpoints./, "").replace(/\.safetensors$/, "")}` : "", found.block ? `blocks of ${found.block}` : ""].filter(Boolean).join(" \u00b7 ");
    at("sampler").replaceChildren(...found.samplers.map((sampler) => make("option", {value: sampler.name}, sampler.name)));
    at("sampler").closest("label").hidden = found.samplers.length === 0;
    at("steps").max = found.limits.steps;
    at("max_tokens").max = found.limits.length;
    at("max_tokens").value = Math.max(1, Math.min(found.limits.length >> 1, 64));
    at("size").max = found.limits.length;
    choose(found.sampler);
    for (const name of ["matching", "forbid"]) at(name).closest("label").hidden = !found[name];
    at("holebox").hidden = !found.infilling;
    at("sizebox").hidden = Boolean(found.chooses_lengths);
    at("syntax").textContent = !found.infilling ? "This model writes and continues texts; it fills in no holes."
      : found.chooses_lengths ? "[[]] is a hole whose length the model chooses." : "[[12]] is a hole of 12 tokens." +
        (found.block ? " This model writes from left to right in blocks: behind the first block with a hole, nothing may be given." : "");
    const hole = found.chooses_lengths ? () => "[[]]" : (count) => `[[${Math.max(1, Math.min(count, found.limits.length >> 2))}]]`;
    const examples = [["nothing given", ""], ["continue", "The "]];
    if (found.infilling && !found.block) examples.push(["fill in", `The ${hole(24)} of the ${hole(16)}.`]);
    at("examples").replaceChildren(...examples.map(([name, text]) => button(name, "an example", () => {
      at("prompt").value = text;
      hint();
      at("prompt").focus();
    })));
    if (at("prompt").value === "") at("prompt").value = examples.at(-1)[1];
    at("keybox").hidden = !found.key && at("key").value === "";
    hint();
  }

  async function load() {
    try {
      const response = await fetch("v1/settings", {headers: headers()});
      if (!response.ok) throw await failureOf(response);
      setUp(await response.json());
      complain(null);
    } catch (error) {
      complain(error);
    }
  }

  // -- the page --------------------------------------------------------------------------------------------------------

  at("form").onsubmit = (event) => { event.preventDefault(); run(); };
  at("form").noValidate = true;
  at("stop").onclick = () => running?.abort();
  at("hole").onclick = insertHole;
  at("again").onclick = () => { at("seed").value = String(current?.seed ?? ""); };
  at("sampler").onchange = () => choose(at("sampler").value);
  at("prompt").oninput = hint;
  at("key").onchange = load;
  at("clear").onclick = () => { past.length = 0; paintPast(); };
  for (const name of ["temperature", "top_p"]) {
    at(`${name}-slide`).oninput = () => { at(name).value = at(`${name}-slide`).value; };
    at(name).oninput = () => slide(name);
  }
  if (/Mac|iPhone|iPad/.test(navigator.platform)) at("runkey").textContent = "\u2318 \u21b5";
  seddTheme(at("theme"), () => {});
  at("ask").onclick = () => at("help").showModal();
  at("help").onclick = (event) => { if (event.target === at("help")) at("help").close(); };
  document.addEventListener("keydown", (event) => {
    const control = event.ctrlKey || event.metaKey;
    if (at("help").open) return;
    if (control && event.key === "Enter") run();
    else if (control && event.key.toLowerCase() === "h" && document.activeElement === at("prompt")) insertHole();
    else if (event.key === "Escape" && running !== null) running.abort();
    else if (control || event.altKey || event.target.matches("input, textarea, select")) return;
    else if (event.key === "p") pin();
    else if (event.key === "r") right.replay();
    else if (event.key === "d") at("theme").click();
    else if (event.key === "?") at("help").showModal();
    else return;
    event.preventDefault();
  });
  at("settings").open = innerWidth > 860;
  load();
})();
