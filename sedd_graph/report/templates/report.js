// The films of report.html.
for (const box of document.querySelectorAll(".reel")) new seddReel(box, JSON.parse(box.querySelector("script").textContent));
