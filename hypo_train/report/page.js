"use strict";
// Show values under the pointer. The page can be read without this script.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const chart = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const line = svg.querySelector(".pointer");
  const readout = figure.querySelector(".readout");

  function show(event) {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const near = chart.filter((curve) => curve.points.length).map((curve) => [curve, nearest(curve.points, x)]);
    const [place, step] = near.map(([, point]) => point).reduce((a, b) => Math.abs(a[0] - x) <= Math.abs(b[0] - x) ? a : b);
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    line.style.visibility = "visible";
    const said = near.map(([curve, point]) => {
      const at = point[1] === step ? "" : ` (step ${point[1]})`;
      return row(`${curve.label}: ${point[2]}${at}`);
    });
    readout.replaceChildren(row(`step ${step}`), ...said);
    readout.classList.add("shown");
    readout.style.right = event.clientX - box.left > box.width / 2 ? "auto" : "0";
    readout.style.left = event.clientX - box.left > box.width / 2 ? "0" : "auto";
  }

  function hide() {
    line.style.visibility = "hidden";
    readout.classList.remove("shown");
  }

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

function nearest(points, x) {
  return points.reduce((a, b) => Math.abs(a[0] - x) <= Math.abs(b[0] - x) ? a : b);
}

function row(text) {
  const span = document.createElement("span");
  span.textContent = text;
  return span;
}
