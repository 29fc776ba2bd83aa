// The lists at the side: objects and prompts, rebuilt from each answer of the server. They keep no state.
import { TOOLS } from "./tools.js";

const ICONS = {
  navigate: "M12 3v18M3 12h18M12 3l-3 3M12 3l3 3M12 21l-3-3M12 21l3-3M3 12l3-3M3 12l3 3M21 12l-3-3M21 12l-3 3",
  point: "M12 8v8M8 12h8M12 3a9 9 0 1 0 0 18a9 9 0 1 0 0-18",
  box: "M4 6h16v12H4z",
  scribble: "M4 18c3-8 5 2 8-5s4-8 8-7",
  lasso: "M12 4c5 0 8 2.600 8 6s-3 6-8 6-8-2.600-8-6 3-6 8-6M8 15c0 3-1 4-3 5",
  eraser: "M8 20h12M5 14l8-9 6 5-8 9H8z",
};

const EYE = "M2 12s4-6 10-6 10 6 10 6-4 6-10 6S2 12 2 12M12 9.500a2.500 2.500 0 1 0 0 5a2.500 2.500 0 1 0 0-5";
const SHUT = "M6 11h12v9H6zM8 11V8a4 4 0 0 1 8 0v3";
const OPEN = "M6 11h12v9H6zM8 11V8a4 4 0 0 1 7.500-2";

function icon(path) {
  return `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${path}"/></svg>`;
}

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((c) => c !== null));
  return made;
}

export function showTools(nav, current, positive, onTool, onSign) {
  nav.replaceChildren(
    ...TOOLS.map((tool) => {
      const button = element("button", { title: `${tool.name} (${tool.key.toUpperCase()}): ${tool.hint}`, onclick: () => onTool(tool.id) });
      button.dataset.tool = tool.id;
      button.setAttribute("aria-pressed", String(tool.id === current));
      button.innerHTML = icon(ICONS[tool.id]);
      button.append(tool.name);
      return button;
    }),
    element("button", {
      id: "sign",
      className: positive ? "sign" : "sign negative",
      title: "What a plain click means (T): add to the object or remove from it",
      textContent: positive ? "+ adds" : "− removes",
      onclick: onSign,
    }),
  );
}

/** `actions`: choose, edit(id, changes), remove(id). Rows that did not change are kept: one of them may be under a double-click, or be renamed. */
export function showObjects(list, objects, current, voxelMm3, actions) {
  const shown = JSON.stringify(objects.map((o) => [o.id, o.name, o.code, o.colour, o.visible, o.locked]));
  if (list.dataset.shown !== shown) list.replaceChildren(...objects.map((object) => objectRow(object, actions)));
  list.dataset.shown = shown;
  objects.forEach((object, n) => {
    const row = list.children[n];
    row.classList.toggle("current", object.id === current);
    row.querySelector(".size").textContent = object.voxels ? volumeText(object.voxels * voxelMm3) : "empty";
    row.title = `${object.voxels.toLocaleString("en")} voxels`;
  });
}

/** A volume in mL, or in mm³ below 0.1 mL. */
export function volumeText(mm3) {
  return mm3 < 100 ? `${+mm3.toPrecision(3)} mm³` : `${(mm3 / 1000).toFixed(mm3 < 1e5 ? 1 : 0)} mL`;
}

function objectRow(object, actions) {
  const colour = element("input", { type: "color", value: object.colour, title: "Colour", onchange: (e) => actions.edit(object.id, { colour: e.target.value }) });
  const name = element("span", { className: "name", textContent: object.name, title: "Double-click, or F2, to rename" });
  name.ondblclick = () => retype(name, object, "name", actions);
  const title = `Code in DICOM (SCHEME:VALUE:MEANING as SCT:10200004:Liver): ${object.code || "goes by the name"}`;
  const code = element("button", { textContent: "#", className: object.code ? "code on" : "code", title, onclick: () => retype(name, object, "code", actions) });
  const see = toggle(object.visible, EYE, "Show or hide (M)", () => actions.edit(object.id, { visible: !object.visible }));
  const lock = toggle(object.locked, object.locked ? SHUT : OPEN, "Lock: nothing may change it", () => actions.edit(object.id, { locked: !object.locked }));
  const gone = element("button", { textContent: "✕", title: "Remove the object", onclick: () => actions.remove(object.id) });
  const row = element("li", {}, colour, name, element("span", { className: "size dim" }), code, see, lock, gone);
  row.dataset.object = object.id;
  row.onclick = (e) => e.target.closest("button, input") || actions.choose(object.id);
  return row;
}

export function renameObject(list, id) {
  list.querySelector(`[data-object="${id}"] span.name`)?.dispatchEvent(new MouseEvent("dblclick"));
}

function toggle(on, path, title, onclick) {
  const button = element("button", { title, className: on ? "on" : "", onclick });
  button.innerHTML = icon(path);
  button.setAttribute("aria-pressed", String(on));
  if (!on) button.style.opacity = 0.35;
  return button;
}

/** Put a text field for the name or the code of an object in the place of its name. */
function retype(label, object, key, actions) {
  const before = object[key] ?? "";
  const placeholder = key === "code" ? "SCT:10200004:Liver" : "";
  const field = element("input", { value: before, className: "name", placeholder, ariaLabel: key });
  field.onblur = () => {
    const typed = field.value.trim();
    field.replaceWith(label);
    if (typed !== before && (typed || key === "code")) actions.edit(object.id, { [key]: typed });
  };
  field.onkeydown = (e) => {
    if (e.key === "Escape") field.value = before;
    if (["Enter", "Escape"].includes(e.key)) field.blur();
  };
  label.replaceWith(field);
  field.focus();
  field.select();
}

/** `actions`: jump(prompt), flip(prompt), remove(prompt). */
export function showPrompts(list, count, prompts, chosen, actions) {
  count.textContent = prompts.length ? String(prompts.length) : "";
  list.replaceChildren(
    ...prompts.map((prompt) => {
      const positive = prompt.positive !== false;
      const sign = element("span", { className: positive ? "plus" : "minus", textContent: positive ? "+" : "−" });
      const text = element("span", { className: "name mono", textContent: describe(prompt) });
      const flips = "positive" in prompt;
      const flip = flips ? element("button", { textContent: "±", title: "Turn to the other sign", onclick: () => actions.flip(prompt) }) : null;
      const gone = element("button", { textContent: "✕", title: "Delete (Del)", onclick: () => actions.remove(prompt) });
      const row = element("li", { className: prompt.id === chosen ? "current" : "", title: "Go there" }, sign, text, flip, gone);
      row.dataset.prompt = prompt.id;
      row.onclick = (e) => e.target.closest("button") || actions.jump(prompt);
      return row;
    }),
  );
}

export function describe(prompt) {
  if (prompt.type === "point") return `click ${prompt.at.map(Math.round).join(", ")}`;
  if (prompt.type === "box") return `box ${prompt.max.map((v, a) => Math.round(v - prompt.min[a]) + 1).join("×")}`;
  return prompt.type;
}

/** A file voxel in the middle of a prompt. */
export function middleOf(prompt) {
  if (prompt.type === "point") return prompt.at.map(Math.round);
  if (prompt.type === "box") return prompt.min.map((v, a) => Math.round((v + prompt.max[a]) / 2));
  const path = prompt.path ?? prompt.outline ?? [];
  return path.length ? path[Math.floor(path.length / 2)].map(Math.round) : null;
}

export function showShortcuts(table) {
  const rows = [
    ...TOOLS.map((t) => [t.key.toUpperCase(), `${t.name}: ${t.hint}`]),
    ["T", "switch what a plain click means"],
    ["Z / Shift+Z", "undo / redo"],
    ["N", "new object"],
    ["1 … 9", "choose an object"],
    ["M", "show or hide the object"],
    ["F2", "rename the object"],
    ["Del", "delete the chosen (or last) prompt"],
    ["G", "go to where the model is least certain"],
    ["H", "probability heat map"],
    ["K", "outlines or filled"],
    ["[ ]", "opacity"],
    ["W", "next window preset"],
    ["arrows, PgUp, PgDn", "move one voxel"],
    ["X", "export"],
    ["O", "open another volume"],
  ];
  table.replaceChildren(...rows.map(([key, text]) => element("tr", {}, element("td", {}, element("kbd", { textContent: key })), element("td", { textContent: text }))));
}
