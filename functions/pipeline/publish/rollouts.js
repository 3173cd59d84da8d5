// The section about rollouts: cards for the chosen step, or for all steps. All text is set as text, never as markup.
if (document.querySelector("#rollouts")) {
  const by = (id) => document.getElementById(id), read = (id) => JSON.parse(by(id).textContent);
  const groups = read("all-rollouts"), { alerts, weights } = read("about-rollouts");
  const AT_ONCE = 20, LEAST_EVERY = 0.1;
  const kind = by("kind"), slider = by("step"), every = by("every"), which = by("which"), find = by("find"), more = by("more");
  const changes = by("changes").querySelector("input");
  let limit = AT_ONCE;

  for (const group of groups) {
    const scores = group.answers.map((each) => each.score).filter((score) => score !== null);
    group.mean = scores.length ? scores.reduce((sum, each) => sum + each, 0) / scores.length : 0;
    group.words = [group.prompt_id, group.reference ?? "", ...group.prompt.map((each) => each.content), ...group.answers.map((each) => each.text)].join("\n").toLowerCase();
    group.answers.sort((one, other) => (other.score ?? -Infinity) - (one.score ?? -Infinity));
  }
  const paid = (name, value) => (weights[name] ?? 1) * (value ?? 0);
  const largest = Math.max(1e-9, ...groups.flatMap((group) => group.answers.flatMap((answer) => Object.entries(answer.rewards).map(([name, value]) => Math.abs(paid(name, value))))));
  const isEvidence = (group, alert) => alert.rollouts.length ? alert.rollouts.some((link) => link.step === group.step && link.prompt_id === group.prompt_id) : group.step === alert.step && !group.panel;
  const ofKind = () => groups.filter((group) => Boolean(group.panel) === (kind.value === "panel"));
  const stepsOf = (some) => [...new Set(some.map((group) => group.step))].sort((one, other) => one - other);
  const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

  function make(tag, classes, text, ...children) {
    const element = Object.assign(document.createElement(tag), { className: classes, textContent: text });
    element.append(...children);
    return element;
  }
  function bars(answer) {
    return Object.entries(answer.rewards).map(([name, value]) => {
      const bar = make("i", paid(name, value) < 0 ? "negative" : "", "");
      bar.style.width = `${(100 * Math.abs(paid(name, value))) / largest}%`;
      return make("div", "reward small", "", make("span", "", name), make("span", "track", "", bar), make("span", "number", number(value)));
    });
  }
  function reply(answer, name = "") {
    const numbers = [`reward ${number(answer.score)}`];
    if (answer.advantage !== undefined) numbers.push(`advantage ${number(answer.advantage, 2)}`);
    numbers.push(`${answer.tokens} ${answer.tokens === 1 ? "token" : "tokens"}`);
    const text = make("div", "text", answer.text), head = make("div", "small soft", "", make("span", "", name), make("span", "number", numbers.join(" · ")));
    if (answer.cut) head.append(make("span", "pill failed", "cut by the limit"));
    const box = make("div", "reply", "", head, text, ...bars(answer));
    const means = [["sampled", answer.sampler_log_prob], ["in the loss", answer.trainer_log_prob]].filter(([, value]) => value !== undefined);
    if (means.length) box.append(make("div", "small soft", `mean log-probability of a token: ${means.map(([what, value]) => `${number(value)} ${what}`).join(", ")}`));
    return [box, text];
  }
  function card(group) {
    const head = make("header", "", "", make("span", "pill", `${group.panel ? "evaluation after step" : "step"} ${group.step}`), make("b", "", group.prompt_id));
    for (const alert of alerts) if (isEvidence(group, alert)) head.append(make("span", "pill PENDING", `evidence of ${alert.code}`));
    head.append(make("span", "number", `mean reward ${number(group.mean)}`));
    const article = make("article", "card rollout", "", head, make("div", "prompt text", group.prompt.at(-1)?.content ?? ""));
    if (group.prompt.length > 1) {
      const rest = group.prompt.slice(0, -1).map((each) => make("div", "text", "", make("b", "", `${each.role} `), each.content));
      article.append(make("details", "small soft", "", make("summary", "", `${rest.length} more ${rest.length === 1 ? "message" : "messages"}`), ...rest));
    }
    if (group.reference) article.append(make("div", "soft small text", `expected: ${group.reference}`));
    const answers = make("div", "both", "");
    if (group.panel) {
      const past = groups.filter((each) => each.panel && each.prompt_id === group.prompt_id).sort((one, other) => one.step - other.step);
      const before = past[past.indexOf(group) - 1];
      article.append(make("div", "small soft", `reward by evaluation: ${past.map((each) => number(each.mean)).join(" → ")}`));
      const [box, text] = reply(group.answers[0], `after step ${group.step}`);
      if (before) {
        const [earlier, earlierText] = reply(before.answers[0], `after step ${before.step}`);
        const both = changes.checked && differences(before.answers[0].text, group.answers[0].text);
        if (both) { mark(earlierText, both[0], "del"); mark(text, both[1], "ins"); }
        answers.append(earlier);
      }
      answers.append(box);
    } else answers.append(...group.answers.map((answer) => reply(answer)[0]));
    article.append(answers);
    return article;
  }
  function chosen() {
    const alert = alerts[which.value.slice("alert-".length)], wanted = find.value.toLowerCase().trim();
    let some = which.value.startsWith("alert-") ? groups.filter((group) => isEvidence(group, alert)) : ofKind();
    const steps = stepsOf(some), at = steps[Math.min(slider.value, steps.length - 1)];
    slider.max = Math.max(0, steps.length - 1);
    slider.disabled = every.checked;
    slider.setAttribute("aria-valuetext", `step ${at}`);
    by("step-name").textContent = every.checked ? `all ${steps.length} steps` : `step ${at} of ${steps.at(-1)}`;
    const order = [...some].sort((one, other) => one.mean - other.mean), tenth = Math.max(1, Math.ceil(order.length * LEAST_EVERY));
    if (which.value === "cut") some = some.filter((group) => group.answers.some((answer) => answer.cut));
    if (which.value === "top") some = order.reverse().slice(0, tenth);
    if (which.value === "bottom") some = order.slice(0, tenth);
    return some.filter((group) => (every.checked || group.step === at) && group.words.includes(wanted));
  }
  function draw() {
    const some = chosen();
    by("groups").replaceChildren(...some.slice(0, limit).map(card));
    by("found").textContent = `${some.length} ${some.length === 1 ? "group" : "groups"}`;
    by("changes").hidden = kind.value !== "panel";
    more.hidden = some.length <= limit;
  }
  const again = () => { limit = AT_ONCE; draw(); };
  function showAlert(number) {
    which.value = `alert-${number}`;
    every.checked = true;
    again();
  }
  alerts.forEach((alert, number) => which.append(Object.assign(document.createElement("option"), { value: `alert-${number}`, textContent: `Evidence of ${alert.code}, step ${alert.step}` })));
  for (const link of document.querySelectorAll("[data-alert]")) link.addEventListener("click", () => showAlert(link.dataset.alert));
  kind.querySelector("[value=panel]").hidden = !groups.some((group) => group.panel);
  kind.addEventListener("change", () => { slider.value = slider.max = Number.MAX_SAFE_INTEGER; again(); });
  which.addEventListener("change", () => { if (which.value) every.checked = true; again(); });
  for (const control of [slider, find]) control.addEventListener("input", again);
  for (const control of [every, changes]) control.addEventListener("change", again);
  more.addEventListener("click", () => { limit += AT_ONCE; draw(); });
  draw();
}
