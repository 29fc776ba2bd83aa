// The tools: pointer events on a plane become clicks, boxes, scribbles and lassos in file voxels.
// The left button adds, the right button or Ctrl removes; on a touch screen the add/remove switch decides.

export const TOOLS = [
  { id: "navigate", key: "v", name: "Navigate", hint: "drag to move the crosshair, right-drag for contrast" },
  { id: "point", key: "c", name: "Click", hint: "left click adds, right or ctrl click removes" },
  { id: "box", key: "b", name: "Box", hint: "drag a box around the structure in any plane; with right or ctrl, around what does not belong" },
  { id: "scribble", key: "s", name: "Scribble", hint: "draw inside the structure; with right or ctrl, outside it" },
  { id: "lasso", key: "l", name: "Lasso", hint: "draw around the structure in one plane" },
  { id: "eraser", key: "e", name: "Eraser", hint: "draw over what does not belong" },
];

const DRAG_PX = 6;
const DOUBLE_CLICK_MS = 500;

export class Hand {
  /** `onPrompt` gets a prompt in the prompt file's own form. */
  constructor(area, stage, onPrompt) {
    this.area = area;
    this.stage = stage;
    this.onPrompt = onPrompt;
    this.tool = "point";
    this.positive = true;
    this.stroke = null;
    this.lastClick = null;
    area.addEventListener("pointerdown", (e) => this.down(e), true);
    area.addEventListener("pointermove", (e) => this.move(e), true);
    area.addEventListener("pointerup", (e) => this.up(e), true);
    area.addEventListener("pointercancel", () => this.drop(), true);
    area.addEventListener("contextmenu", (e) => e.preventDefault(), true);
    // NiiVue listens to mouse and touch: it must not see what a tool has taken.
    for (const kind of ["mousedown", "mousemove", "mouseup", "touchstart", "touchmove", "touchend"])
      area.addEventListener(kind, (e) => this.shield(e), { capture: true, passive: false });
  }

  shield(event) {
    if (!this.stroke && !(event.type === "mouseup" && this.justEnded)) return;
    if (event.touches?.length > 1) return this.drop();
    event.stopPropagation();
    if (event.cancelable) event.preventDefault();
  }

  down(event) {
    this.justEnded = false;
    if (this.tool === "navigate" || event.button === 1) return;
    const spot = this.stage.pick(event);
    if (!spot) return;
    const remove = event.button === 2 || event.ctrlKey || event.metaKey;
    const positive = this.tool === "eraser" ? false : remove ? !this.positive : this.positive;
    this.stroke = { axis: spot.axis, start: spot, spots: [spot], positive, moved: false };
    this.area.setPointerCapture?.(event.pointerId);
  }

  move(event) {
    if (!this.stroke) return;
    const spot = this.stage.pick(event);
    if (!spot || spot.axis !== this.stroke.axis) return;
    if (this.tool !== "point") spot.ijk[this.stroke.axis] = this.stroke.start.ijk[this.stroke.axis];
    this.stroke.moved ||= Math.hypot(spot.x - this.stroke.start.x, spot.y - this.stroke.start.y) > DRAG_PX;
    this.stroke.spots.push(spot);
    if (this.tool === "point") {
      if (this.stroke.moved) this.stage.goTo(spot.ijk); // dragging with the click tool looks around
      return;
    }
    const kind = { box: "box", lasso: "lasso" }[this.tool] ?? "stroke";
    this.stage.ghost = { kind, positive: this.stroke.positive, points: this.stroke.spots };
    this.stage.drawOverlay();
  }

  up(event) {
    if (!this.stroke) return;
    const { spots, moved, positive, start, axis } = this.stroke;
    this.drop();
    this.justEnded = true;
    if (this.tool === "point") {
      if (moved || this.isDoubleClick(start, event.timeStamp)) return;
      this.stage.goTo(start.ijk);
      this.onPrompt({ type: "point", at: start.ijk, positive });
      return;
    }
    const path = thinned(spots.map((s) => s.ijk));
    if (this.tool === "box") {
      if (!moved) return;
      const last = spots[spots.length - 1].ijk;
      const [min, max] = [start.ijk.map((v, a) => Math.min(v, last[a])), start.ijk.map((v, a) => Math.max(v, last[a]))];
      this.onPrompt(positive ? { type: "box", min, max } : { type: "lasso", outline: around(min, max, axis), positive });
    } else if (this.tool === "lasso") {
      if (path.length >= 3) this.onPrompt({ type: "lasso", outline: path, positive });
    } else {
      this.onPrompt({ type: "scribble", path, positive });
    }
  }

  /** Whether a click is the second of a double click, which counts once. */
  isDoubleClick(spot, time) {
    const last = this.lastClick;
    this.lastClick = { x: spot.x, y: spot.y, time };
    return last !== null && time - last.time < DOUBLE_CLICK_MS && Math.hypot(spot.x - last.x, spot.y - last.y) <= DRAG_PX;
  }

  drop() {
    this.stroke = null;
    this.stage.ghost = null;
    this.stage.drawOverlay();
  }
}

/** The outline of a flat box, just inside its outermost voxels' borders: a box cannot be negative, a lasso can. */
function around(min, max, axis) {
  const [u, v] = [0, 1, 2].filter((a) => a !== axis);
  const corners = [[min, min], [max, min], [max, max], [min, max]];
  return corners.map(([atU, atV]) => {
    const corner = [...min];
    corner[u] = atU[u] + (atU === max ? 0.49 : -0.49);
    corner[v] = atV[v] + (atV === max ? 0.49 : -0.49);
    return corner;
  });
}

/** A path without repeated voxels. */
function thinned(path) {
  return path.filter((p, n) => !n || p.some((v, a) => v !== path[n - 1][a]));
}
