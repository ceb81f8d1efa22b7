// A button that swaps light and dark colours; at first the page is as the reader's system is set.
//
// seddTheme(button, changed): changed() is called when the colours have changed.
const seddTheme = (() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg", root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const MOON = "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z";
  const SUN = "M12 7a5 5 0 1 0 0 10 5 5 0 0 0 0-10zM11 1h2v4h-2zM11 19h2v4h-2zM1 11h4v2H1zM19 11h4v2h-4zM4.2 5.6l1.4-1.4 2.8 2.8L7 8.4zM15.6 17l1.4-1.4 2.8 2.8-1.4 1.4zM18.4 4.2l1.4 1.4L17 8.4 15.6 7zM7 15.6L8.4 17l-2.8 2.8-1.4-1.4z";
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);

  return (button, changed) => {
    const paint = () => {
      const svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
      svg.setAttribute("viewBox", "0 0 24 24");
      svg.setAttribute("aria-hidden", "true");
      path.setAttribute("d", isDark() ? SUN : MOON);
      svg.append(path);
      button.replaceChildren(svg);
      button.title = isDark() ? "light (d)" : "dark (d)";
      button.setAttribute("aria-label", isDark() ? "light colours" : "dark colours");
      changed();
    };
    button.onclick = () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      paint();
    };
    dark.addEventListener("change", paint);
    paint();
  };
})();
