// ------------------------------------------------------------------------------------------------
// The tables above the pictures, and those in the corner.

function table(head, rows) {
  const line = (tag, cells) => el("tr", {}, ...cells.map((cell) => el(tag, {}, cell)));
  return el("table", {}, el("thead", {}, line("th", head)), el("tbody", {}, ...rows.map((row) => line("td", row))));
}

/** A rate in its interval on a line from 0 to 1, with a mark at one half. */
function bar(rate, low, high) {
  const part = (name, left, width) => {
    const node = el("i", { className: name });
    node.style.left = `${100 * left}%`;
    if (width !== undefined) node.style.width = `${100 * width}%`;
    return node;
  };
  return el("span", { className: "bar" }, part("range", low, high - low), part("half", 0.5), part("rate", rate));
}

/** Win rates of a set, in a category or over all (null); a click on one sorts by it. */
function rateTable(set, category, sortBy) {
  const some = set.rates.filter((rate) => rate[2] === category);
  const scorers = [...new Map(some.map((rate) => [rate[0], rate[1]]))];
  const pairs = [...new Map(some.map((rate) => [JSON.stringify(rate.slice(3, 5)), rate.slice(3, 5)])).values()];
  const rows = pairs.map(([model, against]) => {
    const cells = scorers.map(([scorer]) => {
      const found = some.find((rate) => rate[0] === scorer && rate[3] === model && rate[4] === against);
      if (!found) return "";
      const button = el("button", { type: "button", title: "sort by this" }, found[5], bar(...found.slice(6)));
      button.onclick = () => sortBy(scorer, model, against);
      return button;
    });
    return [model, against, ...cells];
  });
  return table(["model", "against", ...scorers.map(([, title]) => title)], rows);
}

function showSummary(set, category, sortBy) {
  const parts = [];
  if (set.rates.length) {
    const where = category === null ? "" : ` in ${category}`;
    const judges = set.note ? "; of people, over prompts and judges" : "";
    parts.push(el("h2", {}, `Win rates${where}, %`), rateTable(set, category, sortBy));
    parts.push(el("p", { className: "soft" }, `In brackets: 95 % intervals, over prompts${judges}.`));
  }
  if (set.note) parts.push(el("p", { id: "note" }, set.note));
  for (const [heading, head, rows] of set.tables)
    parts.push(el("details", { open: !set.rates.length }, el("summary", {}, heading), table(head, rows)));
  $("summary").replaceChildren(...parts);
}

function showFacts(set) {
  const tables = DATA.about.flatMap(([heading, head, rows]) => [el("h2", {}, heading), table(head, rows)]);
  $("facts").replaceChildren(el("h2", {}, set.title), el("p", {}, set.words), ...tables);
}

