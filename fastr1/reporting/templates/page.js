"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const json = (id) => JSON.parse($(id).textContent);

  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    try { localStorage.setItem("fastr1-theme", root.dataset.theme); } catch { /* a page on disk may have no storage */ }
  });

  const sheets = json("sheets");
  for (const image of all("img[data-sheet]")) image.src = "data:image/jpeg;base64," + sheets[image.dataset.sheet];

  // Charts: one cursor, at the same update in all of them.
  const data = json("chart-data");
  const figures = all("figure[data-range]").map((figure) => {
    const [first, last] = figure.dataset.range.split(" ").map(Number);
    return { figure, svg: figure.querySelector("svg"), first, last, lines: data[figure.id], values: all(".legend b", figure) };
  });
  const short = (value) => {
    if (value === null) return "–";
    const size = Math.abs(value);
    if (size >= 1e9) return +(value / 1e9).toPrecision(3) + "G";
    if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(size && size < 0.001 ? 2 : 3));
  };
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] < step) low = middle; else high = middle; }
    return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
  };
  let cursor = null;
  const read = (step) => {
    cursor = step;
    for (const { figure, svg, first, last, lines, values } of figures) {
      const line = svg.querySelector(".cursor"), at = figure.querySelector(".at");
      if (step === null) {
        line.setAttribute("visibility", "hidden");
        at.textContent = "";
        values.forEach((value) => { value.textContent = value.dataset.last; });
        continue;
      }
      const x = 48 + 404 * (last > first ? (step - first) / (last - first) : 0.5);
      line.setAttribute("x1", x); line.setAttribute("x2", x);
      line.setAttribute("visibility", step >= first && step <= last ? "visible" : "hidden");
      at.textContent = "· update " + step;
      lines.forEach((points, i) => { values[i].textContent = short(points.values[nearest(points.steps, step)]); });
    }
  };
  for (const { figure, svg, first, last, lines } of figures) {
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width * 460 - 48) / 404;
      read(Math.round(first + Math.min(1, Math.max(0, share)) * (last - first)));
    });
    svg.addEventListener("pointerleave", () => read(null));
    svg.addEventListener("blur", () => read(null));
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const steps = lines[0].steps;
      const place = cursor === null ? steps.length - 1 : nearest(steps, cursor) + move;
      read(steps[Math.min(steps.length - 1, Math.max(0, place))]);
      $("reading").textContent = "update " + cursor + ": " + all(".legend li", figure).map((line) => line.textContent.trim()).join(", ");
    });
  }

  // Filters. Their state outlives a reload of a live page.
  const key = "fastr1-filters" + location.pathname;
  const state = { view: "update", step: "", signal: false, text: "", outcome: "", kind: "", open: [], kept: [], reading: "", focus: "" };
  const isLive = "version" in document.body.dataset;
  try { if (isLive) Object.assign(state, JSON.parse(sessionStorage.getItem(key) || "{}")); } catch { /* begin anew */ }
  // What is open stays open, under a name that a later page has too; groups that it shows no more are taken along.
  const outer = (d) => d.parentElement.closest("[data-key]");
  const name = (d) => d.id || d.dataset.key || outer(d).dataset.key + " " + all("details", outer(d)).indexOf(d);
  if ($("groups")) {
    const there = (group) => all(".group").find((d) => name(d) === group.name);
    const steps = new Set(all("#step option").map((o) => o.value));
    for (const group of state.kept) {
      if (!there(group)) $("groups").insertAdjacentHTML("beforeend", group.html);
      const data = there(group).dataset;  // of one that only a ranking still shows, perhaps
      if (!data.views.split(" ").includes("update")) data.views += " update";
      if (!steps.has(group.step)) $("step").prepend(new Option(group.step + " (opened before)", group.step));
      steps.add(group.step);
    }
  }
  for (const d of all("details")) d.open = state.open.includes(name(d));
  const press = (selector, name, value) => all(selector).forEach((b) => b.setAttribute("aria-pressed", b.dataset[name] === value));

  const groups = all(".group");
  const showGroups = () => {
    if (!$("groups")) return;
    press("#views button", "view", state.view);
    $("step-label").hidden = state.view !== "update";
    let number = 0;
    const words = state.text.toLowerCase();
    for (const group of groups) {
      const isIn = group.dataset.views.split(" ").includes(state.view)
        && (state.view !== "update" || group.dataset.step === $("step").value)
        && (!state.signal || group.dataset.signal === "1")
        && (!words || group.textContent.toLowerCase().includes(words));
      group.hidden = !isIn;
      number += isIn;
    }
    if (state.view !== "update") {
      const place = (group) => Number(group.getAttribute("data-rank-" + state.view));
      $("groups").append(...groups.filter((g) => !g.hidden).sort((a, b) => place(a) - place(b)));
    } else $("groups").append(...groups);
    $("group-count").textContent = number === 1 ? "1 group" : number + " groups";
  };
  const pairs = all(".pair");
  const showPairs = () => {
    if (!$("pairs")) return;
    press("#outcomes button", "outcome", state.outcome);
    let number = 0;
    for (const pair of pairs) {
      const isIn = (!state.outcome || pair.dataset.outcome === state.outcome) && (!state.kind || pair.dataset.kind === state.kind);
      pair.hidden = !isIn;
      number += isIn;
    }
    $("pair-count").textContent = number === 1 ? "1 question" : number + " questions";
  };
  const keep = () => {
    const open = all("details[open]"), groups = open.filter((d) => d.matches(".group"));
    state.open = open.map(name);
    state.kept = groups.map((d) => ({ name: name(d), step: d.dataset.step, html: d.outerHTML }));
    state.reading = state.view === "update" && groups.some((d) => !d.hidden) ? $("step").value : "";
    const active = document.activeElement;
    state.focus = active.matches("summary") ? name(active.parentElement) : active.id;
    try { sessionStorage.setItem(key, JSON.stringify(state)); } catch { /* then it is not kept */ }
  };
  if ($("groups")) {
    const step = state.reading || state.step, far = (other) => Math.abs(other - step);
    if (step && $("step").value) $("step").value = all("#step option").map((o) => o.value).reduce((a, b) => (far(b) < far(a) ? b : a));
    $("signal").checked = state.signal;
    $("group-text").value = state.text;
    all("#views button").forEach((b) => b.addEventListener("click", () => { state.view = b.dataset.view; showGroups(); }));
    $("step").addEventListener("change", () => { state.step = $("step").value; showGroups(); });
    $("signal").addEventListener("change", () => { state.signal = $("signal").checked; showGroups(); });
    $("group-text").addEventListener("input", () => { state.text = $("group-text").value; showGroups(); });
  }
  if ($("pairs")) {
    all("#outcomes button").forEach((b) => b.addEventListener("click", () => { state.outcome = b.dataset.outcome; showPairs(); }));
    if ($("kind")) {
      $("kind").value = state.kind;
      $("kind").addEventListener("change", () => { state.kind = $("kind").value; showPairs(); });
    }
  }
  showGroups();
  showPairs();

  if (isLive) {
    const focused = state.focus && ($(state.focus) || all("details").find((d) => name(d) === state.focus));
    if (focused) (focused.matches("details") ? focused.querySelector("summary") : focused).focus({ preventScroll: true });
    addEventListener("pagehide", keep);
    const ask = async () => {
      try {
        const answer = await fetch("/version", { cache: "no-store" });
        const version = await answer.text();
        $("live").textContent = "live: looks for news every 5 s";
        if (answer.ok && version !== document.body.dataset.version) location.reload();
      } catch {
        $("live").textContent = "the server has stopped; this is the last state";
      }
    };
    setInterval(ask, 5000);
  }
  document.documentElement.dataset.ready = "1";
})();
