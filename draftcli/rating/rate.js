"use strict";
const at = (id) => document.getElementById(id);
const KEYS = { arrowleft: "left", arrowright: "right", arrowdown: "neither", n: "neither", s: "skip" };
const SMALL_EDGE = 192; // pixels: a picture up to this size is enlarged with sharp pixels
const POLL = 1000; // milliseconds between two looks whether the next pair is drawn
let state = null; // what the server said last
let shownAt = null; // when both pictures were there; null while nothing can be answered
let busy = false; // a request is under way
let timer = null;

// ---- asking the server

async function ask(path, body) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, body === undefined ? { cache: "no-store" } : post);
  } catch {
    throw new Error("draftp cannot be reached: has it ended? Every answer is saved. The same command goes on, at a new address.");
  }
  if (response.ok) return response.json();
  if (response.status === 409) return { ...(await response.json()), late: true };
  throw new Error(await response.text());
}

async function go(path, body) {
  if (busy) return;
  setBusy(true);
  clearTimeout(timer);
  try {
    const before = state?.pair?.name;
    state = await ask(path, body);
    tell(state.late ? "That pair was answered in another window." : "");
    await show(before);
  } catch (error) {
    tell(error.message, true);
  } finally {
    setBusy(false);
    document.querySelectorAll(".chosen").forEach((side) => side.classList.remove("chosen"));
  }
  if (state && !state.pair && !state.complete && !state.ended) timer = setTimeout(() => go("state"), POLL);
}

function setBusy(now) {
  busy = now;
  at("content").setAttribute("aria-busy", String(now));
}

function tell(text, bad = false) {
  at("notice").textContent = text;
  at("notice").classList.toggle("bad", bad);
}

// ---- what is shown

async function show(before) {
  const { pair, done, total, complete, ended } = state;
  at("bar").max = Math.max(1, total);
  at("bar").value = done;
  at("count").textContent = `${done} of ${total}`;
  const open = pair !== null && !ended;
  at("pair").hidden = !open;
  at("wait").hidden = open;
  at("prompt").textContent = open ? pair.prompt : "";
  mark("[data-answer]", open);
  mark("#undo", state.undo && !ended);
  mark("#finish", !ended);
  if (!open) {
    shownAt = null;
    if (at("large").open) at("large").close();
    const [text, detail] = ended ? ["Every answer is saved. You can close this page.", "draftp says in the terminal what came of it."]
      : complete ? [`All ${total} pairs are rated.`, "Undo goes back to the last one. Finish ends draftp."]
      : ["The next pair is being drawn.", state.doing];
    at("waiting").textContent = text;
    at("detail").textContent = detail;
    return;
  }
  if (pair.name !== before || shownAt === null) await load(pair);
  for (const name of state.ahead) new Image().src = `picture/${name}`;
}

async function load(pair) {
  shownAt = null;
  const images = ["left", "right"].map(at);
  images.forEach((image) => { image.style.visibility = "hidden"; });
  await Promise.all(images.map(async (image) => {
    image.src = `picture/${pair[image.id]}`;
    try {
      await image.decode();
    } catch {
      throw new Error("An image cannot be shown: its file is missing or damaged. Press Skip to continue.");
    } finally {
      image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL_EDGE);
    }
  })).finally(() => { shownAt = performance.now(); });
  images.forEach((image) => { image.style.visibility = ""; });
  if (at("large").open) enlarge(at("large").dataset.side);
  const text = at("prompt");
  text.scrollTop = 0;
  text.toggleAttribute("tabindex", false);
  if (text.scrollHeight > text.clientHeight) text.tabIndex = 0; // so that the keyboard can scroll it
}

function mark(selector, usable) {
  document.querySelectorAll(selector).forEach((button) => button.setAttribute("aria-disabled", String(!usable)));
}

// ---- answers

function answer(choice) {
  if (busy || shownAt === null || !state?.pair || state.ended) return;
  at(`${choice}-side`)?.classList.add("chosen");
  go("answer", { name: state.pair.name, answer: choice, seconds: (performance.now() - shownAt) / 1000 });
}

const undo = () => { if (state?.undo && !state.ended) go("undo", {}); };

// ---- one picture, as large as the window

function enlarge(side) {
  if (!state?.pair || shownAt === null) return;
  const large = at("large"), image = at("enlarged");
  large.dataset.side = side;
  image.src = at(side).src;
  image.alt = at(side).alt;
  image.className = at(side).className;
  large.querySelectorAll("[data-turn]").forEach((button) =>
    button.setAttribute("aria-pressed", String(button.dataset.turn === side)));
  if (!large.open) large.showModal();
}

// ---- keys, mouse and fingers

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (at("large").open) {
    if (key === "arrowleft" || key === "arrowright") enlarge(KEYS[key]);
    else if (key === "e") at("large").close();
    else return;
  } else if (key === "arrowdown" && document.activeElement === at("prompt")) return; // it scrolls a long prompt
  else if (key in KEYS) answer(KEYS[key]);
  else if (key === "u" || key === "backspace") undo();
  else if (key === "e") enlarge("left");
  else return;
  event.preventDefault();
});
document.querySelectorAll("[data-answer]").forEach((button) =>
  button.addEventListener("click", () => answer(button.dataset.answer)));
document.querySelectorAll("[data-look]").forEach((button) =>
  button.addEventListener("click", () => enlarge(button.dataset.look)));
document.querySelectorAll("[data-turn]").forEach((button) =>
  button.addEventListener("click", () => enlarge(button.dataset.turn)));
at("close").addEventListener("click", () => at("large").close());
at("undo").addEventListener("click", undo);
at("finish").addEventListener("click", () => { if (!state?.ended) go("finish", {}); });
go("state");
