// Reads a value off where the pointer is; a name in the legend hides its line. No library, nothing is fetched.
for (const figure of document.querySelectorAll("figure.chart")) {
  const lines = JSON.parse(figure.dataset.lines);
  const svg = figure.querySelector("svg");
  const cursor = figure.querySelector(".cursor");
  const output = figure.querySelector("output");
  const hidden = new Set();
  const show = (number) =>
    Number.isInteger(number) ? number.toLocaleString("en") : String(Number(number.toPrecision(4)));

  const readOff = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = (line) =>
      line.at.reduce((best, at, i) => (Math.abs(at[0] - x) < Math.abs(line.at[best][0] - x) ? i : best), 0);
    const seen = lines.map((line, i) => [line, i]).filter(([, i]) => !hidden.has(i));
    if (!seen.length) return;
    const places = seen.map(([line]) => nearest(line));
    const chosen = places.reduce((best, place, i) =>
      Math.abs(seen[i][0].at[place][0] - x) < Math.abs(seen[best][0].at[places[best]][0] - x) ? i : best, 0);
    const at = seen[chosen][0].x[places[chosen]];
    cursor.setAttribute("x1", seen[chosen][0].at[places[chosen]][0]);
    cursor.setAttribute("x2", seen[chosen][0].at[places[chosen]][0]);
    const values = seen.map(([line], i) => `${line.name} ${show(line.y[places[i]])}`);
    output.textContent = `${figure.dataset.x} ${show(at)}: ${values.join(", ")}`;
  };
  svg.addEventListener("pointermove", readOff);
  svg.addEventListener("pointerdown", readOff);
  for (const button of figure.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const line = Number(button.dataset.line);
      const hide = !hidden.has(line);
      hide ? hidden.add(line) : hidden.delete(line);
      button.setAttribute("aria-pressed", String(!hide));
      for (const part of svg.querySelectorAll(`[data-line="${line}"]`)) part.style.display = hide ? "none" : "";
    });
  }
}
