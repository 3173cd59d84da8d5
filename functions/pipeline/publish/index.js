"use strict";
const runs = JSON.parse(document.querySelector("#data").textContent);
const find = (selector) => document.querySelector(selector);
const number = (value, digits = 3) => (value == null ? "" : value.toFixed(digits));
const signed = (value) => (value == null ? "" : (value > 0 ? "+" : "") + value.toFixed(3));
const minutes = (seconds) => (seconds == null ? "" : seconds < 120 ? `${Math.round(seconds)} s` : seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`);

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}
function sparkline(values) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  const known = values.filter((value) => value != null);
  if (known.length < 2) return svg;
  const low = Math.min(...known), range = Math.max(...known) - low || 1;
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", "M" + known.map((value, at) => `${((100 * at) / (known.length - 1)).toFixed(1)} ${(28 - (26 * (value - low)) / range).toFixed(1)}`).join("L"));
  svg.append(path);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `mean reward during training, from ${number(known[0])} to ${number(known.at(-1))}`);
  return svg;
}
const pill = (run) => make("span", { className: `pill ${run.verdict}`, textContent: run.verdict });
const link = (run) => make("span", {}, make("a", { href: `${run.run_id}/report.html`, textContent: run.dataset }), make("div", { className: "soft small", textContent: run.run_id + (run.attempt > 1 ? `, attempt ${run.attempt}` : "") }));
const lift = (run) => make("span", { className: run.low > 0 ? "up" : run.high < 0 ? "down" : "", textContent: signed(run.lift), title: `interval ${signed(run.low)} to ${signed(run.high)}` });

const over = (run) => make("span", { className: run.champion_lift > 0 ? "up" : run.champion_lift < 0 ? "down" : "", textContent: signed(run.champion_lift), title: run.champion ? `over the champion, ${run.champion}` : "" });
// Whether a run belongs to a line with another name than its dataset, or was compared with a champion.
const lines = runs.some((run) => run.line !== run.dataset), champions = runs.some((run) => run.champion);

// title, sort key of a run, content of its cell, class
const columns = [
  ["dataset", (run) => run.dataset, link, ""],
  ...(lines ? [["line", (run) => run.line, (run) => run.line, "wide"]] : []),
  ["verdict", (run) => run.verdict, pill, ""],
  ["base", (run) => run.base, (run) => number(run.base), "number"],
  ["tuned", (run) => run.tuned, (run) => number(run.tuned), "number"],
  ["lift", (run) => run.lift, lift, "number"],
  ...(champions ? [["over champion", (run) => run.champion_lift, over, "number wide"]] : []),
  ["tests", (run) => run.tests, (run) => String(run.tests), "number wide"],
  ["reward", (run) => run.reward.at(-1), (run) => sparkline(run.reward), "wide"],
  ["model", (run) => run.model, (run) => run.model, "wide"],
  ["time", (run) => run.seconds, (run) => minutes(run.seconds), "number wide"],
  ["cost", (run) => run.usd, (run) => (run.usd == null ? "" : `$${number(run.usd, 2)}`), "number wide"],
  ["published", (run) => run.published, (run) => run.published.slice(0, 16).replace("T", " "), "nowrap wide"],
];
let order = { column: columns.length - 1, down: true };
const chosen = new Set();

const rows = new Map(runs.map((run) => {
  const box = make("input", { type: "checkbox", ariaLabel: `compare ${run.run_id}` });
  box.addEventListener("change", () => {
    if (box.checked) chosen.add(run); else chosen.delete(run);
    if (chosen.size > 2) { const [oldest] = chosen; chosen.delete(oldest); rows.get(oldest).querySelector("input").checked = false; }
    compare();
  });
  return [run, make("tr", {}, make("td", {}, box), ...columns.map(([, , view, style]) => make("td", { className: style }, view(run))))];
}));
const words = new Map(runs.map((run) => [run, `${run.dataset} ${run.line} ${run.run_id} ${run.model}`.toLowerCase()]));

function show() {
  const wanted = find("#search").value.toLowerCase().trim(), verdict = find("#verdict").value, dataset = find("#dataset").value, line = find("#line").value;
  const [, key] = columns[order.column];
  const shown = runs.filter((run) => words.get(run).includes(wanted) && (!verdict || run.verdict === verdict) && (!dataset || run.dataset === dataset) && (!line || run.line === line));
  const side = order.down ? -1 : 1;
  shown.sort((a, b) => {
    const [left, right] = [key(a), key(b)];
    return left == null || right == null ? (left == null) - (right == null) : left < right ? -side : left > right ? side : 0;
  });
  find("#runs tbody").replaceChildren(...shown.map((run) => rows.get(run)));
  find("#shown").textContent = `${shown.length} of ${runs.length}`;
  chain(line);
  document.querySelectorAll("#runs thead button").forEach((button, at) => button.parentElement.setAttribute("aria-sort", at === order.column ? (order.down ? "descending" : "ascending") : "none"));
}
// Shows the runs of a line as a tree, oldest first: below each run those that started from it.
function chain(line) {
  find("#chain").hidden = !line;
  if (!line) return;
  const members = runs.filter((run) => run.line === line).sort((a, b) => (a.published < b.published ? -1 : 1));
  const names = new Set(members.map((run) => run.run_id));
  const item = (run) => {
    const words = [run.published.slice(0, 10), `score ${number(run.base)} → ${number(run.tuned)}`];
    if (run.champion) words.push(`${signed(run.champion_lift)} over the champion ${run.champion}`);
    if (run.start && !names.has(run.start)) words.push(`started from ${run.start}`);
    const later = members.filter((each) => each.start === run.run_id);
    return make("li", {}, pill(run), " ", make("a", { href: `${run.run_id}/report.html`, textContent: run.run_id }), make("span", { className: "soft small", textContent: ` ${words.join(", ")}` }), ...(later.length ? [make("ul", {}, ...later.map(item))] : []));
  };
  find("#chain h2").textContent = `Line ${line}`;
  find("#chain ul").replaceChildren(...members.filter((run) => !names.has(run.start)).map(item));
}
function compare() {
  find("#compare").hidden = chosen.size !== 2;
  if (chosen.size !== 2) return;
  const both = [...chosen];
  const facts = [["run", link], ...columns.slice(1).map(([title, , view]) => [title, view]), ["lift interval", (run) => `${signed(run.low)} to ${signed(run.high)}`], ["won / tied / lost", (run) => `${run.wins} / ${run.ties} / ${run.losses}`], ...(champions ? [["started from", (run) => run.start ?? "base"], ["champion", (run) => run.champion ?? ""]] : []), ["learning rate", (run) => String(run.learning_rate ?? "")], ["rewards", (run) => run.rewards.join(", ")], ["steps", (run) => String(run.steps ?? "")], ["rows", (run) => String(run.rows)]];
  find("#compare table").replaceChildren(make("tbody", {}, ...facts.map(([title, view]) => {
    const cells = both.map((run) => make("td", {}, view(run)));
    return make("tr", { className: cells[0].textContent === cells[1].textContent ? "" : "differs" }, make("th", { textContent: title }), ...cells);
  })));
}
find("#runs thead tr").append(...columns.map(([title, , , style], at) => {
  const button = make("button", { textContent: title });
  button.addEventListener("click", () => { order = { column: at, down: order.column === at ? !order.down : style.includes("number") || title === "published" }; show(); });
  return make("th", { className: style }, button);
}));
for (const name of ["dataset", "line"])
  find(`#${name}`).append(...[...new Set(runs.map((run) => run[name]))].sort().map((value) => make("option", { textContent: value })));
find("#line").hidden = !lines && !champions;
for (const selector of ["#search", "#verdict", "#dataset", "#line"]) find(selector).addEventListener("input", show);
find("#clear").addEventListener("click", () => { chosen.clear(); for (const row of rows.values()) row.querySelector("input").checked = false; compare(); });
const approved = runs.filter((run) => run.verdict === "APPROVED").length;
find("#summary").textContent = `${runs.length} published, ${approved} approved` + (runs.length ? `, latest on ${runs.map((run) => run.published).sort().at(-1).slice(0, 10)}` : "");
show();
