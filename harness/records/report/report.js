"use strict";
// A click on a heading sorts its table by that column; cells without a number come last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), body = heading.closest("table").tBodies[0];
    const isUp = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    const keyed = [...body.rows].map((row) => {
      const cell = row.cells[heading.cellIndex];
      return { row, text: cell.textContent, number: Number.parseFloat(cell.dataset.value) };
    });
    const isNumeric = keyed.some((k) => !Number.isNaN(k.number));
    keyed.sort((a, b) => {
      const last = Number.isNaN(a.number) - Number.isNaN(b.number);
      if (isNumeric && last) return last;
      const order = isNumeric ? a.number - b.number || 0 : a.text.localeCompare(b.text, "en", { numeric: true });
      return isUp ? order : -order;
    });
    body.append(...keyed.map((k) => k.row));
  });
}
