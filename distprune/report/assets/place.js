"use strict";
// Before the library that draws is read: back to where the reader was when the page was read again.
{
  const left = distprune.get("sessionStorage", distprune.PLACE);
  if (left) {
    distprune.set("sessionStorage", distprune.PLACE, "");
    history.scrollRestoration = "manual";
    const { y, open } = JSON.parse(left);
    const all = document.querySelectorAll("details");
    for (const index of open) if (all[index]) all[index].open = true;
    scrollTo(0, y);
  }
}
