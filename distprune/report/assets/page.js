"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const root = document.documentElement;

  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  const { figures, dark, live } = read("figures");
  const narrow = matchMedia("(max-width: 600px)");
  const touch = matchMedia("(pointer: coarse)");

  // A copy in the colours of the theme: every colour of a figure is one of the light palette.
  const inTheme = (value) => {
    if (typeof value === "string") return isDark() && Object.hasOwn(dark, value) ? dark[value] : value;
    if (Array.isArray(value)) return value.map(inTheme);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, inTheme(item)]));
    return value;
  };
  const forScreen = (layout) => {
    if (narrow.matches) {
      layout.font.size = 11;
      layout.margin = { l: 4, r: 6, t: layout.margin.t, b: 4 };
    }
    if (narrow.matches || touch.matches) { // a finger scrolls the page, never an axis
      layout.dragmode = false;
      for (const key of Object.keys(layout)) if (/^[xy]axis/.test(key)) layout[key].fixedrange = true;
    }
    return layout;
  };
  const forData = (data) => {
    if (narrow.matches) for (const trace of data) if (trace.type === "heatmap") delete trace.texttemplate; // no room for numbers
    return data;
  };
  const draw = () => {
    for (const [name, figure] of Object.entries(figures)) {
      const config = {
        responsive: true, displaylogo: false, displayModeBar: narrow.matches || touch.matches ? false : "hover",
        modeBarButtons: [["toImage", "resetScale2d"]], toImageButtonOptions: { filename: name, scale: 2 },
      };
      Plotly.react("plot-" + name, forData(inTheme(figure.data)), forScreen(inTheme(figure.layout)), config);
    }
  };

  const button = document.getElementById("theme");
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.className = "";
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    distprune.set("localStorage", distprune.THEME, root.dataset.theme);
    label();
    draw();
  });
  system.addEventListener("change", () => { label(); draw(); });
  narrow.addEventListener("change", draw);
  label();
  draw();

  // Live: the file is written anew every few seconds while the search runs, and read again here, at the same place of the page.
  const keep = () => distprune.set("sessionStorage", distprune.PLACE, JSON.stringify({
    y: scrollY, open: [...document.querySelectorAll("details")].map((item, index) => (item.open ? index : -1)).filter((index) => index >= 0),
  }));
  if (live) {
    const hold = document.getElementById("hold");
    let held = distprune.get("sessionStorage", distprune.HELD) === "yes";
    const tell = () => { hold.textContent = held ? "Go on" : "Hold"; };
    hold.className = "";
    hold.addEventListener("click", () => { held = !held; distprune.set("sessionStorage", distprune.HELD, held ? "yes" : "no"); tell(); });
    tell();
    if (Date.now() / 1000 - live.written > 20 * live.every + 60) { // whoever wrote it is gone: judged as it is read, for a held page ages by itself
      document.getElementById("state").textContent += ", no longer followed";
    } else {
      setInterval(() => {
        if (held || document.hidden || String(getSelection()) !== "") return;
        history.scrollRestoration = "manual";
        keep();
        location.reload();
      }, 1000 * live.every);
    }
  }
})();
