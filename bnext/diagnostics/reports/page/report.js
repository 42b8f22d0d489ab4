"use strict";
// Everything from outside (names of layers, levels, domains) gets into the page as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { paths, norms, findings } = data;
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  function draw(name, attributes = {}, text = "") {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  }

  function format(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 100000)) return value.toExponential(1).replace("e+", "e").replace("-", "−");
    return Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 }).replace("-", "−");
  }

  const whole = (number) => number?.toLocaleString("en") ?? "–"; // counts, which are not rounded
  const count = (number, word) => `${whole(number)} ${word}${number === 1 ? "" : "s"}`;

  // ---- dark and light

  const theme = $("#theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => {
    theme.textContent = isDark() ? "☀ Light" : "☾ Dark";
  };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  prefersDark.addEventListener("change", nameTheme);
  nameTheme();

  // ---- copy

  async function copy(pre) {
    try {
      await navigator.clipboard.writeText(pre.textContent);
    } catch {
      getSelection().selectAllChildren(pre); // where the clipboard is not open to pages
      document.execCommand("copy");
    }
  }

  for (const figure of $$(".paste")) {
    const button = make("button", { type: "button" }, "Copy");
    button.addEventListener("click", async () => {
      await copy($("pre", figure));
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    figure.append(button);
  }

  // ---- inventory: rows of a group are made when it is opened, so that thousands of norms cost nothing

  const MOST_ROWS = 200;
  const query = $("#query");
  const only = $("#only");
  const words = paths.map((path, norm) => {
    const codes = norms.findings[norm].map((number) => findings[number].code);
    return [path, norms.kind[norm], norms.reason[norm], norms.place[norm], ...codes].join(" ").toLowerCase();
  });

  function isShown(norm) {
    if (only && only.value === "findings" && !norms.findings[norm].length) return false;
    if (only && only.value === "frozen" && norms.frozen[norm] === "none") return false;
    if (only && only.value === "trained" && norms.frozen[norm] !== "none") return false;
    const terms = query ? query.value.toLowerCase().split(/\s+/) : [];
    return terms.every((term) => words[norm].includes(term));
  }

  function makeRow(norm) {
    const elements = norms.elements[norm];
    const range = elements && [...new Set(elements)].map(whole).join(" – ");
    const numbers = [norms.channels[norm] || null, norms.together[norm], norms.calls[norm], norms.updates[norm]].map(whole);
    const cells = [...numbers.slice(0, 2), range || "–", ...numbers.slice(2)];
    const row = make("tr", {}, make("th", { scope: "row", class: "path" }, paths[norm] || "the model"));
    row.append(...cells.map((cell) => make("td", {}, cell)));
    const codes = [...new Set(norms.findings[norm].map((number) => findings[number].code))].join(", ");
    row.append(make("td", { class: "words" }, [codes, norms.reason[norm]].filter(Boolean).join("; ")));
    return row;
  }

  function fillGroup(group, most = MOST_ROWS) {
    const body = $("tbody", group);
    const shown = group.members.filter(isShown);
    body.replaceChildren(...shown.slice(0, most).map(makeRow));
    if (shown.length > most) {
      const more = make("button", { type: "button" }, `Show all ${whole(shown.length)}`);
      more.addEventListener("click", () => fillGroup(group, Infinity));
      body.append(make("tr", {}, make("td", { colspan: 7 }, more)));
    }
  }

  const groups = $$(".group");
  for (const group of groups) {
    group.members = [];
    group.addEventListener("toggle", () => group.open && fillGroup(group));
  }
  paths.forEach((_, norm) => groups[norms.group[norm]].members.push(norm));

  function filterInventory() {
    let total = 0;
    for (const group of groups) {
      const number = group.members.filter(isShown).length;
      total += number;
      group.hidden = number === 0;
      if (group.open) fillGroup(group);
    }
    $("#shown").textContent = total === paths.length ? count(total, "norm") : `${whole(total)} of ${count(paths.length, "norm")}`;
  }

  if (query) {
    query.addEventListener("input", filterInventory);
    only.addEventListener("change", filterInventory);
    $("#unfold").addEventListener("click", () => {
      const isOpen = groups.some((group) => !group.open && !group.hidden);
      for (const group of groups) if (!group.hidden) group.open = isOpen;
    });
    filterInventory();
  }

  for (const button of $$(".show")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      query.value = button.dataset.code;
      filterInventory();
      for (const group of groups) group.open = !group.hidden;
      $("#inventory").scrollIntoView();
      query.focus({ preventScroll: true });
    });
  }

  // ---- charts: a column for each norm (and level or domain), with quantiles over its channels

  const cursor = { norm: null, listeners: [] };
  function pointAt(norm) {
    cursor.norm = norm;
    for (const listen of cursor.listeners) listen();
  }

  const quantile = (values, share) => {
    const sorted = [...values].sort((one, other) => one - other);
    return sorted[Math.floor(share * (sorted.length - 1))];
  };

  // A scale maps values to numbers that are drawn evenly: logarithmic for what is positive and spans decades,
  // inverse hyperbolic sine (linear around 0, logarithmic outside) for what has outliers.
  function chooseScale(bands, chart) {
    const present = bands.filter(Boolean);
    const low = Math.min(...present.map((band) => band[0]), chart.include ?? Infinity);
    const high = Math.max(...present.map((band) => band[4]), chart.include ?? -Infinity);
    const most = quantile(present.map((band) => Math.max(Math.abs(band[1]), Math.abs(band[3]))), 0.9) || 0;
    const positive = present.map((band) => band[0]).filter((value) => value > 0);

    if (chart.isPositive && positive.length && high / Math.max(low, 1e-30) > 30) {
      const floor = Math.max(Math.min(...positive), chart.floor ?? high * 1e-9);
      const map = (value) => Math.log10(Math.max(value, floor));
      return { map, low: map(floor), high: map(high) + 0.05, ticks: listDecades(floor, high), isLog: true };
    }
    if (!chart.isPositive && Math.max(Math.abs(low), Math.abs(high)) > 8 * most && most > 0) {
      const map = (value) => Math.asinh((value / most) * 2);
      const sizes = listDecades(most / 2, Math.max(Math.abs(low), Math.abs(high)));
      const ticks = [...sizes.map((size) => -size), 0, ...sizes].filter((tick) => tick >= low && tick <= high);
      return { map, low: map(low), high: map(high), ticks, isLog: true };
    }
    const ticks = listSteps(Math.min(low, chart.isPositive ? 0 : low), high);
    return { map: (value) => value, low: ticks[0], high: Math.max(ticks.at(-1), high), ticks, isLog: false };
  }

  function listSteps(low, high) {
    const rough = (high - low || Math.abs(high) || 1) / 4;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough * 0.999);
    const first = Math.floor(low / step + 1e-9);
    const last = Math.ceil(high / step - 1e-9);
    return Array.from({ length: Math.max(last - first, 1) + 1 }, (_, place) => (first + place) * step);
  }

  function listDecades(low, high) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const steps = Math.log10(high / low) < 2 ? [1, 2, 5] : [1];
    const skip = steps.length > 1 ? 1 : Math.max(1, Math.ceil((last - first) / 6));
    const ticks = [];
    for (let power = first; power <= last; power += skip) ticks.push(...steps.map((step) => step * 10 ** power));
    return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  }

  function nameColumn(column) {
    return `${paths[column.norm] || "the model"}${column.owner ? ` [${column.owner}]` : ""}`;
  }

  function drawChart(figure, chart) {
    const columns = chart.columns.filter((column) => column.band);
    const svg = draw("svg", { class: "plot", tabindex: 0, role: "slider", "aria-label": chart.label,
      "aria-valuemin": 1, "aria-valuemax": columns.length, "aria-valuenow": 1 });
    const readout = make("output", { class: "readout", "aria-live": "polite" });
    figure.append(svg, readout);
    const scale = chooseScale(columns.map((column) => column.band), chart);
    const height = 210 /* as in the style */, left = 52, right = 6, top = 10, bottom = 24;
    let width = 0, line = null, place = null;

    const toX = (number) => left + (number / columns.length) * (width - left - right);
    const toY = (value) => {
      const share = (scale.map(value) - scale.low) / (scale.high - scale.low || 1);
      return top + (1 - Math.min(1, Math.max(0, share))) * (height - top - bottom);
    };

    function findSides(number) {
      const step = toX(1) - toX(0), inset = step > 5 ? step * 0.14 : 0;
      return [toX(number) + inset, toX(number + 1) - inset].map((x) => x.toFixed(2));
    }

    function box(number, low, high) {
      const [from, to] = findSides(number);
      const y = toY(high), size = Math.max(toY(low) - y, 1);
      return `M${from} ${y.toFixed(1)}H${to}v${size.toFixed(1)}H${from}Z`;
    }

    function redraw() {
      const now = Math.floor(svg.clientWidth);
      if (!now || now === width) return;
      width = now;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.replaceChildren();

      for (const tick of scale.ticks) {
        const y = Math.round(toY(tick)) + 0.5;
        svg.append(draw("line", { class: tick === chart.line ? "zero" : "grid", x1: left, x2: width - right, y1: y, y2: y }));
        svg.append(draw("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, format(tick)));
      }
      for (const [name, first, last] of data.sections) {
        const from = columns.findIndex((column) => column.norm >= first && column.norm < last);
        if (from < 0) continue;
        const to = columns.findLastIndex((column) => column.norm >= first && column.norm < last) + 1;
        const x = Math.round(toX(from)) + 0.5, room = toX(to) - toX(from);
        svg.append(draw("line", { class: "grid", x1: x, x2: x, y1: top, y2: height - bottom + 6 }));
        const letters = Math.floor((room - 6) / 7);
        const text = name.length <= letters ? name : `${name.slice(0, Math.max(letters - 1, 0))}…`;
        if (letters > 3) svg.append(draw("text", { x: x + 3, y: height - 8 }, text));
      }

      const middle = columns.map((column, number) => {
        const [from, to] = findSides(number);
        return `M${from} ${toY(column.band[2]).toFixed(1)}H${to}`;
      });
      if (!chart.isBar) {
        svg.append(draw("path", { class: "all", d: columns.map((column, number) => box(number, column.band[0], column.band[4])).join("") }));
        svg.append(draw("path", { class: "most", d: columns.map((column, number) => box(number, column.band[1], column.band[3])).join("") }));
        svg.append(draw("path", { class: "middle", d: middle.join("") }));
      } else {
        svg.append(draw("path", { class: "most", d: columns.map((column, number) => box(number, 0, column.band[4])).join("") }));
      }
      line = draw("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
      svg.append(line);
      show();
    }

    function show() {
      const column = columns[place];
      if (!column) {
        readout.textContent = "Point at a layer, or focus the chart and use the arrow keys.";
        return;
      }
      const x = toX(place + 0.5);
      for (const [key, value] of Object.entries({ x1: x, x2: x, visibility: "visible" })) line?.setAttribute(key, value);
      const [low, less, half, more, high] = column.band.map(format);
      const numbers = chart.isBar ? high : `median ${half}; 80 % of the channels ${less} to ${more}; all ${low} to ${high}`;
      readout.replaceChildren(make("b", { class: "path" }, nameColumn(column)), ` · ${chart.unit}: ${numbers}${column.more || ""}`);
      svg.setAttribute("aria-valuenow", place + 1);
      svg.setAttribute("aria-valuetext", readout.textContent);
    }

    function choose(number) {
      place = Math.min(columns.length - 1, Math.max(0, number));
      pointAt(columns[place].norm);
      show();
    }

    cursor.listeners.push(() => {
      if (columns[place]?.norm === cursor.norm) return;
      const number = columns.findIndex((column) => column.norm === cursor.norm);
      if (number >= 0) {
        place = number;
        show();
      }
    });
    const follow = (event) => {
      const x = event.clientX - svg.getBoundingClientRect().left;
      choose(Math.floor(((x - left) / (width - left - right)) * columns.length));
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.round(columns.length / 10));
      const now = place ?? -1;
      const to = { ArrowRight: now + 1, ArrowUp: now + 1, ArrowLeft: now - 1, ArrowDown: now - 1, PageUp: now + page,
        PageDown: now - page, Home: 0, End: columns.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      choose(to);
    });
    new ResizeObserver(redraw).observe(svg);
    redraw();
    show();
  }

  const listColumns = (table, key, more = () => "") =>
    table.norm.map((norm, place) => ({ norm, owner: table.owner[place], band: table[key][place], more: more(place) }));

  const CHARTS = {
    mean: { table: "profile", unit: "running mean", line: 0, include: 0 },
    std: { table: "profile", unit: "running standard deviation", isPositive: true },
    weight: { table: "profile", unit: "weight", line: 0, include: 0 },
    distance: { table: "comparison", unit: "distance of the means, in standard deviations", isPositive: true, line: 0, floor: 0.01, include: 0.1 },
    ratio: { table: "comparison", unit: "standard deviation over the running one", isPositive: true, line: 1, include: 1 },
  };
  for (const [key, chart] of Object.entries(CHARTS)) {
    const figure = $(`#chart-${key}`);
    if (!figure) continue;
    const table = data[chart.table];
    const invalid = (place) => (key === "weight" || !table.num_invalid?.[place] ? "" : `; ${count(table.num_invalid[place], "channel")} not valid`);
    drawChart(figure, { ...chart, columns: listColumns(table, key, invalid), label: $("figcaption", figure).firstChild.textContent });
  }

  // ---- matrices of distances

  function drawDistances(figure, kind) {
    const slider = $("input", figure), chosen = $("select", figure), name = $(".layer", figure);
    const holder = $(".matrix", figure), readout = $(".readout", figure);
    const largest = kind.means.map((rows) => Math.max(...rows.flat().filter((value) => value !== null), 0));
    slider.max = kind.norm.length - 1;
    slider.value = largest.indexOf(Math.max(...largest));

    function show() {
      const place = Number(slider.value), names = kind.names[place], values = kind[chosen.value][place];
      const isRatio = chosen.value === "ratios";
      const top = Math.max(isRatio ? 2 : 1, ...values.flat().filter((value) => value !== null));
      const path = paths[kind.norm[place]] || "the model";
      name.textContent = path;
      slider.setAttribute("aria-valuetext", path);

      const describe = (row, column) => {
        const words = isRatio ? "standard deviations differ by a factor of" : "means are apart by";
        const unit = isRatio ? "" : " standard deviations";
        return [make("b", {}, `${names[row]} and ${names[column]}`), `: ${words} ${format(values[row][column])}${unit}, averaged over channels.`];
      };
      const head = make("tr", {}, make("td", { class: "same" }), ...names.map((each) => make("th", { scope: "col" }, each)));
      const rows = names.map((each, row) => {
        const cells = names.map((_, column) => {
          const value = values[row][column];
          if (row === column) return make("td", { class: "same" }, "·");
          const share = value === null ? 0 : Math.min(1, isRatio ? Math.log(value) / Math.log(top) : value / top);
          const cell = make("td", { class: share > 0.55 ? "strong" : "", tabindex: row === 0 && column === 1 ? 0 : -1 }, format(value));
          cell.style.setProperty("--share", share);
          const tell = () => readout.replaceChildren(...describe(row, column));
          cell.addEventListener("pointerenter", tell);
          cell.addEventListener("focus", tell);
          return cell;
        });
        return make("tr", {}, make("th", { scope: "row" }, each), ...cells);
      });
      holder.replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
      readout.textContent = "Point at a field, or go to one with the tab and arrow keys.";
    }

    drawChart($(".overview", figure), {
      columns: kind.norm.map((norm, place) => ({ norm, owner: "", band: [0, 0, 0, 0, largest[place]] })),
      unit: "largest distance of two means, in standard deviations", label: "Largest distance of each layer", isPositive: false, isBar: true, line: 0,
    });
    holder.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (!step || !event.target.matches("td")) return;
      event.preventDefault();
      let cell = event.target;
      do cell = holder.querySelector("table").rows[cell.parentNode.rowIndex + step[0]]?.cells[cell.cellIndex + step[1]];
      while (cell?.textContent === "·");
      if (cell?.matches("tbody td")) cell.focus();
    });
    slider.addEventListener("input", () => {
      show();
      pointAt(kind.norm[Number(slider.value)]);
    });
    chosen.addEventListener("change", show);
    cursor.listeners.push(() => {
      const place = kind.norm.indexOf(cursor.norm);
      if (place < 0 || place === Number(slider.value)) return;
      slider.value = place;
      show();
    });
    show();
  }
  data.distances.forEach((kind) => drawDistances($(`#distances-${kind.kind}`), kind));

  addEventListener("beforeprint", () => $$(".why").forEach((details) => (details.open = true)));
  document.documentElement.dataset.ready = "";
})();
