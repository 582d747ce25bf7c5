"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const STEP = 24; // images of rows shown at once
const PER_GROUP = 3; // of the worst, of the middle and of the best
const SMALL_EDGE = 192; // CSS pixels that a small image is enlarged to at most, by a whole factor
let shown = 1; // how many times that

function make(tag, properties = {}, ...children) {
  const { key, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (key !== undefined) element.dataset.key = key; // what keeps the focus when the cards are made anew
  element.append(...children);
  return element;
}

function fill(select, names, chosen) {
  names.forEach((name, i) => select.append(make("option", { value: i, textContent: name, selected: i === chosen })));
}

const state = () => ({
  left: +at("left").value, right: +at("right").value, view: at("view").value, order: at("order").value,
  reward: data.rewards[+at("reward")?.value], // undefined on a page without scores
});

function change(item, reward, left, right) {
  const scores = item.scores[reward];
  return !scores || scores[left] === null || scores[right] === null ? null : scores[right] - scores[left];
}

function number(value) { // three significant digits, as the rest of the page writes them
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) < 1e-12) return "0";
  const size = Math.abs(Number(value.toPrecision(3)));
  if (size < 1e-4) return value.toExponential(2).replaceAll("-", "−");
  return Number(value.toPrecision(3)).toFixed(Math.max(0, 2 - Math.floor(Math.log10(size)))).replace("-", "−");
}
const signed = (value) => (value > 0 ? "+" : "") + number(value);

// ---- which rows, and in which order

const better = (reward) => data.better?.[reward] ?? 1; // -1 where lower scores are better
const gain = (item, reward, left, right) => better(reward) * change(item, reward, left, right);
const kind = (by, reward) => (by * better(reward) > 0 ? "up" : by * better(reward) < 0 ? "down" : "");

const showable = () => data.items.filter((item) => item.pictures);

function ranked({ left, right, reward }) {
  const known = showable().filter((item) => change(item, reward, left, right) !== null);
  return known.sort((a, b) => gain(a, reward, left, right) - gain(b, reward, left, right) || a.number - b.number);
}

function take(items, count, used) { // one row a prompt
  const chosen = [];
  for (const item of items) {
    if (chosen.length === count) break;
    if (!used.has(item.prompt)) { used.add(item.prompt); chosen.push(item); }
  }
  return chosen;
}

function spread(now) {
  const order = ranked(now), used = new Set(), count = shown * PER_GROUP;
  const middle = change(order[Math.floor(order.length / 2)], now.reward, now.left, now.right);
  const far = (item) => Math.abs(change(item, now.reward, now.left, now.right) - middle);
  const worst = take(order, count, used), best = take([...order].reverse(), count, used);
  const between = take([...order].sort((a, b) => far(a) - far(b) || a.number - b.number), count, used);
  const [falls, rises] = better(now.reward) > 0 ? ["falls", "rises"] : ["rises", "falls"];
  const prompts = new Set(order.map((item) => item.prompt)).size;
  return {
    groups: [[`Worst: ${now.reward} ${falls} most or ${rises} least`, worst], ["Middle: around the median change", between],
      [`Best: ${now.reward} ${rises} most`, best]].filter(([, items]) => items.length),
    rest: used.size < prompts,
  };
}

function byPrompt() {
  const groups = new Map();
  const items = showable();
  for (const item of items.slice(0, shown * STEP)) groups.set(item.prompt, [...(groups.get(item.prompt) ?? []), item]);
  return { groups: [...groups], rest: shown * STEP < items.length };
}

function groupsOf(now) {
  if (now.order === "given" || !ranked(now).length) return { ...byPrompt(), prompts: true };
  if (now.order === "spread") return spread(now);
  const items = ranked(now);
  if (now.order === "best") items.reverse();
  return { groups: [["", items.slice(0, shown * STEP)]], rest: shown * STEP < items.length };
}

function counts({ left, right, reward }) {
  const changes = data.items.map((item) => change(item, reward, left, right)).filter((c) => c !== null);
  if (!changes.length) return "";
  const rose = changes.filter((c) => c > 0).length, fell = changes.filter((c) => c < 0).length;
  return `${reward}, ${data.columns[left]} → ${data.columns[right]}: rises in ${rose}, falls in ${fell}, stays the same in `
    + `${changes.length - rose - fell} of ${changes.length} pairs.`;
}

// ---- what a row looks like

function picture(item, column, room) {
  const image = make("img", { src: item.pictures[column], draggable: false, alt: `${data.columns[column]}: ${item.prompt}, seed ${item.seed}` });
  if (data.small) {
    const factor = Math.max(1, Math.floor(room / Math.max(...data.small)));
    image.className = "small";
    image.style.width = factor * data.small[0] + "px";
  }
  return image;
}

const room = (count) => Math.min(SMALL_EDGE, (Math.min(innerWidth, 1240) - 56) / count);

function named(item, column, edge, score) {
  const parts = [picture(item, column, edge), make("span", { className: "name", textContent: data.columns[column] })];
  return make("span", { className: "named" }, ...parts, ...(score ? [score] : []));
}

function scoreOf(item, reward, column, left) {
  if (!reward || !item.scores[reward]) return null;
  const by = column === left ? null : change(item, reward, left, column);
  return make("span", { className: "name" }, `${reward} ${number(item.scores[reward][column])} `,
    make("span", { className: kind(by, reward), textContent: by === null ? "" : signed(by) }));
}

function sideBySide(item, columns, open, score = () => null) {
  const label = `${columns.map((c) => data.columns[c]).join(" and ")}: ${item.prompt}, seed ${item.seed}. Enlarge`;
  const frame = make("button", { type: "button", className: "pair", key: "card-" + item.number, onclick: open }, ...columns.map((c) => named(item, c, room(2), score(c))));
  frame.setAttribute("aria-label", label);
  return frame;
}

// Two images in one frame: drag or arrow keys move the border, a click or Enter enlarges.
function slider(item, left, right, enlarge, edge, key) {
  const names = [data.columns[left], data.columns[right]];
  const frame = make("div", { className: "compare", tabIndex: 0, key });
  frame.setAttribute("role", "slider");
  frame.setAttribute("aria-label", `${names[0]} left, ${names[1]} right: ${item.prompt}, seed ${item.seed}`);
  frame.setAttribute("aria-valuemin", 0);
  frame.setAttribute("aria-valuemax", 100);
  frame.append(picture(item, right, edge), picture(item, left, edge),
    make("span", { className: "l", textContent: names[0] }), make("span", { className: "r", textContent: names[1] }));
  let position = 50, start = null, moved = false;
  const set = (value) => {
    position = Math.min(100, Math.max(0, value));
    frame.style.setProperty("--x", position + "%");
    frame.setAttribute("aria-valuenow", Math.round(position));
    frame.setAttribute("aria-valuetext", `${Math.round(position)} % ${names[0]}, ${Math.round(100 - position)} % ${names[1]}`);
  };
  const follow = (event) => { const box = frame.getBoundingClientRect(); set(100 * (event.clientX - box.left) / box.width); };
  frame.addEventListener("pointerdown", (event) => { start = event.clientX; moved = false; frame.setPointerCapture(event.pointerId); });
  frame.addEventListener("pointermove", (event) => {
    if (start === null || (!moved && Math.abs(event.clientX - start) < 4)) return;
    moved = true;
    follow(event);
  });
  frame.addEventListener("pointerup", (event) => {
    if (start !== null && !moved) { if (enlarge) enlarge(); else follow(event); }
    start = null;
  });
  frame.addEventListener("pointercancel", () => { start = null; });
  frame.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -5, ArrowRight: 5, Home: -100, End: 100 }[event.key];
    if (step) { set(position + step); event.preventDefault(); event.stopPropagation(); }
    if (event.key === "Enter" && enlarge) { event.preventDefault(); enlarge(); } // else it also presses what gets the focus
  });
  set(50);
  return frame;
}

function scores(item, reward, left, right) {
  const by = change(item, reward, left, right);
  return make("p", { className: "scores" }, `${reward} ${number(item.scores[reward]?.[left])} → ${number(item.scores[reward]?.[right])} `,
    make("span", { className: kind(by, reward), textContent: by === null ? "" : signed(by) }));
}

function card(item, { left, right, reward, view }, underPrompt) {
  const open = () => { enlarge(item, left, right); at("large").showModal(); };
  const key = "card-" + item.number;
  const body = view === "slider" ? slider(item, left, right, open, SMALL_EDGE, key)
    : view === "pair" ? sideBySide(item, [left, right], open)
    : sideBySide(item, data.columns.map((_, i) => i), open, (column) => scoreOf(item, reward, column, left));
  const text = underPrompt ? `seed ${item.seed}` : `${item.prompt} · seed ${item.seed}`;
  const parts = [body, make("p", { className: "prompt", textContent: text, title: `${item.prompt} (seed ${item.seed})` })];
  if (view !== "all" && reward && item.scores[reward]) parts.push(scores(item, reward, left, right));
  return make("article", { className: "item" }, ...parts);
}

function enlarge(item, left, right) {
  const inside = at("large").contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const close = make("button", { type: "button", textContent: "Close", key: "close", onclick: () => at("large").close() });
  const strip = make("div", { className: "strip" }, ...data.columns.map((name, i) => {
    const button = make("button", { type: "button", key: "column-" + i, onclick: () => enlarge(item, left, i) }, picture(item, i, 80), name);
    button.setAttribute("aria-pressed", i === right);
    return button;
  }));
  const edge = Math.min(512, innerWidth - 60, innerHeight - 260);
  at("large").firstElementChild.replaceChildren(
    make("div", { className: "bar-top" }, make("p", { textContent: `${item.prompt} · seed ${item.seed}` }), close),
    slider(item, left, right, null, edge, "large-slider"),
    ...data.rewards.filter((reward) => item.scores[reward]).map((reward) => scores(item, reward, left, right)), strip);
  focusOn(at("large"), inside);
}

function focusOn(parent, key) {
  if (key !== undefined) [...parent.querySelectorAll("[data-key]")].find((e) => e.dataset.key === key)?.focus();
}

function draw() {
  const now = state(), { groups, rest, prompts } = groupsOf(now), key = document.activeElement?.dataset?.key;
  at("cards").replaceChildren(...groups.map(([title, items]) => {
    const heading = title ? [make("h3", { textContent: prompts ? title : `${title} (${items.length} shown)` })] : [];
    const cards = make("div", { className: `cards view-${now.view}` + (data.small ? " tiny" : "") }, ...items.map((item) => card(item, now, prompts)));
    return make("section", { className: "group" }, ...heading, cards);
  }));
  at("counts").textContent = counts(now);
  at("more").hidden = !rest;
  focusOn(at("cards"), key);
}

// The arrow keys show the next column at the right, wherever no control needs them for itself.
function turn(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey || event.target.closest("select, input")) return;
  const count = data.columns.length, left = +at("left").value;
  let right = (+at("right").value + step + count) % count;
  if (right === left && count > 2) right = (right + step + count) % count;
  at("right").value = right;
  event.preventDefault();
  draw();
}

fill(at("left"), data.columns, data.left);
fill(at("right"), data.columns, data.right);
fill(at("reward"), data.rewards, data.rewards.indexOf(data.judge));
if (!data.rewards.length) document.querySelectorAll(".controls .scored").forEach((e) => e.remove());
if (data.columns.length < 2) document.querySelector("#view [value=slider]").remove();
at("view").value = data.view;
at("order").value = data.rewards.length ? data.order : "given";
document.querySelector(".controls").hidden = false;
document.querySelector(".controls").addEventListener("change", () => { shown = 1; draw(); });
at("more").firstElementChild.addEventListener("click", () => { shown += 1; draw(); });
at("large").addEventListener("click", (event) => { if (event.target === at("large")) at("large").close(); });
document.addEventListener("keydown", (event) => { if (!at("large").open) turn(event); });
window.addEventListener("beforeprint", () => { document.querySelectorAll("details").forEach((d) => { d.open = true; }); });
draw();
