// The value under the pointer: read back from the drawn lines. The page is whole without it.
(() => {
  const box = document.getElementById("readout");
  const written = (v) => {
    const size = Math.abs(v);
    if (size && (size < 1e-4 || size >= 1e12)) return v.toExponential(2);
    return v.toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  for (const plot of document.querySelectorAll("svg.plot[data-x]")) {
    const [x0, x1, left, right] = plot.dataset.x.split(" ").map(Number);
    const [y0, y1, bottom, top, log] = plot.dataset.y.split(" ").map(Number);
    const value = (at) => {
      const part = (at - bottom) / (top - bottom);
      return log ? y0 * Math.pow(y1 / y0, part) : y0 + part * (y1 - y0);
    };
    let lines = null;
    const read = () => [...plot.querySelectorAll("path[data-label]")].map((path) => ({
      label: path.dataset.label,
      colour: [...path.classList].find((name) => /^s\d$/.test(name)),
      points: [...path.getAttribute("d").matchAll(/[ML]([-\d.]+) ([-\d.]+)/g)].map((m) => [+m[1], +m[2]]),
    })).filter((line) => line.points.length);
    const cursor = document.createElementNS(plot.namespaceURI, "path");
    cursor.setAttribute("class", "cursor");
    const hide = () => { box.hidden = true; cursor.remove(); };
    plot.addEventListener("pointerleave", hide);
    addEventListener("scroll", hide, { passive: true });
    plot.addEventListener("pointermove", (event) => {
      lines = lines || read();
      const frame = plot.getBoundingClientRect();
      const at = (event.clientX - frame.left) / frame.width * plot.viewBox.baseVal.width;
      if (at < left - 4 || at > right + 4 || !lines.length) return hide();
      const near = lines.map((line) => line.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      const closest = near.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)[0];
      box.replaceChildren(Object.assign(document.createElement("small"), {
        textContent: "step " + Math.round(x0 + (closest - left) / (right - left) * (x1 - x0)).toLocaleString("en"),
      }));
      lines.forEach((line, i) => {
        if (Math.abs(near[i][0] - closest) > 12) return;
        const row = document.createElement("div");
        const swatch = document.createElement("i");
        swatch.className = line.colour;
        const figure = document.createElement("b");
        figure.textContent = written(value(near[i][1]));
        row.append(swatch, line.label, figure);
        box.append(row);
      });
      cursor.setAttribute("d", `M${closest} ${top}V${bottom}`);
      plot.append(cursor);
      box.hidden = false;
      const wide = box.offsetWidth, tall = box.offsetHeight;
      box.style.left = Math.max(4, event.clientX + 16 + wide > innerWidth ? event.clientX - wide - 16 : event.clientX + 16) + "px";
      box.style.top = Math.max(4, Math.min(innerHeight - tall - 4, event.clientY + 12)) + "px";
    });
  }
})();
