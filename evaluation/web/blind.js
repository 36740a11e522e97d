// ------------------------------------------------------------------------------------------------
// What is kept: of each judge a seed, and votes {pair, swapped, choice, time} that name no model.

let judge = "", kept = { seed: 0, votes: [] }, order = [], ready = false;
const place = () => `blind votes ${DATA.id} ${judge}`;

function remember() {
  try {
    localStorage.setItem(place(), JSON.stringify(kept));
  } catch {
    $("said").textContent = "This browser keeps nothing for this page: save your votes before you leave it.";
  }
}

function recall() {
  kept = { seed: Math.floor(2 ** 32 * Math.random()), votes: [] };
  try {
    const there = JSON.parse(localStorage.getItem(place()));
    if (Array.isArray(there?.votes)) kept = there;
  } catch { /* nothing is kept, or nothing that can be read */ }
}

/** Numbers in [0, 1) that a seed decides (mulberry32). */
function dice(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let x = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Every second pair comes in the order of the page, so that judges meet, and the others in an order
 * of this judge's own, so that they see more together. */
function makeOrder() {
  const shared = DATA.pairs.map((_, pair) => pair), own = [...shared], random = dice(kept.seed);
  for (let i = own.length - 1; i > 0; i--) {
    const j = Math.floor((i + 1) * random());
    [own[i], own[j]] = [own[j], own[i]];
  }
  order = [...new Set(shared.flatMap((pair, i) => [pair, own[i]]))];
}

const swapped = (pair) => dice(kept.seed ^ Math.imul(pair + 1, 0x9e3779b1))() < 0.5;
const addresses = (pair) => {
  const [, one, two] = DATA.pairs[pair];
  return swapped(pair) ? [two, one] : [one, two];
};

// ------------------------------------------------------------------------------------------------
// What is shown: both pictures at once and of one size, when both are there.

async function pictures(pair) {
  const both = addresses(pair).map((src, side) => el("img", { src, alt: side ? "right picture" : "left picture" }));
  await Promise.all(both.map((image) => image.decode().catch(() => {})));
  const small = both.every((image) => image.naturalWidth <= SMALL);
  for (const image of both) image.classList.toggle("pixels", small);
  return both;
}

async function next() {
  ready = false;
  const votes = kept.votes.length, pair = order[votes];
  $("bar").max = order.length;
  $("bar").value = votes;
  $("done").textContent = `${votes} of ${order.length}`;
  $("undo").disabled = !votes;
  for (const id of ["one", "tie", "two"]) $(id).disabled = votes === order.length;
  $("pair").replaceChildren();
  if (votes === order.length) {
    $("prompt").textContent = "That was the last pair. Thank you. Now save your votes.";
    return;
  }
  $("prompt").textContent = DATA.prompts[DATA.pairs[pair][0]];
  const both = await pictures(pair);
  if (kept.votes.length !== votes) return; // undone meanwhile
  $("pair").replaceChildren(...both);
  ready = true;
  if (votes + 1 < order.length) for (const src of addresses(order[votes + 1])) new Image().src = src;
}

function vote(choice) {
  if (!ready) return;
  $("said").textContent = "";
  const pair = order[kept.votes.length];
  kept.votes.push({ pair, swapped: swapped(pair), choice, time: new Date().toISOString() });
  remember();
  next();
}

function undo() {
  if (!kept.votes.length) return;
  kept.votes.pop();
  remember();
  $("said").textContent = "The last vote is taken back.";
  next();
}

// ------------------------------------------------------------------------------------------------
// What is saved: here, and nowhere else, the key is read.

function votesJson() {
  const key = JSON.parse(atob(DATA.key));
  const votes = kept.votes.map(({ pair, swapped, choice, time }) => {
    const [set, image, seed, one, two] = key.pairs[pair];
    const models = swapped ? [two, one] : [one, two];
    return { set, image, prompt: DATA.prompts[DATA.pairs[pair][0]], seed, models, choice, time };
  });
  return JSON.stringify({ judge, models: key.models, votes }, null, 1) + "\n";
}

function save() {
  const link = el("a", { href: URL.createObjectURL(new Blob([votesJson()], { type: "application/json" })) });
  link.download = judge ? `votes-${judge.replace(/[^\p{L}\p{N}]+/gu, "-")}.json` : "votes.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  $("said").textContent = `${kept.votes.length} votes are saved as ${link.download}.`;
}

// ------------------------------------------------------------------------------------------------

function start() {
  judge = $("name").value.trim();
  recall();
  makeOrder();
  $("welcome").hidden = true;
  $("judging").hidden = false;
  document.activeElement.blur();
  next();
}

$("back").hidden = location.hash !== "#results";
$("welcome").onsubmit = (event) => {
  event.preventDefault();
  start();
};
const BUTTONS = { one: () => vote("left"), tie: () => vote("tie"), two: () => vote("right"), undo, save };
for (const [id, act] of Object.entries(BUTTONS)) $(id).onclick = act;
document.addEventListener("keydown", (event) => {
  if (typing(event) || event.repeat || $("judging").hidden) return;
  const id = { 1: "one", 0: "tie", 2: "two", z: "undo", Backspace: "undo", s: "save" }[event.key];
  if (!id) return;
  event.preventDefault();
  BUTTONS[id]();
});
