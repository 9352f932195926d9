"use strict";
// Before anything is painted: the reader's choice of light or dark, kept where the browser keeps things for files.
const distprune = {
  get(kind, key) { try { return window[kind].getItem(key); } catch { return null; } },
  set(kind, key, value) { try { window[kind].setItem(key, value); } catch { /* it keeps nothing for files */ } },
  THEME: "distprune-theme",
  PLACE: "distprune-place:" + location.pathname,
  HELD: "distprune-held:" + location.pathname,
};
{
  const chosen = distprune.get("localStorage", distprune.THEME);
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
