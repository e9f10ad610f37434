"use strict";
performance.mark("begin");
(() => {
  const byId = (id) => document.getElementById(id);
  const parse = (id) => JSON.parse(byId(id).textContent);
  const found = parse("data");
  const pictures = parse("pictures");
  const list = found.list;
  const total = list.rows.length;
  const names = { ids: "id", labels: "given", suggested: "suggested",
    true_labels: "truly", ...found.columns };
  const LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    + "0123456789-_";

  // Elements and texts. Whatever data holds is put in as text.

  const make = (tag, className, ...children) => {
    const element = document.createElement(tag);
    if (className) {
      element.className = className;
    }
    element.append(...children);
    return element;
  };
  const button = (text, action) => {
    const element = make("button", "", text);
    element.type = "button";
    element.addEventListener("click", action);
    return element;
  };
  const count = (n) => n.toLocaleString("en");
  const plural = (n) => `${count(n)} sample${n === 1 ? "" : "s"}`;
  const share = (value) => (value === null ? "–" : value.toFixed(3));
  const good = list.labels ? "label is right" : "sample is good";
  const MAX_OPTIONS = 1000;  // of a menu
  const number = (value) => {
    if (value === null) {
      return "–";
    }
    const size = Math.abs(value);
    const plain = size === 0 || (size >= 1e-4 && size < 1e4);
    const text = plain ? String(value)
      : value.toExponential(3).replace(/\.?0*e/, "e");
    return text.replace(/^-/, "\u2212");
  };
  const printable = (text) => {
    // As samples.text has it: what doesn't print gets a sign in its place.
    const whole = text.length > 200 ? `${text.slice(0, 199)}…` : text;
    return whole.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, "\ufffd");
  };
  const quality = (i) => (list.quality ? list.quality[i] : null);
  const given = (i) => (list.labels ? list.labels[i] : null);
  const suggested = (i) => (list.suggested ? list.suggested[i] : null);
  const truth = (i) => (list.true_labels ? list.true_labels[i] : null);
  const nameOf = (label) => list.classes[label][1] || "(empty)";
  const say = (text) => {
    byId("said").textContent = text;
  };

  const place = new Map(list.rows.map((row, i) => [row, i]));
  const cardImages = new Map();
  for (const card of document.querySelectorAll(".card")) {
    const image = card.querySelector("img");
    if (image) {
      cardImages.set(Number(card.dataset.row), image.src);
    }
  }
  const hasImages = cardImages.size > 0;
  const picture = (i) =>
    cardImages.get(list.rows[i]) ?? pictures[list.rows[i]] ?? null;

  // What was decided: by the scores, unless a person says otherwise.

  const decided = new Map();  // of a row: {decision, label}
  const undos = [];
  let keeps = true;  // whether this browser stores anything for the page
  const key = `gradmimic ${list.fingerprint}`;
  const indexOf = new Map(list.ids.map((id, i) => [id, i]));
  const classOf = new Map(list.classes.map(([value], k) => [value, k]));

  const byScores = (i) => (list.keep[i] === "1" ? "keep" : "remove");
  const decision = (i) => decided.get(i)?.decision ?? byScores(i);

  const load = () => {
    decided.clear();
    let stored = [];
    try {
      stored = JSON.parse(localStorage.getItem(key) ?? "[]");
    } catch {
      keeps = false;
    }
    for (const one of Array.isArray(stored) ? stored : []) {
      const [id, what, value] = Array.isArray(one) ? one : [];
      const i = indexOf.get(id);
      const label = classOf.get(value);
      if (i === undefined || !["keep", "remove", "relabel"].includes(what)
          || (what === "relabel" && label === undefined)) {
        continue;  // of another page, or not of ours
      }
      decided.set(i, { decision: what, label: label ?? null });
    }
  };
  const store = () => {
    try {
      if (decided.size) {
        localStorage.setItem(key, JSON.stringify(
          [...decided].map(([i, one]) => [list.ids[i], one.decision,
            one.label === null ? null : list.classes[one.label][0]])));
      } else {
        localStorage.removeItem(key);
      }
      keeps = true;
    } catch {
      keeps = false;
    }
  };

  /** Decides on samples; null leaves them to the scores again. */
  const decide = (rows, what, labels) => {
    undos.push(rows.map((i) => [i, decided.get(i)]));
    for (const i of rows) {
      if (what === null) {
        decided.delete(i);
      } else {
        const label = what === "relabel" ? labels(i) : null;
        decided.set(i, { decision: what, label });
      }
    }
    changed(rows);
    const words = { keep: "kept", remove: "removed", relabel: "relabelled" };
    const who = rows.length === 1
      ? `${names.ids} ${printable(list.ids[rows[0]])}` : plural(rows.length);
    say(what === null ? `${who}: as the scores have it.`
      : `${who}: ${words[what]}${what === "relabel" && rows.length === 1
        ? ` as ${nameOf(labels(rows[0]))}` : ""}.`);
  };
  const undo = () => {
    const last = undos.pop();
    for (const [i, before] of last ?? []) {
      if (before) {
        decided.set(i, before);
      } else {
        decided.delete(i);
      }
    }
    changed((last ?? []).map(([i]) => i));
    say("Undone.");
  };
  const takeSuggestion = (rows) => {
    const other = rows.filter(
      (i) => suggested(i) !== null && suggested(i) !== given(i)
        && mayBe(suggested(i)));
    if (other.length) {
      decide(other, "relabel", suggested);
    } else {
      say("No other label is suggested.");
    }
  };
  // Text without a letter would be no label in a file.
  const mayBe = (label) => list.classes[label][0] !== "";

  const changed = (rows) => {
    store();
    for (const i of rows) {
      for (const refresh of views.get(i) ?? []) {
        refresh();
      }
    }
    if (rows.length > 1) {
      redraw();
    }
    counts();
    dialogRefresh();
  };
  const counts = () => {
    let removed = list.removals;
    let relabelled = 0;
    for (const [i, one] of decided) {
      removed += (one.decision === "remove") - (byScores(i) === "remove");
      relabelled += one.decision === "relabel";
    }
    byId("count").textContent = `Decided by you: ${count(decided.size)}. `
      + `To remove now: ${count(removed)}`
      + (relabelled ? `; relabelled: ${count(relabelled)}.` : ".");
    byId("storage").textContent = keeps
      ? "This browser keeps your decisions for this page."
      : "This browser keeps nothing: download the file before you leave.";
    byId("undo").disabled = !undos.length;
    byId("forget").disabled = !decided.size;
  };

  // The parts of a sample's row, card and large view.

  const views = new Map();  // of a row: functions that bring it up to date
  const view = (i, refresh) => {
    views.set(i, (views.get(i) ?? new Set()).add(refresh));
    refresh();
    return refresh;
  };
  const stateText = (i) => {
    const mine = decided.get(i);
    if (!mine) {
      return byScores(i);
    }
    return mine.decision === "relabel"
      ? `→ ${nameOf(mine.label)}` : `${mine.decision}, by you`;
  };
  const showState = (element, i) => {
    element.textContent = stateText(i);
    element.className =
      `state ${decision(i) === "remove" ? "dropped" : "kept"}`
      + (decided.has(i) ? " mine" : "");
  };
  const actions = (i) => {
    const all = make("div", "actions");
    const one = (text, what) => {
      const element = button(text, () => decide([i], what));
      element.setAttribute("aria-label",
        `${text} ${names.ids} ${printable(list.ids[i])}`);
      all.append(element);
      return element;
    };
    const keep = one("Keep", "keep");
    const remove = one("Remove", "remove");
    if (list.labels) {
      const label = button("Label…", () => enlarge(i, true));
      label.setAttribute("aria-label",
        `Choose a label for ${names.ids} ${printable(list.ids[i])}`);
      label.setAttribute("aria-haspopup", "dialog");
      all.append(label);
    }
    const refresh = () => {
      const now = decision(i);
      keep.setAttribute("aria-pressed", String(now !== "remove"));
      remove.setAttribute("aria-pressed", String(now === "remove"));
    };
    return [all, refresh];
  };

  const parsed = make("div");
  parsed.innerHTML = "<svg></svg>";
  const draw = (tag, attributes) => {
    const element = document.createElementNS(
      parsed.firstChild.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) {
      element.setAttribute(name, value);
    }
    return element;
  };
  const levels = (signs) => [...signs].map((sign) => LEVELS.indexOf(sign));
  const line = (i, width, height) => {
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`,
      class: "spark", width, height, preserveAspectRatio: "none" });
    const n = list.steps.length;
    const x = (t) => (n === 1 ? width / 2 : 3 + (width - 6) * t / (n - 1));
    const y = (level) => 3 + (height - 6) * (1 - level / 63);
    const path = (values) => {
      let text = "";
      values.forEach((level, t) => {
        if (level >= 0) {
          const pen = t && values[t - 1] >= 0 ? "L" : "M";
          text += `${pen}${x(t).toFixed(1)} ${y(level).toFixed(1)}`;
          // A single one is a dot: a line of no length, with round ends.
          text += pen === "M" ? "h0" : "";
        }
      });
      return text;
    };
    const cuts = levels(list.cuts);
    if (n === 1 && cuts[0] >= 0) {
      svg.append(draw("path", { class: "cuts",
        d: `M3 ${y(cuts[0]).toFixed(1)}H${width - 3}` }));
    } else {
      svg.append(draw("path", { class: "cuts", d: path(cuts) }));
    }
    svg.append(draw("path", { class: n === 1 ? "places dot" : "places",
      d: path(levels(list.lines[i])) }));
    return svg;
  };
  const inWords = (i) => {
    const places = levels(list.lines[i]);
    const percent = (level) => (level < 0 ? "none"
      : `${Math.round(100 * (level + 0.5) / 64)}%`);
    if (places.length === 1) {
      return `Its score is above those of ${percent(places[0])} of all samples.`;
    }
    return `Share of samples with a lower score: ${percent(places[0])} at`
      + ` ${stepName(0)}, ${percent(places.at(-1))} at`
      + ` ${stepName(places.length - 1)}.`;
  };
  const stepName = (t) => (/^[0-9]+$/.test(list.steps[t])
    ? `${found.unit} ${list.steps[t]}` : list.steps[t]);

  const KEYS = {
    k: (i) => decide([i], "keep"),
    r: (i) => decide([i], "remove"),
    Delete: (i) => decide([i], "remove"),
    s: (i) => list.suggested && takeSuggestion([i]),
    l: (i) => list.labels && enlarge(i, true),
    u: (i) => decide([i], null),
    Enter: (i) => enlarge(i),
    " ": (i) => enlarge(i),
  };
  /** Runs what a key does to a sample; false if it does nothing. */
  const press = (event, i) => {
    const on = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey
        || on.matches("select, input")
        || (on.matches("button") && [" ", "Enter"].includes(event.key))) {
      return false;
    }
    const action = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
    if (!action || i === undefined) {
      return false;
    }
    event.preventDefault();
    action(i);
    return true;
  };

  // The list: of its rows, only those in sight are in the document.

  const viewport = byId("viewport");
  const sheet = byId("sheet");
  const search = byId("search");
  const filters = {
    given: byId("given-filter"),
    suggested: byId("suggested-filter"),
    decision: byId("decision-filter"),
  };
  const order = byId("order");
  const texts = list.ids.map((id, i) =>
    (list.captions ? `${id}\n${list.captions[i]}` : id).toLowerCase());
  const drawn = new Map();  // by position
  let shown = [];
  let current = 0;
  let rowHeight = 64;

  const columns = [
    hasImages && ["picture", "", (i) => {
      const source = picture(i);
      if (!source) {
        return make("span", "none", "no picture");
      }
      const image = make("img");
      image.src = source;
      image.alt = "";
      return image;
    }],
    ["what", found.columns.ids ?? "id", (i) => {
      const id = make("bdi", "id", printable(list.ids[i]));
      id.title = printable(list.ids[i]);
      const parts = [id];
      if (list.captions && list.captions[i]
          && list.captions[i] !== list.ids[i]) {
        const text = make("span",
          found.tokens ? "caption tokens" : "caption", list.captions[i]);
        text.dir = "auto";
        parts.push(text);
      }
      return make("span", "", ...parts);
    }],
    list.labels && ["given", names.labels, (i) => {
      const parts = [make("bdi", "", nameOf(given(i)))];
      if (truth(i) !== null && truth(i) !== given(i)) {
        parts.push(make("span", "true",
          `${names.true_labels} `, make("bdi", "", nameOf(truth(i)))));
      }
      return make("span", "", ...parts);
    }],
    list.suggested && ["suggested", names.suggested, (i) =>
      make("bdi", suggested(i) === given(i) ? "same" : "other",
        nameOf(suggested(i)))],
    ["p", "P(keep)", (i) => share(list.p[i])],
    ["quality", "quality", (i) => share(quality(i))],
    ["score", "mean score", (i) => number(list.score[i])],
    ["line", `${found.unit}s`, (i) => {
      const svg = line(i, 96, 34);
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", inWords(i));
      return svg;
    }],
    ["decide", "decision", null],
  ].filter(Boolean);

  const makeRow = (position) => {
    const i = shown[position];
    const row = make("div", "row");
    row.setAttribute("role", "row");
    row.setAttribute("aria-rowindex", position + 2);
    row.dataset.position = position;
    row.style.top = `${position * rowHeight}px`;
    const refreshes = [];
    for (const [kind, heading, content] of columns) {
      const cell = make("div", `cell ${kind}`);
      cell.setAttribute("role", "gridcell");
      cell.dataset.heading = heading;
      if (content) {
        cell.append(content(i));
      } else {
        const state = make("span");
        const [all, refresh] = actions(i);
        cell.append(state, all);
        refreshes.push(refresh, () => showState(state, i));
      }
      row.append(cell);
    }
    const refresh = view(i, () => refreshes.forEach((one) => one()));
    return { row, forget: () => {
      views.get(i).delete(refresh);
      row.remove();
    } };
  };
  const setCurrent = (row, is) => {
    row.tabIndex = is ? 0 : -1;
    for (const one of row.querySelectorAll("button")) {
      one.tabIndex = is ? 0 : -1;
    }
  };
  const drawRows = () => {
    const first = Math.floor(viewport.scrollTop / rowHeight) - 6;
    const last = first + Math.ceil(viewport.clientHeight / rowHeight) + 12;
    for (const [position, one] of drawn) {
      // The current row stays: it may have the focus.
      if ((position < first || position > last) && position !== current) {
        one.forget();
        drawn.delete(position);
      }
    }
    const wanted = [];
    for (let p = Math.max(0, first); p <= last && p < shown.length; p += 1) {
      wanted.push(p);
    }
    if (current < shown.length && !wanted.includes(current)) {
      wanted.push(current);
    }
    for (const p of wanted) {
      if (!drawn.has(p)) {
        const one = makeRow(p);
        drawn.set(p, one);
        setCurrent(one.row, p === current);
        const next = [...sheet.children].find(
          (other) => Number(other.dataset.position) > p);
        sheet.insertBefore(one.row, next ?? null);
      }
    }
  };
  const redraw = () => {
    const focused = sheet.contains(document.activeElement);
    for (const one of drawn.values()) {
      one.forget();
    }
    drawn.clear();
    drawRows();
    if (focused) {
      drawn.get(current)?.row.focus({ preventScroll: true });
    }
  };
  const measure = () => {
    const probe = make("div", "row");
    probe.style.visibility = "hidden";
    sheet.append(probe);
    rowHeight = probe.offsetHeight || rowHeight;
    probe.remove();
    sheet.style.height = `${shown.length * rowHeight}px`;
  };
  const moveTo = (position) => {
    if (!shown.length) {
      return;
    }
    const to = Math.min(shown.length - 1, Math.max(0, position));
    if (drawn.has(current)) {
      setCurrent(drawn.get(current).row, false);
    }
    current = to;
    const head = byId("head").offsetHeight;
    const top = to * rowHeight;
    const room = viewport.clientHeight - head;
    if (top < viewport.scrollTop) {
      viewport.scrollTop = top;
    } else if (top + rowHeight > viewport.scrollTop + room) {
      viewport.scrollTop = top + rowHeight - room;
    }
    drawRows();
    setCurrent(drawn.get(current).row, true);
    drawn.get(current).row.focus({ preventScroll: true });
  };

  const COMPARE = {
    place: (a, b) => a - b,
    "-place": (a, b) => b - a,
    doubt: (a, b) => Math.abs((list.p[a] ?? 9) - 0.5)
      - Math.abs((list.p[b] ?? 9) - 0.5) || a - b,
    score: (a, b) => (list.score[a] ?? Infinity) - (list.score[b] ?? Infinity)
      || a - b,
    "-score": (a, b) => (list.score[b] ?? -Infinity)
      - (list.score[a] ?? -Infinity) || a - b,
  };
  const collator = new Intl.Collator("en", { numeric: true });
  const matches = {
    given: (value) => (i) => given(i) === Number(value),
    suggested: (value) => (value === "other"
      ? (i) => suggested(i) !== given(i)
      : (i) => suggested(i) === Number(value)),
    decision: (value) => ({
      mine: (i) => decided.has(i),
      open: (i) => !decided.has(i),
    }[value] ?? ((i) => decision(i) === value)),
  };
  const update = () => {
    const words = search.value.trim().toLowerCase();
    const tests = Object.entries(filters)
      .filter(([, control]) => control && control.value !== "")
      .map(([name, control]) => matches[name](control.value));
    if (words) {
      tests.push((i) => texts[i].includes(words));
    }
    shown = [];
    for (let i = 0; i < total; i += 1) {
      if (tests.every((test) => test(i))) {
        shown.push(i);
      }
    }
    if (order.value === "id") {
      shown.sort((a, b) => collator.compare(list.ids[a], list.ids[b]) || a - b);
    } else {
      shown.sort(COMPARE[order.value]);
    }
    current = 0;
    viewport.scrollTop = 0;
    viewport.setAttribute("aria-rowcount", shown.length + 1);
    byId("shown").value = shown.length === total ? plural(total)
      : `${count(shown.length)} of ${plural(total)}`;
    byId("nothing").hidden = shown.length > 0;
    byId("elsewhere").textContent = total === list.samples ? ""
      : `This list has ${count(total)} of the ${plural(list.samples)}; the`
        + " others are kept unless the selection's file says otherwise.";
    for (const one of document.querySelectorAll("[data-all], #copy")) {
      one.disabled = !shown.length;
    }
    measure();
    redraw();
  };
  const clear = () => {
    for (const control of [search, ...Object.values(filters)]) {
      if (control) {
        control.value = "";
      }
    }
  };
  /** Shows the samples of a pair of labels. */
  const showPair = (values, words) => {
    clear();
    [filters.given, filters.suggested].forEach((control, k) => {
      // A label that no row of the list has is none to choose yet.
      const label = String(classOf.get(values[k]) ?? -1);
      control.value = label;
      if (control.value !== label) {
        control.append(new Option(words[k] || "(empty)", label));
        control.value = label;
      }
    });
    update();
    byId("list").scrollIntoView();
    viewport.focus({ preventScroll: true });
    moveTo(0);
    say(`${plural(shown.length)}: ${words.join(", ")}.`);
  };

  /** Says in a menu how many of all classes it leaves out. */
  const limitNote = (control, n) => {
    if (n > MAX_OPTIONS) {
      const note = new Option(`… ${count(n - MAX_OPTIONS)} others`, "");
      note.disabled = true;
      control.append(note);
    }
  };

  // A sample at large.

  const dialog = byId("large");
  let large = null;  // its row, and the rows to go through
  let dialogRefresh = () => {};
  const enlarge = (i, toLabel = false) => {
    const around = shown.includes(i) ? shown
      : [...document.querySelectorAll(".card")]
        .map((card) => place.get(Number(card.dataset.row)));
    large = { i, around };
    fill();
    if (!dialog.open) {
      dialog.showModal();
    }
    dialog.querySelector(toLabel && list.labels ? "select" : "h2").focus();
  };
  const step = (by) => {
    const { i, around } = large;
    const to = around[around.indexOf(i) + by];
    if (to !== undefined) {
      large = { i: to, around };
      fill();
      dialog.querySelector("h2").focus();
    }
  };
  const fact = (term, value, about) => {
    const about_ = about ? [make("span", "small", ` ${about}`)] : [];
    return make("div", "", make("dt", "", term),
      make("dd", "", make("bdi", "", value), ...about_));
  };
  const fill = () => {
    const { i, around } = large;
    byId("large-title").textContent = printable(list.ids[i]);
    const parts = [];
    const source = picture(i);
    if (source) {
      const image = make("img");
      image.src = source;
      image.alt = `Sample ${printable(list.ids[i])}`;
      image.addEventListener("load", () => {
        image.classList.toggle("coarse", image.naturalWidth < 64);
      });
      parts.push(image);
    } else if (hasImages) {
      parts.push(make("p", "small",
        "No picture: the page has those of the worst samples."));
    }
    if (list.captions && list.captions[i]) {
      const text = make("p", found.tokens ? "caption tokens" : "caption",
        list.captions[i]);
      text.dir = "auto";
      parts.push(text);
    }
    const sample = make("div", "sample", ...parts.splice(0));
    const facts = make("dl", "facts");
    if (list.labels) {
      facts.append(fact(names.labels, nameOf(given(i))));
    }
    if (list.suggested) {
      facts.append(fact(names.suggested, nameOf(suggested(i))));
    }
    if (truth(i) !== null) {
      facts.append(fact(names.true_labels, nameOf(truth(i))));
    }
    facts.append(
      fact("P(keep)", share(list.p[i]),
        `how probable it is that the ${good}; below 0.5 is removed`),
      fact("quality", share(quality(i)),
        "the same, with a little of the scores"),
      fact("mean score", number(list.score[i]), "high pulls toward the reference"),
    );
    parts.push(facts);
    const chart = line(i, 360, 90);
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", inWords(i));
    parts.push(make("figure", "", chart, make("figcaption", "", inWords(i))));
    const state = make("p");
    const [all, refreshActions] = actions(i);
    all.querySelector("[aria-haspopup]")?.remove();
    parts.push(state, all);
    let select = null;
    if (list.labels) {
      select = make("select");
      select.append(new Option("as given", ""));
      const some = new Set([suggested(i), decided.get(i)?.label]
        .filter((k) => k !== null && k !== undefined));
      for (let k = 0; k < Math.min(MAX_OPTIONS, list.classes.length); k += 1) {
        some.add(k);
      }
      for (const k of [...some].sort((a, b) => a - b)) {
        if (k !== given(i) && mayBe(k)) {
          select.append(new Option(nameOf(k), k));
        }
      }
      limitNote(select, list.classes.length);
      select.addEventListener("change", () => {
        if (select.value === "") {
          decide([i], "keep");
        } else {
          decide([i], "relabel", () => Number(select.value));
        }
      });
      const label = make("label", "", "Label ", select);
      const row = make("div", "actions", label);
      if (suggested(i) !== null && suggested(i) !== given(i)
          && mayBe(suggested(i))) {
        row.append(button("Take the suggestion", () => takeSuggestion([i])));
      }
      parts.push(row);
    }
    const at = around.indexOf(i);
    const back = button("Previous", () => step(-1));
    const next = button("Next", () => step(1));
    back.disabled = at <= 0;
    next.disabled = at >= around.length - 1;
    parts.push(make("div", "actions around", back, next,
      button("As the scores have it", () => decide([i], null)),
      button("Close", () => dialog.close())));
    byId("large-body").className = sample.hasChildNodes() ? "sides" : "";
    byId("large-body").replaceChildren(sample, make("div", "", ...parts));
    dialogRefresh = () => {
      if (!dialog.open && large?.i !== i) {
        return;
      }
      showState(state, i);
      refreshActions();
      if (select) {
        select.value = decided.get(i)?.label ?? "";
      }
    };
    dialogRefresh();
  };
  dialog.addEventListener("keydown", (event) => {
    if (!event.target.matches("select, input")) {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by) {
        event.preventDefault();
        step(by);
      } else if (event.key !== "Enter" && event.key !== " "
          && press(event, large.i)) {
        event.stopPropagation();
      }
    }
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) {
      dialog.close();
    }
  });

  // The galleries.

  const setUpGallery = (gallery) => {
    const cards = [...gallery.children]
      .filter((card) => place.has(Number(card.dataset.row)));
    const rowOf = (card) => place.get(Number(card.dataset.row));
    cards.forEach((card, k) => {
      const i = rowOf(card);
      const state = card.querySelector(".state");
      const [all, refresh] = actions(i);
      const svg = line(i, 120, 30);
      svg.setAttribute("role", "img");
      svg.setAttribute("aria-label", inWords(i));
      card.append(svg, all);
      view(i, () => {
        showState(state, i);
        refresh();
      });
      setCurrent(card, k === 0);
      const image = card.querySelector("img") ?? card.querySelector(".caption");
      image?.addEventListener("click", () => enlarge(i));
    });
    gallery.addEventListener("focusin", (event) => {
      const card = event.target.closest(".card");
      for (const one of cards) {
        setCurrent(one, one === card);
      }
    });
    gallery.addEventListener("keydown", (event) => {
      const card = event.target.closest(".card");
      if (!card || press(event, rowOf(card))) {
        return;
      }
      const across = cards.filter(
        (one) => one.offsetTop === cards[0].offsetTop).length;
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across,
        ArrowDown: across }[event.key];
      const to = cards[cards.indexOf(card) + by];
      if (by && to) {
        event.preventDefault();
        to.focus();
      }
    });
  };

  // Files and the clipboard.

  // As _csv.harmless has it: a spreadsheet would run it, or has escaped it.
  const UNSAFE = new RegExp("^(?:[\\x00-\\x20\\u00a0\\u3000\\ufeff]*"
    + "[=+\\-@'\\uff1d\\uff0b\\uff0d\\uff20]|[\\t\\r\\n])");
  const cell = (text) =>
    `"${(UNSAFE.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
  const asCsv = () => {
    const id = (i) => (list.integers ? list.ids[i] : cell(list.ids[i]));
    const label = (k) => {
      const value = k === null ? "" : list.classes[k][0];
      return k === null || list.values_are_integers ? value : cell(value);
    };
    const by = list.whole ? ",person" : "";
    const lines = [`"id","decision","label"${list.whole ? ',"by"' : ""}`];
    for (const [i, one] of [...decided].sort(([a], [b]) => a - b)) {
      lines.push(`${id(i)},${one.decision},${label(one.label)}${by}`);
    }
    for (let i = 0; list.whole && i < total; i += 1) {
      if (byScores(i) === "remove" && !decided.has(i)) {
        lines.push(`${id(i)},remove,,selection`);
      }
    }
    return `${lines.join("\n")}\n`;
  };
  const download = () => {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([asCsv()], { type: "text/csv" }));
    link.download = "decisions.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say("decisions.csv was written.");
  };
  const copy = async () => {
    const text = shown.map((i) => list.ids[i]).join("\n");
    const done = () => say(`${plural(shown.length)} copied.`);
    try {
      await navigator.clipboard.writeText(text);
      done();
    } catch {  // an older browser, or one that wasn't allowed to
      const area = make("textarea", "hidden", text);
      document.body.append(area);
      area.select();
      const could = document.execCommand("copy");
      area.remove();
      byId("copy").focus();
      if (could) {
        done();
      } else {
        say("This browser doesn't let the page copy.");
      }
    }
  };

  // The start.

  const fillFilter = (control, column) => {
    const sizes = new Map();
    for (const k of column) {
      sizes.set(k, (sizes.get(k) ?? 0) + 1);
    }
    const there = [...sizes.keys()].sort((a, b) => sizes.get(b) - sizes.get(a));
    const some = there.slice(0, MAX_OPTIONS).sort(
      (a, b) => collator.compare(nameOf(a), nameOf(b)));
    control.append(...some.map((k) => new Option(nameOf(k), k)));
    limitNote(control, there.length);
  };
  const setUpMatrix = () => {
    const matrix = byId("matrix");
    const cells = [];
    [...(matrix?.tBodies[0].rows ?? [])].forEach((row, a) => {
      [...row.cells].slice(1).forEach((td, b) => {
        if ("none" in td.dataset) {
          return;
        }
        const { values, classes } = found.matrix;
        const one = button(td.textContent,
          () => showPair([values[a], values[b]], [classes[a], classes[b]]));
        one.setAttribute("aria-label", `${td.textContent}: ${names.labels}`
          + ` ${classes[a]}, ${names.suggested} ${classes[b]}; show them`);
        one.tabIndex = cells.length ? -1 : 0;
        cells.push([a, b, one]);
        td.replaceChildren(one);
      });
    });
    // One stop of the Tab key; arrows go to the next number that way.
    matrix?.addEventListener("keydown", (event) => {
      const here = cells.find(([, , one]) => one === event.target);
      const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0],
        ArrowDown: [1, 0] }[event.key];
      if (!here || !by) {
        return;
      }
      event.preventDefault();
      const ahead = ([a, b]) => (a - here[0]) * by[0] + (b - here[1]) * by[1];
      const aside = ([a, b]) => Math.abs((a - here[0]) * by[1])
        + Math.abs((b - here[1]) * by[0]);
      const [to] = cells.filter((one) => ahead(one) > 0).sort((a, b) =>
        aside(a) - aside(b) || ahead(a) - ahead(b));
      if (to) {
        here[2].tabIndex = -1;
        to[2].tabIndex = 0;
        to[2].focus();
      }
    });
    [...(byId("pairs")?.rows ?? [])].forEach((row, k) => {
      const cellOf = row.cells[2];
      const pair = found.pairs[k];
      const one = button(cellOf.textContent, () => showPair(pair.values, [pair.given, pair.suggested]));
      one.setAttribute("aria-label", `${cellOf.textContent}: ${names.labels}`
        + ` ${pair.given}, ${names.suggested} ${pair.suggested}; show them`);
      cellOf.replaceChildren(one);
    });
  };

  if (list.labels) {
    fillFilter(filters.given, list.labels);
  }
  if (list.suggested) {
    fillFilter(filters.suggested, list.suggested);
    setUpMatrix();
  }
  for (const [kind, heading] of columns) {
    const cell = make("div", `cell ${kind}`, heading);
    cell.setAttribute("role", "columnheader");
    byId("head").append(cell);
  }
  viewport.dataset.columns = columns.map(([kind]) => kind).join(" ");
  const widths = { picture: "3.6rem", what: "minmax(7rem, 1fr)",
    given: "minmax(5rem, .6fr)", suggested: "minmax(5rem, .6fr)", p: "4rem",
    quality: "4rem", score: "5.6rem", line: "6.2rem", decide: "12.2rem" };
  viewport.style.setProperty("--columns",
    columns.map(([kind]) => widths[kind]).join(" "));
  load();
  byId("work").hidden = total === 0;
  document.body.classList.add("scripted");
  document.querySelectorAll(".gallery").forEach(setUpGallery);
  for (const control of [...Object.values(filters), order]) {
    control?.addEventListener("change", update);
  }
  search.addEventListener("input", update);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("clear").addEventListener("click", () => {
    clear();
    update();
  });
  for (const one of document.querySelectorAll("[data-all]")) {
    one.addEventListener("click", () => {
      const what = one.dataset.all;
      if (what === "suggestion") {
        takeSuggestion(shown);
      } else {
        decide(shown, what === "reset" ? null : what);
      }
    });
  }
  byId("copy").addEventListener("click", copy);
  byId("undo").addEventListener("click", undo);
  byId("download").addEventListener("click", download);
  byId("forget").addEventListener("click", () => decide([...decided.keys()], null));
  viewport.addEventListener("scroll", () => requestAnimationFrame(drawRows));
  viewport.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(viewport.clientHeight / rowHeight) - 2);
    const to = { ArrowDown: current + 1, ArrowUp: current - 1, Home: 0,
      End: shown.length - 1, PageDown: current + page,
      PageUp: current - page }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      moveTo(to);
    } else {
      press(event, shown[current]);
    }
  });
  sheet.addEventListener("focusin", (event) => {
    const row = event.target.closest(".row");
    const position = Number(row.dataset.position);
    if (position !== current) {
      if (drawn.has(current)) {
        setCurrent(drawn.get(current).row, false);
      }
      current = position;
      setCurrent(row, true);
    }
  });
  sheet.addEventListener("click", (event) => {
    const at = event.target.closest(".picture img, .what, .line");
    if (at) {
      enlarge(shown[Number(at.closest(".row").dataset.position)]);
    }
  });
  window.addEventListener("resize", () => {
    measure();
    redraw();
  });
  window.addEventListener("storage", (event) => {
    if (event.key === key) {  // decided on in another window
      load();
      undos.length = 0;
      views.forEach((all) => all.forEach((refresh) => refresh()));
      counts();
      dialogRefresh();
    }
  });
  update();
  counts();
  performance.mark("ready");
})();
