// What scrolls sideways must be reachable by keyboard.
function makeFocusable() {
  for (const element of document.querySelectorAll("pre, .table-wrapper, .cell_output .output.text_html")) {
    if (element.scrollWidth > element.clientWidth || element.scrollHeight > element.clientHeight) element.tabIndex = 0;
    else element.removeAttribute("tabindex");
  }
}
addEventListener("load", makeFocusable);
addEventListener("resize", makeFocusable);
document.addEventListener("toggle", makeFocusable, true);

// How long ago the tests ran.
addEventListener("load", () => {
  for (const time of document.querySelectorAll("time[datetime]")) {
    const days = Math.floor((Date.now() - new Date(time.dateTime)) / 86400000);
    time.after(` (${new Intl.RelativeTimeFormat("en", { numeric: "auto" }).format(-days, "day")})`);
  }
});
