// The page of `sedd-graph view`: its player, its heat maps, its theme and its list of keys.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent), root = document.documentElement;
  const theme = document.getElementById("theme"), help = document.getElementById("help");
  const dark = matchMedia("(prefers-color-scheme: dark)"), SVG = "http://www.w3.org/2000/svg";
  const MOON = "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z";
  const SUN = "M12 7a5 5 0 1 0 0 10 5 5 0 0 0 0-10zM11 1h2v4h-2zM11 19h2v4h-2zM1 11h4v2H1zM19 11h4v2h-4zM4.2 5.6l1.4-1.4 2.8 2.8L7 8.4zM15.6 17l1.4-1.4 2.8 2.8-1.4 1.4zM18.4 4.2l1.4 1.4L17 8.4 15.6 7zM7 15.6L8.4 17l-2.8 2.8-1.4-1.4z";
  const heat = data.heat.length ? new seddHeat(document.getElementById("heat"), data.heat) : null;

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  }

  function paint() {
    const svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
    svg.setAttribute("viewBox", "0 0 24 24");
    svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", isDark() ? SUN : MOON);
    svg.append(path);
    theme.replaceChildren(svg);
    theme.title = isDark() ? "light (d)" : "dark (d)";
    theme.setAttribute("aria-label", isDark() ? "light colours" : "dark colours");
    heat?.draw();
  }

  function swap() {
    root.dataset.theme = isDark() ? "light" : "dark";
    paint();
  }

  theme.onclick = swap;
  dark.addEventListener("change", paint);
  document.getElementById("ask").onclick = () => help.showModal();
  help.onclick = (event) => { if (event.target === help) help.close(); };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open || event.target.matches("select")) return;
    if (event.key === "d") swap();
    else if (event.key === "?") help.showModal();
    else return;
    event.preventDefault();
  });
  paint();
  new seddReel(document.getElementById("reel"), data.films, {pinned: true, autoplay: true, keys: document});
})();
