// What the page does in the browser: tells about the group under the pointer or the focus, and copies.
(() => {
  const groupOf = (node) => node instanceof Element && node.closest(".dymu-group");

  const tell = (group, x, y) => {
    const figure = group.closest("figure");
    const tip = figure.querySelector(".dymu-tip");
    const box = figure.getBoundingClientRect();
    tip.textContent = group.getAttribute("aria-label");
    tip.classList.add("dymu-told-now");
    const outline = group.querySelector(".dymu-edge").getAttribute("d");
    for (const mark of figure.querySelectorAll(".dymu-mark")) mark.setAttribute("d", outline); // above its neighbours
    const left = Math.min(Math.max(x - box.left, tip.offsetWidth / 2), box.width - tip.offsetWidth / 2);
    tip.style.left = `${left}px`;
    tip.style.top = `${y - box.top - tip.offsetHeight - 14}px`;
  };
  const hush = (node) => {
    const group = groupOf(node);
    if (!group) return;
    const figure = group.closest("figure");
    figure.querySelector(".dymu-tip").classList.remove("dymu-told-now");
    for (const mark of figure.querySelectorAll(".dymu-mark")) mark.removeAttribute("d");
  };

  document.addEventListener("pointermove", (event) => {
    const group = groupOf(event.target);
    if (group) tell(group, event.clientX, event.clientY);
  });
  document.addEventListener("pointerout", (event) => hush(event.target));
  document.addEventListener("focusout", (event) => hush(event.target));
  document.addEventListener("focusin", (event) => {
    const group = groupOf(event.target);
    if (!group || !group.matches(":focus-visible")) return;
    const box = group.getBoundingClientRect();
    tell(group, box.left + box.width / 2, box.top);
  });

  document.addEventListener("keydown", (event) => {
    const group = groupOf(event.target);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!group || !step) return;
    event.preventDefault();
    const all = [...group.closest("svg").querySelectorAll(".dymu-group")];
    const next = all[(all.indexOf(group) + step + all.length) % all.length];
    group.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });

  document.addEventListener("click", async (event) => {
    const button = event.target instanceof Element && event.target.closest(".dymu-copy");
    if (!button) return;
    const code = button.closest(".dymu-copied").querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // a page that is not from this machine may not write there
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });

  // Boxes, where the page takes them: a drag on the picture writes a line of parts of it.
  let drag = null;
  const partOf = (event, image) => {
    // The picture fits into its element as a whole.
    const box = image.getBoundingClientRect();
    const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
    const [wide, high] = [image.naturalWidth * scale, image.naturalHeight * scale];
    const within = (value) => Math.min(Math.max(value, 0), 1);
    return [
      within((event.clientX - box.left - (box.width - wide) / 2) / wide),
      within((event.clientY - box.top - (box.height - high) / 2) / high),
    ];
  };
  document.addEventListener("pointerdown", (event) => {
    const image = event.target instanceof Element && event.target.closest("#dymu-picture img");
    if (!image || !document.querySelector("#dymu-boxes :is(textarea, input)")) return;
    event.preventDefault();
    const frame = document.createElement("div");
    frame.className = "dymu-drag";
    document.body.append(frame);
    drag = { image, frame, from: [event.clientX, event.clientY], part: partOf(event, image) };
  });
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const [x, y] = drag.from;
    Object.assign(drag.frame.style, {
      left: `${Math.min(x, event.clientX)}px`,
      top: `${Math.min(y, event.clientY)}px`,
      width: `${Math.abs(event.clientX - x)}px`,
      height: `${Math.abs(event.clientY - y)}px`,
    });
  });
  document.addEventListener("pointerup", (event) => {
    if (!drag) return;
    const { image, part, frame } = drag;
    drag = null;
    frame.remove();
    const [x, y] = partOf(event, image);
    const box = [Math.min(x, part[0]), Math.min(y, part[1]), Math.max(x, part[0]), Math.max(y, part[1])];
    if (box[2] - box[0] < 0.01 || box[3] - box[1] < 0.01) return;
    const lines = document.querySelector("#dymu-boxes :is(textarea, input)");
    const line = box.map((value) => value.toFixed(3)).join(", ");
    lines.value = [lines.value.trim(), line].filter(Boolean).join("\n");
    lines.dispatchEvent(new Event("input", { bubbles: true }));
  });
})();
