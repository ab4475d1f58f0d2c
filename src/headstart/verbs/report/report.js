// Comfort only: the page reads in full without it.
(() => {
  document.documentElement.classList.add("js");

  const dialog = document.querySelector(".lightbox");
  const shots = [...document.querySelectorAll(".shot svg")];
  let current = 0;
  const inSight = (shot) => !shot.closest("[hidden], details:not([open])");
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
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    let next = current;
    do next = (next + step + shots.length) % shots.length; while (next !== current && !inSight(shots[next]));
    show(next);
  });
  dialog.addEventListener("close", () => shots[current].focus());

  // The filters of a gallery; the choice stands in the address, so that it can be linked to.
  const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : noun.endsWith("x") ? "es" : "s"}`;
  const galleries = [...document.querySelectorAll("[data-gallery]")].filter((g) => g.querySelector(".filters"));
  for (const gallery of galleries) {
    const form = gallery.querySelector(".filters");
    let rows = null; // read when it is first needed: a page of many pictures opens sooner
    const readRows = () => [...gallery.querySelectorAll(".row")].map((row) => {
      const first = row.querySelector(".shot");
      const marks = [...row.querySelectorAll("[data-c]")];
      return {
        row,
        block: row.closest("details") || gallery,
        marks: marks.map((mark) => ({ mark, truth: first.contains(mark), kinds: mark.dataset.e.split(" ") })),
      };
    });
    const apply = () => {
      rows ??= readRows();
      const [class_, error] = [form.elements.class, form.elements.error].map((select) => select.selectedOptions[0]);
      const kinds = error.dataset.of ? error.dataset.of.split(" ") : null;
      const active = Boolean(class_.value || kinds);
      const ofObjects = !kinds || kinds.some((k) => ["found", "Miss"].includes(k));
      const photos = new Set();
      const perBlock = new Map();
      let boxes = 0;
      for (const { row, block, marks } of rows) {
        let here = 0;
        let seen = false;
        for (const { mark, truth, kinds: own } of marks) {
          // The objects stay beside false detections, to compare these with.
          const judged = kinds && (!truth || ofObjects);
          const fits = (!class_.value || mark.dataset.c === class_.value) && (!judged || own.some((k) => kinds.includes(k)));
          mark.classList.toggle("off", !fits);
          if (fits && mark.tagName === "g" && !(truth && kinds)) seen = true;
          if (fits && mark.tagName === "g" && !truth) here += 1;
        }
        row.hidden = active && !seen;
        boxes += here;
        if (seen) {
          photos.add(row.getAttribute("aria-label"));
          perBlock.set(block, (perBlock.get(block) || 0) + 1);
        }
      }
      const total = new Set(rows.map(({ row }) => row.getAttribute("aria-label"))).size;
      const chosen = [class_.dataset.name && `class ${class_.dataset.name}`, error.value].filter(Boolean).join(", ");
      gallery.querySelector(".filtered").textContent =
        active ? `Shown: ${chosen}; ${count(boxes, "box")} in ${photos.size} of ${count(total, "photo")}.` : "";
      for (const place of gallery.querySelectorAll(".filtered-block")) {
        const n = perBlock.get(place.closest("details")) || 0;
        place.textContent = active ? `${count(n, "photo")} fit${n === 1 ? "s" : ""}` : "";
      }
    };
    const write = () => {
      const address = new URLSearchParams();
      const class_ = form.elements.class.selectedOptions[0].dataset.name;
      if (class_) address.set("class", class_);
      if (form.elements.error.value) address.set("error", form.elements.error.value);
      if (`${address}` && galleries.length > 1) address.set("gallery", gallery.dataset.gallery);
      history.replaceState(null, "", `${address}` ? `#${address}` : "#pictures");
    };
    gallery.read = (address) => {
      const named = [...form.elements.class.options].find((o) => o.dataset.name === address.get("class"));
      form.elements.class.value = named ? named.value : "";
      form.elements.error.value = address.get("error") || "";
      if (form.elements.error.selectedIndex < 0) form.elements.error.value = "";
      apply();
    };
    form.addEventListener("change", () => { apply(); write(); });
    form.addEventListener("reset", () => setTimeout(() => { apply(); write(); }));
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  const followAddress = () => {
    const address = new URLSearchParams(location.hash.slice(1));
    if (!address.has("class") && !address.has("error")) return;
    const gallery = galleries.find((g) => g.dataset.gallery === address.get("gallery")) || galleries[0];
    if (!gallery) return;
    gallery.read(address);
    gallery.scrollIntoView({ behavior: "instant" });
  };
  addEventListener("hashchange", followAddress);
  followAddress();

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
