// A chart shows the values of a step where the pointer is, and with the arrow keys.
const readable = (figure) => {
  const steps = JSON.parse(figure.dataset.hover), svg = figure.querySelector("svg");
  const line = svg.querySelector(".at"), text = figure.querySelector("output");
  let at = steps.length - 1;
  const show = (place) => {
    at = Math.max(0, Math.min(steps.length - 1, place));
    line.setAttribute("x1", steps[at][0]); line.setAttribute("x2", steps[at][0]); line.removeAttribute("visibility");
    text.textContent = steps[at][1];
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    show(steps.reduce((best, step, place) => (Math.abs(step[0] - x) < Math.abs(steps[best][0] - x) ? place : best), 0));
  });
  svg.addEventListener("focus", () => show(at));
  svg.addEventListener("keydown", (event) => {
    const places = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
    if (event.key in places) { show(places[event.key]); event.preventDefault(); }
  });
};
for (const figure of document.querySelectorAll("figure[data-hover]")) readable(figure);
