// The script of `pipeline.dashboard`, which is written into the page: which run is shown, values under the pointer, and
// news from the server. It makes no HTML of texts; the server has escaped what it sends.
"use strict";
const content = document.getElementById("content"), pulse = document.querySelector(".pulse");
let version = content.dataset.version;
const runs = () => [...document.querySelectorAll("section.run")];

function choose(id) {
  const found = runs().find((run) => run.id === id);
  if (!found) return;
  runs().forEach((run) => { run.hidden = run !== found; });
  document.querySelectorAll("nav a").forEach((link) => link.classList.toggle("chosen", decodeURIComponent(link.hash.slice(1)) === id));
}
addEventListener("hashchange", () => choose(decodeURIComponent(location.hash.slice(1))));
choose(decodeURIComponent(location.hash.slice(1)));

function near(points, at) {
  return points.reduce((best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best);
}
function unmark() { document.querySelectorAll(".cross, .tip").forEach((mark) => mark.remove()); }
function mark(event) {
  const plot = event.target.closest && event.target.closest(".plot");
  unmark();
  if (!plot) return;
  const box = plot.getBoundingClientRect(), at = 1000 * (event.clientX - box.left) / box.width;
  for (const chart of plot.closest("section").querySelectorAll(".chart")) {
    if (!chart.offsetParent) continue;
    const rows = JSON.parse(chart.dataset.curve).filter((row) => row.points.length);
    if (!rows.length) continue;
    const first = near(rows[0].points, at), cross = document.createElement("i"), tip = document.createElement("span");
    cross.className = "cross"; cross.style.left = first[0] / 10 + "%";
    tip.className = "tip"; tip.style.left = Math.min(80, Math.max(20, first[0] / 10)) + "%";
    const words = rows.map((row) => { const point = near(row.points, at);
      return Math.abs(point[0] - first[0]) < 30 || row === rows[0] ? (row === rows[0] ? "" : row.name + " ") + point[3] : ""; });
    tip.textContent = "step " + first[2] + ": " + words.filter(Boolean).join(", ");
    chart.querySelector(".plot").append(cross, tip);
  }
}
document.addEventListener("pointermove", mark);
document.addEventListener("pointerdown", mark);

async function look() {
  try {
    const answer = await fetch("state?version=" + encodeURIComponent(version));
    if (!answer.ok) throw new Error(answer.status);
    if (answer.status === 200) {
      const news = await answer.json();
      const opened = new Set([...document.querySelectorAll("details[open]")].map((one) => one.dataset.key));
      const chosen = runs().find((run) => !run.hidden);
      content.innerHTML = news.html;
      document.title = news.title;
      version = news.version;
      document.querySelectorAll("details").forEach((one) => { one.open = opened.has(one.dataset.key); });
      if (chosen) choose(chosen.id);
    }
    pulse.classList.remove("lost");
    pulse.lastChild.textContent = "follows the run";
  } catch (error) {
    pulse.classList.add("lost");
    pulse.lastChild.textContent = "the dashboard has ended";
  }
  setTimeout(look, 2000);
}
if (pulse) setTimeout(look, 2000);
