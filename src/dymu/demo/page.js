// What the page does in the browser: tells about the group under the pointer or the focus, and copies.
(() => {
  const groupOf = (node) => node instanceof Element && node.closest(".dymu-group");

  const tell = (group, x, y) => {
    const figure = group.closest("figure");
    const tip = figure.querySelector(".dymu-tip");
    const box = figure.getBoundingClientRect();
    tip.textContent = group.getAttribute("aria-label");
    tip.classList.add("dymu-told-now");
    const left = Math.min(Math.max(x - box.left, tip.offsetWidth / 2), box.width - tip.offsetWidth / 2);
    tip.style.left = `${left}px`;
    tip.style.top = `${y - box.top - tip.offsetHeight - 14}px`;
  };
  const hush = (node) => {
    const group = groupOf(node);
    if (group) group.closest("figure").querySelector(".dymu-tip").classList.remove("dymu-told-now");
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
})();
