const all = [...document.querySelectorAll(".card")], cards = [...document.querySelectorAll("#answers .card")];
const buttons = [...document.querySelectorAll("button[data-outcome]")];
const against = document.querySelector("#against"), tag = document.querySelector("#tag"), search = document.querySelector("#search");
const words = cards.map((card) => card.textContent.toLowerCase());

const other = () => against?.value ?? "base";

function filter() {
  const outcome = buttons.find((button) => button.getAttribute("aria-pressed") === "true").dataset.outcome;
  const wanted = search.value.toLowerCase().trim();
  let shown = 0;
  cards.forEach((card, at) => {
    card.hidden = !((!outcome || card.dataset[other()] === outcome || (outcome === "cut" && "cut" in card.dataset)) && (!tag?.value || JSON.parse(card.dataset.tags).includes(tag.value)) && words[at].includes(wanted));
    shown += !card.hidden;
  });
  document.querySelector("#shown").textContent = `${shown} shown`;
}
for (const button of buttons)
  button.addEventListener("click", () => { buttons.forEach((each) => each.setAttribute("aria-pressed", each === button)); filter(); });
tag?.addEventListener("change", filter);
search.addEventListener("input", filter);
against?.addEventListener("change", () => {
  document.querySelectorAll("[data-against]").forEach((count) => { count.hidden = count.dataset.against !== other(); });
  filter();
  [...plain.keys()].forEach(show);
});

const plain = new Map();
function show(card) {
  if (!plain.has(card)) plain.set(card, new Map([...card.querySelectorAll(".answer")].map((answer) => [answer, answer.textContent])));
  const texts = plain.get(card);
  for (const [answer, text] of texts) answer.textContent = text;
  const tuned = card.querySelector('[data-of="tuned"]'), theirs = card.querySelector(`[data-of="${other()}"]`) ?? card.querySelector(".answer");
  const before = texts.get(theirs), after = texts.get(tuned);
  const both = document.querySelector("#diff").checked && before && after && theirs !== tuned && differences(before, after);
  if (both) { mark(theirs, both[0], "del"); mark(tuned, both[1], "ins"); }
}
// Computes the differences of a card when it approaches the screen.
const near = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { show(entry.target); near.unobserve(entry.target); }
}, { rootMargin: "600px" });
all.forEach((card) => near.observe(card));
document.querySelector("#diff").addEventListener("change", () => [...plain.keys()].forEach(show));
addEventListener("beforeprint", () => all.forEach(show));
filter();
