"use strict";
(() => {
  const order = document.getElementById("order");
  const filter = document.getElementById("class-filter");
  const shown = document.getElementById("shown");
  const galleries = [...document.querySelectorAll(".gallery")];
  const cards = galleries.map((gallery) => [...gallery.children]);
  const numbers = ["place", "quality", "score"];

  const compare = (key) => {
    const down = key.startsWith("-");
    const name = down ? key.slice(1) : key;
    return (a, b) => {
      const x = a.dataset[name];
      const y = b.dataset[name];
      if (!numbers.includes(name)) {
        return x.localeCompare(y, undefined, { numeric: true });
      }
      if (x === "" || y === "") {
        return (x === "") - (y === "");  // what is unknown comes last
      }
      return down ? y - x : x - y;
    };
  };

  const update = () => {
    // A class may be called anything, also nothing: "" is "all", "=" is that.
    const wanted = filter ? filter.value : "";
    let visible = 0;
    let total = 0;
    galleries.forEach((gallery, i) => {
      for (const card of [...cards[i]].sort(compare(order.value))) {
        card.hidden = wanted !== "" && "=" + card.dataset.label !== wanted;
        visible += !card.hidden;
        total += 1;
        gallery.append(card);
      }
    });
    shown.value = `${visible} of ${total} samples shown`;
  };

  for (const control of [order, filter]) {
    if (control) {
      control.addEventListener("change", update);
    }
  }
  const controls = document.getElementById("controls");
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = cards.flat().length === 0;
  if (!controls.hidden) {
    update();
  }
})();
