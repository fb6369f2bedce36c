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

// The viewer of scenes. A picture is drawn on a canvas of one pixel per pixel of the scene, which
// CSS moves and scales; x, y, zoom and points are in widths and heights of the view.
const viewer = document.getElementById("viewer");
if (viewer) {
  const find = (selector) => viewer.querySelector(selector);
  const [choice, pictures, view, canvas, values] = ["select", "fieldset", ".view", "canvas", "output"].map(find);
  const pointers = new Map();
  let scene = null, title = "False colour", x = 0, y = 0, zoom = 1;

  const decode = async (plane, cols) => {
    const packed = new Blob([Uint8Array.from(atob(plane.codes), (c) => c.charCodeAt(0))]);
    const stream = packed.stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = await new Response(stream).arrayBuffer();
    const codes = plane.bytes === 1 ? new Uint8Array(bytes) : new Uint16Array(bytes);
    for (let i = cols; i < codes.length; i++) codes[i] += codes[i - cols];  // of differences
    return { ...plane, codes };
  };

  const open = async () => {
    const wanted = choice.value;
    const data = [...viewer.querySelectorAll("script")].find((s) => s.dataset.scene === wanted);
    const next = JSON.parse(data.textContent);
    for (const [name, plane] of Object.entries(next.planes)) next.planes[name] = await decode(plane, next.cols);
    for (const picture of next.pictures.filter((p) => p.image)) {
      const image = new Image();
      image.src = picture.image;
      await image.decode();
      picture.image = image;
    }
    if (choice.value !== wanted) return;  // another one was chosen meanwhile
    scene = next;
    canvas.width = scene.cols;
    canvas.height = scene.rows;
    view.style.aspectRatio = `${scene.cols} / ${scene.rows}`;
    pictures.replaceChildren(pictures.firstElementChild, ...scene.pictures.map((picture) => {
      const label = document.createElement("label"), input = document.createElement("input");
      Object.assign(input, { type: "radio", name: "picture", value: picture.title });
      label.append(input, ` ${picture.title}`);
      return label;
    }));
    draw();
    move(0);
  };

  const draw = () => {
    const picture = scene.pictures.find((p) => p.title === title) ?? scene.pictures[0];
    const context = canvas.getContext("2d");
    if (picture.image) {
      context.clearRect(0, 0, scene.cols, scene.rows);
      context.drawImage(picture.image, 0, 0);
    } else {
      const data = new ImageData(scene.cols, scene.rows), colours = new Uint32Array(data.data.buffer);
      scene.planes[picture.plane].codes.forEach((code, i) => { colours[i] = picture.colours[code]; });
      context.putImageData(data, 0, 0);
    }
    find(`input[value="${picture.title}"]`).checked = true;
    find(".note-of-picture").textContent = `${choice.value}: ${picture.note}`;
    view.ariaLabel = `${picture.title}: ${choice.selectedOptions[0].textContent}`;
    for (const entry of viewer.querySelectorAll(".class")) entry.hidden = picture.title !== "Differences";
  };

  // Zooms by a factor about a point, and shifts.
  const move = (factor, at = { x: 0.5, y: 0.5 }, right = 0, down = 0) => {
    const shown = canvas.width / view.clientWidth, before = zoom;
    zoom = Math.max(1, Math.min(zoom * factor, 16 * shown));
    const within = (start, where, by) => Math.min(0, Math.max(1 - zoom, where - (where - start) * zoom / before + by));
    x = within(x, at.x, right);
    y = within(y, at.y, down);
    canvas.style.transform = `translate(${100 * x}%, ${100 * y}%) scale(${zoom})`;
    canvas.style.imageRendering = zoom > shown ? "pixelated" : "auto";
    view.style.touchAction = zoom > 1 ? "none" : "pan-y";  // one finger scrolls the page
  };

  const point = (event) => {
    const box = view.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  };

  const show = (at) => {
    const row = Math.floor((at.y - y) / zoom * scene.rows), col = Math.floor((at.x - x) / zoom * scene.cols);
    if (row < 0 || row >= scene.rows || col < 0 || col >= scene.cols) return;
    const texts = Object.values(scene.planes).map((plane) => {
      const code = plane.codes[row * scene.cols + col];
      if (plane.names) return plane.names[code];
      const number = (plane.low + plane.step * code).toFixed(plane.digits);
      return `${plane.label} ${code ? number + plane.unit : "–"}`;
    });
    values.textContent = [`row ${row}, column ${col}`, ...texts].join(" · ");
  };

  const fingers = () => {
    const [a, b = a] = pointers.values();
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.hypot(a.x - b.x, a.y - b.y) || 1 };
  };

  view.addEventListener("pointerdown", (event) => {
    view.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, point(event));
    show(point(event));
  });
  for (const end of ["pointerup", "pointercancel"]) {
    view.addEventListener(end, (event) => pointers.delete(event.pointerId));
  }
  view.addEventListener("pointermove", (event) => {
    if (pointers.has(event.pointerId)) {
      const old = fingers();
      pointers.set(event.pointerId, point(event));
      const now = fingers();
      move(now.apart / old.apart, old, now.x - old.x, now.y - old.y);
    }
    show(point(event));
  });
  view.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== view) return;  // the page scrolls
    event.preventDefault();
    const pixels = event.deltaY * (event.deltaMode ? 30 : 1);
    move(2 ** Math.max(-1, Math.min(-pixels / 300, 1)), point(event));
    show(point(event));
  }, { passive: false });

  const keys = {
    "+": [1.5], "=": [1.5], "-": [1 / 1.5], 0: [0],
    ArrowLeft: [1, undefined, 0.1], ArrowRight: [1, undefined, -0.1],
    ArrowUp: [1, undefined, 0, 0.1], ArrowDown: [1, undefined, 0, -0.1],
  };
  const press = (key) => {
    move(...keys[key]);
    show({ x: 0.5, y: 0.5 });
  };
  view.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    press(event.key);
  });
  for (const button of viewer.querySelectorAll("button")) {
    button.addEventListener("click", () => press(button.dataset.key));
  }
  pictures.addEventListener("change", (event) => {
    title = event.target.value;
    draw();
  });
  choice.addEventListener("change", open);
  for (const link of document.querySelectorAll("a[data-scene]")) {
    link.addEventListener("click", () => {  // the link itself leads to the viewer
      choice.value = link.dataset.scene;
      open();
    });
  }
  open();
}
