// Comfort only: the page reads in full without it.
(() => {
  document.documentElement.classList.add("js");

  const dialog = document.querySelector(".lightbox");
  const shots = [...document.querySelectorAll(".shot svg")];
  let current = 0;
  const show = (index) => {
    current = (index + shots.length) % shots.length;
    const copy = shots[current].cloneNode(true);
    for (const name of ["tabindex", "role", "aria-haspopup"]) copy.removeAttribute(name);
    const box = copy.viewBox.baseVal;
    copy.style.setProperty("--ratio", box.width / box.height);
    dialog.querySelector(".stage").replaceChildren(copy);
    dialog.querySelector(".caption").textContent = shots[current].dataset.title;
    if (!dialog.open) dialog.showModal();
  };
  shots.forEach((shot, index) => {
    shot.setAttribute("tabindex", "0");
    shot.setAttribute("role", "button");
    shot.setAttribute("aria-haspopup", "dialog");
    shot.addEventListener("click", () => show(index));
    shot.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); show(index); }
    });
  });
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") show(current + 1);
    if (event.key === "ArrowLeft") show(current - 1);
  });
  dialog.addEventListener("close", () => shots[current].focus());

  if (navigator.clipboard) {
    for (const block of document.querySelectorAll("pre.command")) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy";
      button.textContent = "Copy";
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(block.querySelector("code").textContent.trim());
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
      block.append(button);
    }
  }

  // On paper nothing can be unfolded.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
