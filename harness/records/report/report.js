"use strict";
// A heading's button sorts its table by that column; what has no number comes last.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const rows = heading.closest("table").tBodies[0];
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");

    const keyed = [...rows.rows].map((row) => {
      const text = row.cells[heading.cellIndex].textContent.trim();
      return { row, text, number: Number.parseFloat(text) };
    });
    const areNumbers = keyed.every((k) => k.text === "–" || String(Number(k.text)) !== "NaN");
    const order = (a, b) =>
      areNumbers ? a.number - b.number : a.text.localeCompare(b.text, "en");
    const isMissing = (k) => k.text === "–";
    keyed.sort((a, b) =>
      isMissing(a) || isMissing(b)
        ? isMissing(a) - isMissing(b)
        : ascending ? order(a, b) : order(b, a));
    rows.append(...keyed.map((k) => k.row));
  });
}
