// The page: its state, and what each action does. Requests are sent one at a time, in order.
// The picture is in stage.js, pointer tools in tools.js, the lists in panels.js, requests in api.js.
import { Api } from "./api.js";
import { middleOf, renameObject, showObjects, showPrompts, showShortcuts, showTools, element } from "./panels.js";
import { Stage } from "./stage.js";
import { Hand, TOOLS } from "./tools.js";

const $ = (id) => document.getElementById(id);
const api = new Api();
const stage = new Stage($("view"), $("overlay"));
const hand = new Hand($("stage"), stage, (prompt) => act("segmenting", () => api.add(prompt, state.current)));
const state = { session: null, objects: [], current: null, chosen: null, canUndo: false, canRedo: false };
let queue = Promise.resolve();
window.samed3d = { stage, api, state }; // for tests and for the curious

/** Run one request after those before it; show that it runs when it takes over a second, and take in what it changed. */
function act(what, work) {
  queue = queue.then(async () => {
    const slow = setTimeout(() => busy(`${what} …`), 1000);
    const began = performance.now();
    try {
      const reply = await work();
      if (reply) take(reply);
      if (reply?.seconds !== undefined) {
        const round = Math.round(performance.now() - began);
        $("timing").textContent = `${what}: model ${Math.round(reply.seconds * 1000)} ms, with the page ${round} ms`;
      }
    } catch (error) {
      if (error.status === 409) await api.resume(api.id).then(show).catch(() => {}); // another tab changed it: show what is true now
      notice(error.message, true);
    } finally {
      clearTimeout(slow);
      busy(null);
    }
  });
  return queue;
}

function take({ session, updates }) {
  if (session) {
    const colours = state.objects.map((o) => o.colour + o.visible).join();
    const before = state.current;
    state.objects = session.objects;
    state.canUndo = session.can_undo;
    state.canRedo = session.can_redo;
    if (session.current !== undefined) state.current = session.current;
    if (!state.objects.some((o) => o.id === state.current)) state.current = state.objects.at(-1)?.id ?? 1;
    if ($("heat").checked && (updates?.length || state.current !== before)) showHeat();
    if (state.objects.map((o) => o.colour + o.visible).join() !== colours) {
      stage.setColours(state.objects);
      stage.paint(state.objects);
    }
  }
  for (const update of updates ?? []) {
    stage.masks.write(update.object_id, update.start, update.stop, update.bits);
    stage.paint(state.objects, update);
  }
  render();
}

function render() {
  const object = state.objects.find((o) => o.id === state.current);
  showTools($("tools"), hand.tool, hand.positive, setTool, flipSign);
  $("stage").className = `tool-${hand.tool}`;
  $("hint").textContent = TOOLS.find((t) => t.id === hand.tool).hint;
  const voxelMm3 = (state.session?.spacing_mm ?? []).reduce((product, edge) => product * edge, 1);
  showObjects($("objects"), state.objects, state.current, voxelMm3, {
    choose: (id) => choose(id),
    edit: (id, changes) => act("changing", () => api.editObject(id, changes)),
    remove: (id) => act("removing", () => api.removeObject(id).then(redraw)),
  });
  showPrompts($("prompts"), $("prompt-count"), object?.prompts ?? [], state.chosen, {
    jump: (prompt) => {
      state.chosen = prompt.id;
      const at = middleOf(prompt);
      if (at) stage.goTo(at);
      render();
    },
    flip: (prompt) => act("segmenting", () => api.change(prompt.id, { ...prompt, positive: !prompt.positive })),
    remove: (prompt) => act("segmenting", () => api.remove(prompt.id)),
  });
  stage.setMarkers(object?.visible === false ? [] : (object?.prompts ?? []), state.chosen);
  $("undo").disabled = !state.canUndo;
  $("redo").disabled = !state.canRedo;
  $("clean").disabled = !object?.voxels;
  for (const id of ["suggest", "export", "new-object"]) $(id).disabled = !state.session;
}

/** After an object is gone: its mask goes too. */
function redraw(reply) {
  for (const id of [...stage.masks.masks.keys()]) if (!reply.session.objects.some((o) => o.id === id)) stage.masks.clear(id);
  stage.setColours(reply.session.objects);
  stage.paint(reply.session.objects);
  return reply;
}

function setTool(id) {
  hand.tool = id;
  render();
}

function flipSign() {
  hand.positive = !hand.positive;
  render();
}

function choose(id) {
  state.current = id;
  state.chosen = null;
  render();
  if ($("heat").checked) showHeat();
}

async function open(how) {
  await act("opening", async () => {
    busy("opening …");
    const session = await api.open({ ...how, model: $("model").value || undefined });
    await show(session);
  });
}

/** Show a session: its image, its objects, its masks. Nothing of the earlier one stays, even if this one cannot be shown. */
async function show(session) {
  Object.assign(state, { session: null, objects: [], chosen: null, canUndo: false, canRedo: false });
  stage.clear();
  render();
  await stage.load(await api.image(), session.size_ijk);
  state.session = session;
  location.hash = session.id;
  $("welcome").hidden = $("notice").hidden = true;
  $("volume-name").textContent = session.name;
  $("volume-name").title = `${session.size_ijk.join(" × ")} voxels of ${session.spacing_mm.map((v) => +v.toFixed(3)).join(" × ")} mm`;
  $("volume-notes").textContent = $("volume-notes").title = session.notes.join("; ");
  if (session.model) $("model").value = session.model;
  take({ session, updates: await api.masks() });
  stage.paint(state.objects);
}

/** Show or remove the heat map of the current object. */
async function showHeat() {
  try {
    const object = state.objects.find((o) => o.id === state.current);
    await stage.setHeat($("heat").checked && object?.prompts.length ? () => api.heat(object.id) : null);
  } catch (error) {
    notice(error.message, true);
  }
}

/** Show where the pointer is, or the crosshair after it moved: voxel, value, and position in the body. */
function showWhere(ijk) {
  const mm = state.session?.affine_ras.slice(0, 3).map((row) => (row[0] * ijk[0] + row[1] * ijk[1] + row[2] * ijk[2] + row[3]).toFixed(1));
  const [i, j, k] = ijk;
  $("where").textContent = `i ${i}  j ${j}  k ${k}   value ${+stage.valueAt(ijk).toFixed(2)}${mm ? `   RAS ${mm.join(", ")} mm` : ""}`;
}

const rangeOf = (option) => (option.value === "auto" ? stage.auto : option.value.split(",").map(Number));

/** Choose the entry of the window menu that is set, or the last one, which then names the range. */
function showWindow(low, high) {
  const presets = [...$("window").options];
  const custom = presets.pop();
  const preset = presets.find((option) => rangeOf(option).every((value, n) => value === [low, high][n]));
  custom.textContent = `${+low.toPrecision(4)} to ${+high.toPrecision(4)}`;
  custom.value = [low, high].join();
  custom.hidden = Boolean(preset);
  (preset ?? custom).selected = true;
}

function busy(text) {
  $("busy").hidden = !text;
  if (text) $("busy-text").textContent = text;
}

let fading;
function notice(text, isError = false) {
  clearTimeout(fading);
  $("notice").hidden = false;
  $("notice").textContent = text;
  $("notice").classList.toggle("error", isError);
  fading = setTimeout(() => ($("notice").hidden = true), isError ? 8000 : 3000);
}

async function suggest() {
  await act("looking", async () => {
    const at = await api.suggest(state.current);
    stage.goTo(at.map(Math.round));
    notice("the model is least certain here: click to add, right-click to remove");
  });
}

async function exportMasks(format) {
  busy("exporting …");
  try {
    await api.download(format);
  } catch (error) {
    notice(error.message, true);
  } finally {
    busy(null);
  }
}

function wire() {
  const newObject = () =>
    act("new object", async () => {
      const reply = await api.newObject();
      hand.positive = true; // a new object needs a positive prompt first
      return reply;
    });
  $("undo").onclick = () => act("undo", () => api.undo().then(redraw));
  $("redo").onclick = () => act("redo", () => api.redo().then(redraw));
  $("suggest").onclick = suggest;
  $("new-object").onclick = newObject;
  $("clean").onchange = (e) => {
    const how = JSON.parse(e.target.value);
    e.target.value = "";
    act("cleaning", () => api.clean(state.current, how));
  };
  $("help").onclick = () => $("shortcuts").showModal();
  $("export").onclick = () => $("export-dialog").showModal();
  $("do-export").onclick = () => exportMasks($("format").value);
  $("open").onclick = $("choose").onclick = () => $("file").click();
  $("example").onclick = () => open({ example: true });
  $("file").onchange = (e) => e.target.files[0] && open({ file: e.target.files[0] });
  $("by-path").onsubmit = (e) => {
    e.preventDefault();
    if ($("path").value.trim()) open({ path: $("path").value.trim() });
  };
  $("opacity").oninput = (e) => stage.setOpacity(Number(e.target.value));
  $("contour").onchange = (e) => stage.setContour(e.target.checked);
  $("heat").onchange = showHeat;
  $("window").onchange = (e) => stage.auto && stage.setWindow(...rangeOf(e.target.selectedOptions[0]));
  stage.onWindow = showWindow;
  stage.onMove = showWhere;
  $("stage").addEventListener("pointermove", (e) => {
    const spot = stage.pick(e);
    if (spot) showWhere(spot.ijk);
  });
  const area = $("stage");
  for (const kind of ["dragenter", "dragover"])
    area.addEventListener(kind, (e) => {
      e.preventDefault();
      area.classList.add("drop");
    });
  area.addEventListener("dragleave", () => area.classList.remove("drop"));
  area.addEventListener("drop", (e) => {
    e.preventDefault();
    area.classList.remove("drop");
    if (e.dataTransfer.files[0]) open({ file: e.dataTransfer.files[0] });
  });
  for (const menu of document.querySelectorAll("select")) menu.addEventListener("change", () => menu.blur()); // keys are shortcuts again
  wireKeys(newObject);
}

function wireKeys(newObject) {
  const click = (id) => () => $(id).disabled || $(id).click();
  const step = (axis, by) => () => {
    const at = stage.here();
    at[axis] = Math.min(state.session.size_ijk[axis] - 1, Math.max(0, at[axis] + by));
    stage.goTo(at);
  };
  const current = () => state.objects.find((o) => o.id === state.current);
  const keys = {
    ...Object.fromEntries(TOOLS.map((t) => [t.key, () => setTool(t.id)])),
    t: flipSign, z: click("undo"), Z: click("redo"), y: click("redo"), n: newObject, g: click("suggest"), x: click("export"), o: click("open"),
    h: click("heat"), k: click("contour"), "?": click("help"),
    m: () => current() && act("changing", () => api.editObject(state.current, { visible: !current().visible })),
    "[": () => nudge(-0.1), "]": () => nudge(0.1),
    F2: () => renameObject($("objects"), state.current),
    w: () => {
      $("window").selectedIndex = ($("window").selectedIndex + 1) % ($("window").length - 1); // the last one is no preset
      $("window").dispatchEvent(new Event("change"));
    },
    ArrowLeft: step(0, -1), ArrowRight: step(0, 1), ArrowUp: step(1, 1), ArrowDown: step(1, -1), PageUp: step(2, 1), PageDown: step(2, -1),
    Delete: removeChosen, Backspace: removeChosen,
  };
  function nudge(by) {
    $("opacity").value = Math.min(1, Math.max(0, Number($("opacity").value) + by));
    stage.setOpacity(Number($("opacity").value));
  }
  function removeChosen() {
    const prompts = current()?.prompts ?? [];
    const prompt = prompts.find((p) => p.id === state.chosen) ?? prompts.at(-1);
    if (prompt) act("segmenting", () => api.remove(prompt.id));
  }
  document.addEventListener(
    "keydown",
    (e) => {
      if (e.target.closest("input, select, dialog") || e.altKey) return;
      if (/^[1-9]$/.test(e.key) && state.objects[Number(e.key) - 1]) return choose(state.objects[Number(e.key) - 1].id);
      const work = keys[e.key] ?? (e.key === "Z" ? keys.Z : undefined);
      if (!work || !state.session || ((e.ctrlKey || e.metaKey) && !"zy".includes(e.key.toLowerCase()))) return;
      e.preventDefault();
      e.stopPropagation();
      work();
    },
    true,
  );
}

async function begin() {
  wire();
  showShortcuts($("shortcuts").querySelector("table"));
  await stage.start();
  render();
  try {
    const about = await api.about();
    $("model").replaceChildren(...about.models.map((name) => element("option", { value: name, textContent: name })));
    $("format").replaceChildren(...about.formats.map((f) => element("option", { value: f.id, textContent: f.name })));
    $("example").hidden = !about.example;
    const recent = await api.sessions();
    $("recent").replaceChildren(
      ...recent.slice(0, 6).map((s) => element("li", {}, element("button", { textContent: `Go on with ${s.name}`, onclick: () => act("opening", async () => show(await api.resume(s.id))) }))),
    );
    const wanted = location.hash.slice(1);
    if (wanted) await act("opening", async () => show(await api.resume(wanted)));
  } catch (error) {
    notice(error.message, true);
  }
  document.body.dataset.ready = "yes";
}

begin();
