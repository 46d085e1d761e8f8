// Has KaTeX draw what formulas.py left in the page. A formula that KaTeX cannot read stays as TeX, marked as an error.
const formulas = [...document.querySelectorAll(".math.notranslate")];

for (const element of formulas) {
  const tex = element.textContent;
  const display = element.classList.contains("display");
  katex.render(tex, element, { displayMode: display, throwOnError: false, strict: "ignore" });
  if (!display && tex.length < 25) {
    glue(element);
  }
}

// A line breaks neither before the full stop after a short formula nor after the parenthesis before it.
function glue(element) {
  const before = element.previousSibling?.data?.match(/[(“"]+$/)?.[0] ?? "";
  const after = element.nextSibling?.data?.match(/^[.,;:)”"'’-]+(?:s\b)?/)?.[0] ?? "";
  if (before || after) {
    const span = document.createElement("span");
    span.style.whiteSpace = "nowrap";
    if (before) element.previousSibling.data = element.previousSibling.data.slice(0, -before.length);
    if (after) element.nextSibling.data = element.nextSibling.data.slice(after.length);
    element.replaceWith(span);
    span.append(before, element, after);
  }
}

// A displayed formula wider than its column is drawn smaller, down to two thirds; what is wider still scrolls.
function fit() {
  for (const element of formulas.filter((element) => element.classList.contains("display"))) {
    element.style.fontSize = "";
    const scale = element.clientWidth / element.scrollWidth;
    if (scale < 1) {
      element.style.fontSize = `${Math.max(0.66, 0.98 * scale)}em`;
    }
  }
}
document.fonts.ready.then(fit);
window.addEventListener("resize", fit);
