// Files that are dropped on the page go to the field of their kind.
const form = document.querySelector("#drop"), zone = document.querySelector("#zone");
const field = (name) => (/\.ya?ml$/i.test(name) ? "config" : /(^|[._-])tests?\.json$/i.test(name) ? "tests" : "data");
const over = (is) => zone?.classList.toggle("over", is);
addEventListener("dragover", (event) => { if (zone) { event.preventDefault(); over(true); } });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) over(false); });
addEventListener("drop", (event) => {
  if (!zone) return;
  event.preventDefault(); over(false);
  for (const file of event.dataTransfer.files) {
    const one = new DataTransfer();
    one.items.add(file);
    form.elements[field(file.name)].files = one.files;
  }
  form.dispatchEvent(new Event("change"));
});

// Selected rows stay selected when the table is renewed, and the chart that comes is readable.
let selected = [];
document.body.addEventListener("htmx:sseBeforeMessage", () => {
  selected = [...document.querySelectorAll("#compare input:checked")].map((each) => each.id);
});
document.body.addEventListener("htmx:afterSettle", () => {
  for (const id of selected) document.getElementById(id)?.setAttribute("checked", "");
  for (const figure of document.querySelectorAll("figure[data-hover]")) readable(figure);
  for (const log of document.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;
});

// A request that failed is said; the server may have ended.
const trouble = document.querySelector("#trouble");
const say = (text) => { trouble.textContent = text; trouble.hidden = !text; };
document.body.addEventListener("htmx:sendError", () => say("The console does not answer. Start it again with `tunedrop console`, and open its new address."));
document.body.addEventListener("htmx:responseError", ({ detail: { xhr, pathInfo } }) => say([502, 503].includes(xhr.status)
  ? "AWS does not answer, or refuses the request: load the page again for the reason."
  : `The console failed on ${pathInfo.requestPath}: its terminal has the reason.`));
document.body.addEventListener("htmx:sseError", () => say("The connection to the console is lost. It is tried again."));
document.body.addEventListener("htmx:sseOpen", () => say(""));
