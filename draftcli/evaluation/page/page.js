"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const STEP = 24; // cards shown at once
let shown = STEP;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function fill(select, names, chosen) {
  names.forEach((name, i) => select.append(make("option", { value: i, textContent: name, selected: name === chosen })));
}

const state = () => ({ left: +at("left").value, right: +at("right").value, reward: data.rewards[+at("reward").value], order: at("order").value });

function difference(item, reward, left, right) {
  const scores = item.scores[reward];
  return scores[left] === null || scores[right] === null ? null : scores[right] - scores[left];
}

function sorted({ left, right, reward, order }) {
  if (order === "given") return [...data.items];
  const sign = order === "worst" ? 1 : -1;
  const key = (item) => { const d = difference(item, reward, left, right); return d === null ? Infinity : sign * d; };
  return [...data.items].sort((a, b) => key(a) - key(b) || a.number - b.number);
}

const number = (value) => (value === null ? "–" : value.toFixed(Math.abs(value) < 0.01 && value ? 5 : 3).replace("-", "−"));
const signed = (value) => (value === null ? "–" : (value > 0 ? "+" : "") + number(value));

function picture(source) {
  const image = make("img", { src: source, alt: "", draggable: false });
  if (data.small) image.className = "small";
  return image;
}

// Two pictures in one frame: drag or arrow keys move the border, a click or Enter enlarges.
function slider(item, left, right, enlarge) {
  const frame = make("div", { className: "compare", tabIndex: 0 });
  const names = [data.columns[left], data.columns[right]];
  frame.setAttribute("role", "slider");
  frame.setAttribute("aria-label", `${names[0]} left, ${names[1]} right: ${item.prompt}`);
  frame.setAttribute("aria-valuemin", 0);
  frame.setAttribute("aria-valuemax", 100);
  frame.append(picture(item.pictures[right]), picture(item.pictures[left]),
    make("span", { className: "l", textContent: names[0] }), make("span", { className: "r", textContent: names[1] }));
  let position = 50, start = null, moved = false;
  const set = (value) => {
    position = Math.min(100, Math.max(0, value));
    frame.style.setProperty("--x", position + "%");
    frame.setAttribute("aria-valuenow", Math.round(position));
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
    if (step) { set(position + step); event.preventDefault(); }
    if (event.key === "Enter" && enlarge) { event.preventDefault(); enlarge(); } // else it also presses what gets the focus
  });
  set(50);
  return frame;
}

function scores(item, reward, left, right) {
  const change = difference(item, reward, left, right);
  return make("p", { className: "scores" }, `${reward} ${number(item.scores[reward][left])} → ${number(item.scores[reward][right])} `,
    make("span", { className: change > 0 ? "up" : change < 0 ? "down" : "", textContent: signed(change) }));
}

function card(item, { left, right, reward }) {
  const open = () => { enlarge(item, left, right); at("large").showModal(); };
  return make("article", { className: "item" }, slider(item, left, right, open),
    make("p", { className: "prompt", textContent: item.prompt, title: `${item.prompt} (seed ${item.seed})` }),
    scores(item, reward, left, right));
}

function enlarge(item, left, right) {
  const close = make("button", { type: "button", textContent: "close", onclick: () => at("large").close() });
  const strip = make("div", { className: "strip" }, ...data.columns.map((name, i) => {
    const button = make("button", { type: "button", onclick: () => enlarge(item, left, i) }, picture(item.pictures[i]), name);
    button.setAttribute("aria-pressed", i === right);
    return button;
  }));
  at("large").firstElementChild.replaceChildren(
    make("div", { className: "bar-top" }, make("p", { textContent: `${item.prompt} · seed ${item.seed}` }), close),
    slider(item, left, right, null), ...data.rewards.map((reward) => scores(item, reward, left, right)), strip);
}

function draw() {
  const now = state(), items = sorted(now);
  at("cards").replaceChildren(...items.slice(0, shown).map((item) => card(item, now)));
  at("more").hidden = shown >= items.length;
}

fill(at("left"), data.columns, data.left);
fill(at("right"), data.columns, data.right);
fill(at("reward"), data.rewards, data.judge);
document.querySelector(".controls").hidden = false;
document.querySelector(".controls").addEventListener("change", draw);
at("more").firstElementChild.addEventListener("click", () => { shown += STEP; draw(); });
at("large").addEventListener("click", (event) => { if (event.target === at("large")) at("large").close(); });
window.addEventListener("beforeprint", () => { document.querySelectorAll("details").forEach((d) => { d.open = true; }); });
draw();
