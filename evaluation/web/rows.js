// ------------------------------------------------------------------------------------------------
// The rows: a prompt each, a picture of each column.

const view = { set: null, shown: [], drawn: 0, here: -1, nodes: new Map() };
const CHUNK = 40; // rows that are drawn at once, when the end comes into view

/** How much better column a is than b on image k, under a scorer; null where nobody knows. Of
 * people it is a share of their votes. */
function gap(scorer, a, b, k) {
  const { set } = view;
  if (a === b) return 0;
  if (scorer === "people") {
    const votes = set.people?.[`${Math.min(a, b)} ${Math.max(a, b)}`]?.[k];
    if (!votes) return null;
    return ((a < b ? 1 : -1) * (votes[0] - votes[1])) / (votes[0] + votes[1] + votes[2]);
  }
  const scores = set.scores[set.scorers.findIndex(([name]) => name === scorer)];
  return scores[a][k] - scores[b][k];
}

/** The images that the controls ask for, in their order. */
function chosen() {
  const { set } = view;
  const words = $("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const texts = set.prompts.map((prompt) => prompt.toLowerCase());
  const fits = texts.map((text) => words.every((word) => text.includes(word)));
  const category = $("category").value, a = +$("a").value, b = +$("b").value;
  const wins = $("wins").value, loses = $("loses").value;
  const found = set.images.map((_, k) => k).filter((k) =>
    fits[set.images[k][0]] && (!category || set.categories[k] === category) &&
    (!wins || gap(wins, a, b, k) > 0) && (!loses || (gap(loses, a, b, k) ?? 0) < 0));
  const scorer = $("order").value;
  if (!scorer) return found;
  const key = new Map(found.map((k) => [k, gap(scorer, a, b, k) ?? -Infinity]));
  return found.sort((one, other) => key.get(other) - key.get(one) || one - other);
}

function show() {
  view.shown = chosen();
  view.drawn = 0;
  view.here = -1;
  view.nodes.clear();
  $("rows").replaceChildren();
  const all = view.set.images.length;
  $("count").value = `${view.shown.length.toLocaleString("en")} of ${all.toLocaleString("en")}`;
  drawMore();
}

function drawMore() {
  const end = Math.min(view.drawn + CHUNK, view.shown.length);
  if (end === view.drawn) return;
  const chunk = el("div", { className: "chunk" });
  for (; view.drawn < end; view.drawn++) chunk.append(row(view.drawn));
  $("rows").append(chunk);
}

const number = (value) => (Math.abs(value) >= 10 ? value.toFixed(2) : value.toPrecision(4));

function row(i) {
  const { set } = view, k = view.shown[i], [text, seed] = set.images[k];
  const scorer = $("order").value, a = +$("a").value, b = +$("b").value;
  const facts = [`${k + 1}`];
  if (set.categories) facts.push(set.categories[k]);
  if (seed !== null) facts.push(`seed ${seed}`);
  const difference = scorer ? gap(scorer, a, b, k) : null;
  if (difference !== null) facts.push(`A less B: ${number(difference)}`);
  const about = el("div", {},
    el("p", { className: "prompt", dir: "auto" }, set.prompts[text]),
    el("p", { className: "soft", dir: "auto" }, facts.join(" · ")));
  const node = el("div", { className: "row" }, about, ...set.columns.map((_, m) => cell(i, k, m, scorer, a, b)));
  view.nodes.set(i, node);
  return node;
}

function cell(i, k, m, scorer, a, b) {
  const { set } = view;
  if (!set.files[m][k]) return el("div", { className: "cell" });
  const image = el("img", { loading: "lazy", decoding: "async", alt: set.columns[m] });
  image.onload = () => image.classList.toggle("pixels", image.naturalWidth <= SMALL);
  image.src = set.files[m][k];
  const button = el("button", { type: "button", onclick: () => enlarge(i, m) }, image);
  const at = set.scorers.findIndex(([name]) => name === scorer);
  const score = at < 0 ? "" : ` ${number(set.scores[at][m][k])}`;
  const node = el("div", { className: "cell" }, button, el("p", { dir: "auto" }, set.columns[m] + score));
  const against = m === a ? b : m === b ? a : m;
  if (scorer && gap(scorer, m, against, k) > 0) node.classList.add("better");
  return node;
}

/** Go to row i of those shown, as far as there is one. */
function walk(i) {
  i = Math.max(0, Math.min(i, view.shown.length - 1));
  if (i < 0 || !view.shown.length) return;
  while (i >= view.drawn) drawMore();
  view.nodes.get(view.here)?.classList.remove("here");
  view.here = i;
  const node = view.nodes.get(i);
  node.classList.add("here");
  node.scrollIntoView({ block: "center" });
}

