"use strict";
// The longest common subsequence of words. Returns null for answers whose table would be too large.
function differences(before, after) {
  const a = before.split(/(\s+)/), b = after.split(/(\s+)/);
  if (a.length * b.length > 250_000) return null;
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const left = [], right = [];
  for (let i = 0, j = 0; i < a.length || j < b.length; )
    if (i < a.length && j < b.length && a[i] === b[j]) { left.push([a[i++], false]); right.push([b[j++], false]); }
    else if (j >= b.length || (i < a.length && table[i + 1][j] >= table[i][j + 1])) left.push([a[i++], true]);
    else right.push([b[j++], true]);
  return [left, right];
}
function mark(element, parts, name) {
  element.replaceChildren();
  for (let at = 0; at < parts.length; ) {
    const changed = parts[at][1];
    let text = "";
    while (at < parts.length && parts[at][1] === changed) text += parts[at++][0];
    element.append(changed && text.trim() ? Object.assign(document.createElement(name), { textContent: text }) : text);
  }
}
