// ------------------------------------------------------------------------------------------------
// The controls, and the keys.

const choices = (id, options) =>
  $(id).replaceChildren(...options.map(([value, text]) => el("option", { value }, text)));

function showSet(index) {
  const set = (view.set = DATA.sets[index]);
  const scorers = [...set.scorers, ...(set.people ? [["people", "people"]] : [])];
  const columns = set.columns.map((name, m) => [m, name]);
  choices("category", [["", "all"], ...[...new Set(set.categories ?? [])].map((name) => [name, name])]);
  choices("a", columns);
  choices("b", columns);
  choices("order", [["", "no score"], ...scorers]);
  choices("wins", [["", "no matter"], ...scorers]);
  choices("loses", [["", "no matter"], ...scorers]);
  $("a").value = columns.length - 1;
  $("b").value = 0;
  $("of-category").hidden = !set.categories;
  $("of-scores").hidden = !scorers.length;
  $("table").style.setProperty("--columns", columns.length);
  showFacts(set);
  showAll();
}

function showAll() {
  showSummary(view.set, $("category").value || null, sortBy);
  show();
}

/** Sort by a win rate of the table: its model less the other. */
function sortBy(scorer, model, against) {
  $("order").value = scorer;
  $("a").value = view.set.columns.indexOf(model);
  $("b").value = view.set.columns.indexOf(against);
  show();
  $("controls").scrollIntoView();
}

function start() {
  document.title = DATA.title;
  $("title").textContent = DATA.title;
  $("judge").hidden = DATA.kind !== "judgement";
  choices("set", DATA.sets.map((set, index) => [index, set.title]));
  $("set").hidden = DATA.sets.length < 2;
  $("set").onchange = () => showSet(+$("set").value);
  $("controls").onsubmit = (event) => event.preventDefault();
  $("controls").onchange = (event) => (event.target.id === "category" ? showAll() : show());
  $("text").oninput = show;
  $("swap").onclick = () => {
    [$("a").value, $("b").value] = [$("b").value, $("a").value];
    show();
  };
  $("curves").hidden = !DATA.curves;
  if (DATA.curves) $("curves").src = DATA.curves;
  $("before").onclick = () => other(-1);
  $("after").onclick = () => other(1);
  $("close").onclick = () => $("large").close();
  $("stage").onclick = () => turn(1);
  new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && drawMore(),
    { rootMargin: "1200px" }).observe($("end"));
  document.addEventListener("keydown", (event) => {
    const pressed = /^(BUTTON|A|SUMMARY)$/.test(event.target.tagName) && /^(Enter| )$/.test(event.key);
    if (typing(event) || pressed) return;
    const act = $("large").open ? LARGE[event.key] : LIST[event.key];
    const digit = +event.key;
    if ($("large").open && digit && $("tabs").children[digit - 1]) $("tabs").children[digit - 1].click();
    else if (act) act();
    else return;
    event.preventDefault();
  });
  showSet(0);
}

const LIST = {
  j: () => walk(view.here + 1), k: () => walk(view.here - 1),
  ArrowDown: () => walk(view.here + 1), ArrowUp: () => walk(view.here - 1),
  "/": () => $("text").focus(),
  Enter: () => view.shown.length && enlarge(Math.max(view.here, 0), +$("a").value),
};
const LARGE = {
  ArrowRight: () => turn(1), ArrowLeft: () => turn(-1), " ": () => turn(1),
  ArrowDown: () => other(1), ArrowUp: () => other(-1), j: () => other(1), k: () => other(-1),
};

start();
