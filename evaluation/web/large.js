// ------------------------------------------------------------------------------------------------
// A prompt, large: its pictures lie over each other at one place, and one is shown.

let column = 0;

function enlarge(i, m) {
  column = m;
  walk(i);
  if (!$("large").open) $("large").showModal();
  fill();
}

function fill() {
  const { set } = view, k = view.shown[view.here];
  $("large-prompt").textContent = set.prompts[set.images[k][0]];
  $("place").textContent = `${view.here + 1} of ${view.shown.length}`;
  const there = set.columns.map((_, m) => m).filter((m) => set.files[m][k]);
  if (!there.includes(column)) column = there[0];
  $("stage").replaceChildren(...there.map((m) => {
    const image = el("img", { alt: set.columns[m], src: set.files[m][k] });
    image.onload = () => image.classList.toggle("pixels", image.naturalWidth <= SMALL);
    image.dataset.column = m;
    return image;
  }));
  $("tabs").replaceChildren(...there.map((m) => {
    const scores = set.scorers.map(([, title], s) => `${title} ${number(set.scores[s][m][k])}`);
    const lines = [...scores, ...votesFor(m, k)].map((line) => el("small", {}, line));
    const button = el("button", { type: "button", onclick: () => flip(m) }, set.columns[m], ...lines);
    button.dataset.column = m;
    return button;
  }));
  flip(column);
}

/** How many votes column m got on image k against the others, in words; nothing where there are none. */
function votesFor(m, k) {
  let wins = 0, all = 0;
  for (const [pair, votes] of Object.entries(view.set.people ?? {})) {
    const side = pair.split(" ").indexOf(`${m}`);
    if (side < 0 || !votes[k]) continue;
    wins += votes[k][side];
    all += votes[k][0] + votes[k][1] + votes[k][2];
  }
  return all ? [`people ${wins} of ${all}`] : [];
}

function flip(m) {
  column = m;
  for (const image of $("stage").children) image.classList.toggle("shown", +image.dataset.column === m);
  for (const tab of $("tabs").children) {
    tab.setAttribute("aria-pressed", +tab.dataset.column === m);
    if (+tab.dataset.column === m) tab.scrollIntoView({ block: "nearest" });
  }
}

/** The next column by `by` that has a picture, round and round. */
function turn(by) {
  const there = [...$("stage").children].map((image) => +image.dataset.column);
  flip(there[(there.indexOf(column) + by + there.length) % there.length]);
}

function other(by) {
  walk(view.here + by);
  fill();
}

