// ------------------------------------------------------------------------------------------------
// A prompt, large: its pictures lie over each other at one place, and one is shown.

let column = 0;

function open(i, m) {
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

/** What people said of column m on image k, in words. */
function votesFor(m, k) {
  const { set } = view;
  const wins = set.columns.map((_, other) => {
    if (other === m) return 0;
    const votes = set.people?.[`${Math.min(m, other)} ${Math.max(m, other)}`]?.[k];
    return votes ? votes[m < other ? 0 : 1] : 0;
  });
  return set.people ? [`people ${wins.reduce((sum, n) => sum + n, 0)}`] : [];
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

