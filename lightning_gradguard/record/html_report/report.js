"use strict";
(() => {
  const root = document.documentElement;
  const print = matchMedia("print");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // Paper has no width to ask for before it is printed on: this fits on A4 and on letter paper.
  const paperWidth = 640;
  const settled = () => new Promise((resolve) => setTimeout(resolve));

  // --- Theme -------------------------------------------------------------------------------------

  // In a sandboxed frame there is no storage: the choice then lasts as long as the page.
  const remembered = {
    read() { try { return sessionStorage.getItem("theme"); } catch { return null; } },
    write(theme) { try { sessionStorage.setItem("theme", theme); } catch { /* as said above */ } },
  };
  const toggle = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const label = () => {
    toggle.textContent = isDark() ? "Light" : "Dark";
    toggle.setAttribute("aria-label", `Use the ${isDark() ? "light" : "dark"} theme`);
  };

  if (remembered.read()) root.dataset.theme = remembered.read();
  toggle.hidden = false;
  label();
  toggle.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered.write(root.dataset.theme);
    label();
    redraw();
  });
  dark.addEventListener("change", () => { label(); redraw(); });
  print.addEventListener("change", () => redraw());

  // --- Code to copy ------------------------------------------------------------------------------

  const copied = async (pre) => {
    try {
      await navigator.clipboard.writeText(pre.innerText);
      return "Copied";
    } catch { // not allowed here: the reader's own shortcut copies what is selected
      getSelection().selectAllChildren(pre);
      return "Selected";
    }
  };
  for (const pre of document.querySelectorAll("pre")) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Copy" });
    button.addEventListener("click", async () => {
      button.textContent = await copied(pre);
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    const frame = document.createElement("div");
    frame.className = "code";
    pre.replaceWith(frame);
    frame.append(pre, button);
  }

  // --- Tables to sort ----------------------------------------------------------------------------

  const byName = new Intl.Collator(undefined, { numeric: true });
  const number = (row, column) => {
    const text = row.cells[column].dataset.value;
    return text === "inf" ? Infinity : text === "-inf" ? -Infinity : Number(text);
  };
  const order = (column, sign) => (a, b) => {
    if (column === 0) return sign * byName.compare(a.cells[0].textContent, b.cells[0].textContent);
    const [x, y] = [number(a, column), number(b, column)];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // last, either way
    return x === y ? 0 : sign * (x < y ? -1 : 1);
  };
  const sort = (table, head) => {
    // The largest numbers are looked for first, names from the beginning of the alphabet.
    const first = head.cellIndex === 0 ? "ascending" : "descending";
    const next = { ascending: "descending", descending: "ascending" }[head.getAttribute("aria-sort")] ?? first;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", next);
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order(head.cellIndex, next === "ascending" ? 1 : -1)));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const head of table.tHead.rows[0].cells) {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(table, head));
      head.append(button);
    }
  }

  // --- Charts ------------------------------------------------------------------------------------

  const plots = [...document.querySelectorAll(".plot")];
  const figures = new Map();
  let redraw = () => {};

  const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const unpacked = (text) => {
    const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  // The inverse of `quantized` in encoding.py.
  const matrix = ({ codes, columns, low, high }) => {
    const bytes = bytesOf(codes);
    const value = (code) => (code === 255 ? NaN : low + (code * (high - low)) / 254);
    const rows = [];
    for (let at = 0; at < bytes.length; at += columns) {
      rows.push(Float32Array.from(bytes.subarray(at, at + columns), value));
    }
    return rows;
  };
  const decoded = (figure) => {
    for (const trace of figure.data) {
      if (trace.type !== "heatmap") continue;
      trace.text = trace.rows?.map((name) => Array(trace.z.columns).fill(name));
      trace.z = matrix(trace.z);
    }
    return figure;
  };

  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  const color = (variable) => {
    probe.style.color = `var(${variable})`;
    return getComputedStyle(probe).color;
  };
  // Only what plotly takes for a color, never a name that happens to begin with two dashes.
  const painted = (value, key = "") => {
    if (typeof value === "string") return /color$/.test(key) && value.startsWith("--") ? color(value) : value;
    if (Array.isArray(value)) return key === "z" || key === "text" ? value : value.map((item) => painted(item));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, painted(item, name)]));
  };

  const draw = (plot) => {
    const { data, layout } = painted(figures.get(plot));
    const narrow = plot.clientWidth < 520;
    const finger = matchMedia("(pointer: coarse)").matches;
    layout.uirevision = "kept"; // a change of theme leaves the zoom as it is
    if (finger) layout.dragmode = false; // it scrolls the page
    if (narrow && data[0].rows) layout.yaxis.showticklabels = false; // hovering tells the name
    if (narrow) layout.margin.l = 48;
    if (print.matches) layout.width = paperWidth;
    return Plotly.react(plot, data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: finger ? false : "hover",
      // Of the usual buttons, one would send the data to a server.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "autoScale2d", "resetScale2d"]],
    });
  };

  // All charts over the steps of an optimizer show the same part of the run.
  let linking = false;
  const link = (plot) => plot.on("plotly_relayout", async (change) => {
    const range = "xaxis.range[0]" in change || "xaxis.range" in change;
    if (linking || !plot.dataset.steps || !(range || change["xaxis.autorange"])) return;
    linking = true;
    const view = range ? { "xaxis.range": [...plot.layout.xaxis.range] } : { "xaxis.autorange": true };
    const others = plots.filter((other) => other !== plot && other.dataset.steps === plot.dataset.steps);
    await Promise.all(others.map((other) => Plotly.relayout(other, view)));
    linking = false;
  });

  const start = async () => {
    const script = document.createElement("script");
    script.textContent = await unpacked(document.getElementById("plotly").textContent);
    document.head.append(script);
    for (const [key, figure] of Object.entries(JSON.parse(document.getElementById("figures").textContent))) {
      figures.set(document.getElementById(key), decoded(figure));
    }
    for (const plot of plots) { // one at a time, so that the page can be read meanwhile
      await draw(plot);
      link(plot);
      await settled();
    }
    redraw = () => plots.forEach(draw);
    root.dataset.charts = "drawn";
  };
  if (plots.length) {
    start().catch((error) => {
      for (const plot of plots) plot.textContent = "This browser cannot draw the chart; what it shows is said below.";
      root.dataset.charts = "failed";
      throw error;
    });
  }
})();
