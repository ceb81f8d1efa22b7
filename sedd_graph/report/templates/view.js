// The page of `sedd-graph view`: its player, its heat maps, its theme and its list of keys.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const theme = document.getElementById("theme"), help = document.getElementById("help");
  const heat = data.heat.length ? new seddHeat(document.getElementById("heat"), data.heat) : null;

  document.getElementById("ask").onclick = () => help.showModal();
  help.onclick = (event) => { if (event.target === help) help.close(); };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open || event.target.matches("select")) return;
    if (event.key === "d") theme.click();
    else if (event.key === "?") help.showModal();
    else return;
    event.preventDefault();
  });
  seddTheme(theme, () => heat?.draw());
  new seddReel(document.getElementById("reel"), data.films, {pinned: true, autoplay: true, keys: document});
})();
