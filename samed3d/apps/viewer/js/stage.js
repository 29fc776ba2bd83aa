// The picture: three planes and 3D by NiiVue, masks in its drawing layer, prompts drawn on a canvas above it.
// It converts between voxels and pixels and sends no requests.
import { Niivue, NVImage } from "../vendor/niivue.js";
import { AxisMap, MaskStore } from "./geometry.js";

const NORMAL_OF = [2, 1, 0]; // viewer axis across an axial, coronal, sagittal tile

export class Stage {
  constructor(canvas, overlay) {
    this.canvas = canvas;
    this.overlay = overlay;
    this.opacity = 0.45;
    this.contour = false;
    this.markers = [];
    this.ghost = null;
    this.heat = null;
    this.axes = null;
    this.onMove = () => {};
    this.onWindow = () => {};
    this.nv = new Niivue({
      backColor: [0.043, 0.055, 0.075, 1],
      crosshairColor: [0.36, 0.66, 1, 0.55],
      crosshairWidth: 0.15,
      crosshairWidthUnit: "percent",
      fontColor: [0.62, 0.68, 0.76, 1],
      show3Dcrosshair: true,
      multiplanarForceRender: true,
      multiplanarLayout: 2,
      multiplanarShowRender: 1,
      isRadiologicalConvention: true,
      dragAndDropEnabled: false,
      loadingText: "",
      logLevel: "error",
      tileMargin: 4,
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
      viewModeHotKey: "",
    });
    this.nv.onLocationChange = () => {
      if (!this.axes) return;
      this.drawOverlay();
      this.onMove(this.here());
    };
    this.nv.onIntensityChange = (volume) => this.onWindow(volume.cal_min, volume.cal_max);
  }

  async start() {
    await this.nv.attachToCanvas(this.canvas, false);
    widenOutlines(this.nv);
    new ResizeObserver(() => this.drawOverlay()).observe(this.canvas);
  }

  /** Remove the image and everything that lies over it. */
  clear() {
    this.setHeat(null);
    this.axes = null;
    for (const volume of [...this.nv.volumes]) this.nv.removeVolume(volume);
    this.nv.closeDrawing();
    this.drawOverlay();
  }

  /** Show an image, given as bytes of a NIfTI file; `sizeIjk` is its size. */
  async load(bytes, sizeIjk) {
    const volume = await NVImage.new(bytes, "image.nii.gz", "gray");
    this.clear();
    this.nv.addVolume(volume);
    this.axes = new AxisMap(sizeIjk, volume.img2RASstep);
    this.masks = new MaskStore(sizeIjk);
    this.auto = [volume.cal_min, volume.cal_max];
    this.nv.createEmptyDrawing();
    this.setOpacity(this.opacity);
    this.onWindow(...this.auto);
    this.goTo(sizeIjk.map((n) => Math.floor(n / 2)));
  }

  /** Paint the objects' masks, all or inside one changed box. */
  paint(objects, box = null) {
    const bitmap = this.nv.drawBitmap;
    if (!bitmap) return;
    this.masks.paint(bitmap, this.axes, objects, box?.start, box?.stop);
    this.nv.refreshDrawing(true);
    this.drawOverlay();
  }

  /** Colours of the objects, in their order, as "#rrggbb". */
  setColours(objects) {
    const channel = (at) => [0, ...objects.map((o) => parseInt(o.colour.slice(at, at + 2), 16))];
    const names = ["", ...objects.map((o) => o.name)];
    const map = { R: channel(1), G: channel(3), B: channel(5), A: [0, ...objects.map(() => 255)], I: names.map((_, n) => n), labels: names };
    this.nv.setDrawColormap(map);
  }

  setOpacity(value) {
    this.opacity = value;
    this.setContour(this.contour);
  }

  /** Masks as outlines in the planes, or filled. */
  setContour(on) {
    this.contour = on;
    this.nv.drawRimOpacity = on ? 0.95 : -1;
    this.nv.setDrawOpacity(on ? 0.08 : this.opacity);
  }

  setWindow(low, high) {
    const volume = this.nv.volumes[0];
    if (!volume) return;
    [volume.cal_min, volume.cal_max] = [low, high];
    this.nv.updateGLVolume();
    this.onWindow(volume.cal_min, volume.cal_max);
  }

  /**
   * Show a probability volume as a heat map: `load` gives the bytes of a NIfTI file; null removes what is shown. Only
   * the newest call counts, so that a slow answer covers neither a later one nor another image.
   */
  async setHeat(load) {
    const call = (this.heatCall = Symbol("heat"));
    if (!load) return this.showHeat(null);
    const bytes = await load();
    const volume = call === this.heatCall ? await NVImage.new(bytes, "probability.nii.gz", "warm", 0.6, null, 13, 255) : null;
    if (call === this.heatCall) this.showHeat(volume);
  }

  showHeat(volume) {
    const { nv } = this;
    if (this.heat) {
      nv.removeVolume(this.heat);
      // NiiVue keeps the texture of the last overlay that was removed, and its 3D view goes on drawing it.
      nv.overlayTexture = nv.rgbaTex(nv.overlayTexture, nv.gl.TEXTURE2, [2, 2, 2, 2], true);
      nv.drawScene();
    }
    this.heat = volume;
    if (volume) nv.addVolume(volume);
  }

  /** The file voxel under the crosshair. */
  here() {
    const frac = this.nv.scene.crosshairPos;
    return this.axes.toIjk(this.axes.rasSize.map((n, a) => Math.min(n - 1, Math.max(0, Math.floor(frac[a] * n)))));
  }

  /** The image's value at a file voxel. */
  valueAt(ijk) {
    return this.nv.volumes[0].getValue(...this.axes.toRas(ijk));
  }

  goTo(ijk) {
    const ras = this.axes.toRas(ijk);
    this.nv.scene.crosshairPos = this.axes.rasSize.map((n, a) => (ras[a] + 0.5) / n);
    this.nv.drawScene();
    this.drawOverlay();
    this.onMove(ijk);
  }

  /** What lies under a pointer: the file voxel and the file axis across that plane, or null outside the planes. */
  pick(event) {
    if (!this.axes) return null;
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.nv.uiData.dpr ?? 1;
    const x = (event.clientX - box.left) * ratio;
    const y = (event.clientY - box.top) * ratio;
    const tile = this.nv.screenSlices[this.nv.tileIndex(x, y)];
    if (!tile || tile.axCorSag > 2) return null;
    const frac = this.nv.canvasPos2frac([x, y]);
    if (frac[0] < 0) return null;
    const ras = this.axes.rasSize.map((n, a) => Math.min(n - 1, Math.max(0, Math.floor(frac[a] * n))));
    return { ijk: this.axes.toIjk(ras), axis: this.axes.fileAxis[NORMAL_OF[tile.axCorSag]], x: event.clientX - box.left, y: event.clientY - box.top };
  }

  /** Where a file voxel appears: a list of {x, y, far} over the planes, `far` in slices from what is shown. */
  project(ijk) {
    const ras = this.axes.toRas(ijk);
    const frac = this.axes.rasSize.map((n, a) => (ras[a] + 0.5) / n);
    const mm = this.nv.frac2mm(frac);
    const ratio = this.nv.uiData.dpr ?? 1;
    const found = [];
    for (const tile of this.nv.screenSlices) {
      if (tile.axCorSag > 2) continue;
      const normal = NORMAL_OF[tile.axCorSag];
      const shown = Math.floor(this.nv.scene.crosshairPos[normal] * this.axes.rasSize[normal]);
      const [u, v] = [[0, 1], [0, 2], [1, 2]][tile.axCorSag];
      let [left, top, width, height] = tile.leftTopWidthHeight;
      let across = (mm[u] - tile.leftTopMM[0]) / tile.fovMM[0];
      if (width < 0) {
        left += width;
        width = -width;
        across = 1 - across;
      }
      const up = 1 - (mm[v] - tile.leftTopMM[1]) / tile.fovMM[1];
      if (across < 0 || across > 1 || up < 0 || up > 1) continue;
      found.push({ x: (left + across * width) / ratio, y: (top + up * height) / ratio, far: Math.abs(ras[normal] - shown), normal: this.axes.fileAxis[normal] });
    }
    return found;
  }

  /** The prompts to draw, as the server lists them, each with a colour; `chosen` is the id of the highlighted one. */
  setMarkers(prompts, chosen = null) {
    this.markers = prompts;
    this.chosen = chosen;
    this.drawOverlay();
  }

  drawOverlay() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.canvas;
    if (this.overlay.width !== Math.round(clientWidth * ratio) || this.overlay.height !== Math.round(clientHeight * ratio)) {
      this.overlay.width = Math.round(clientWidth * ratio);
      this.overlay.height = Math.round(clientHeight * ratio);
    }
    const pen = this.overlay.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, clientWidth, clientHeight);
    if (!this.axes) return;
    for (const prompt of this.markers) this.drawPrompt(pen, prompt);
    if (this.ghost) drawGhost(pen, this.ghost);
  }

  drawPrompt(pen, prompt) {
    const colour = prompt.positive === false ? "#ff5c6c" : "#4ade80";
    if (prompt.type === "point") {
      for (const { x, y, far } of this.project(prompt.at)) if (far <= 6) drawDot(pen, x, y, colour, far, prompt.id === this.chosen, prompt.positive !== false);
    } else if (prompt.type === "box") {
      this.drawBox(pen, prompt, colour);
    } else if (prompt.path || prompt.outline) {
      this.drawPath(pen, prompt.path ?? prompt.outline, colour, Boolean(prompt.outline));
    }
  }

  drawBox(pen, prompt, colour) {
    const low = this.project(prompt.min);
    const high = this.project(prompt.max);
    const here = this.here();
    low.forEach((a) => {
      const b = high.find((c) => c.normal === a.normal);
      if (!b || here[a.normal] < prompt.min[a.normal] || here[a.normal] > prompt.max[a.normal]) return;
      pen.strokeStyle = colour;
      pen.lineWidth = prompt.id === this.chosen ? 2.5 : 1.5;
      pen.strokeRect(Math.min(a.x, b.x), Math.min(a.y, b.y), Math.abs(a.x - b.x), Math.abs(a.y - b.y));
    });
  }

  drawPath(pen, path, colour, closed) {
    const tracks = new Map();
    for (const ijk of path)
      for (const { x, y, far, normal } of this.project(ijk)) {
        if (!tracks.has(normal)) tracks.set(normal, []);
        tracks.get(normal).push({ x, y, far });
      }
    for (const track of tracks.values()) {
      if (track.length < 2 || track.some((p) => p.far > 1)) continue;
      pen.beginPath();
      track.forEach((p, n) => (n ? pen.lineTo(p.x, p.y) : pen.moveTo(p.x, p.y)));
      if (closed) pen.closePath();
      pen.strokeStyle = colour;
      pen.lineWidth = 2;
      pen.stroke();
    }
  }
}

/** NiiVue draws outlines one pixel wide; the same shader with a wider step to the neighbours draws them three wide. */
function widenOutlines(nv) {
  const { gl } = nv;
  const shader = gl.getAttachedShaders(nv.sliceMMShader.program).find((s) => gl.getShaderParameter(s, gl.SHADER_TYPE) === gl.FRAGMENT_SHADER);
  const wider = gl.getShaderSource(shader).replace(/(offset[XY] = )(dFd[xy]\(texPos\))/g, "$13.0 * $2");
  nv.setCustomSliceShader(wider);
}

function drawDot(pen, x, y, colour, far, chosen, positive) {
  pen.globalAlpha = far < 1 ? 1 : Math.max(0.15, 0.6 - far * 0.08);
  pen.beginPath();
  pen.arc(x, y, chosen ? 7 : 5, 0, 2 * Math.PI);
  pen.fillStyle = colour;
  pen.fill();
  pen.lineWidth = chosen ? 2.5 : 1.5;
  pen.strokeStyle = chosen ? "#ffffff" : "#0b0e13";
  pen.stroke();
  pen.strokeStyle = "#0b0e13";
  pen.lineWidth = 1.6;
  pen.beginPath();
  pen.moveTo(x - 2.6, y);
  pen.lineTo(x + 2.6, y);
  if (positive) {
    pen.moveTo(x, y - 2.6);
    pen.lineTo(x, y + 2.6);
  }
  pen.stroke();
  pen.globalAlpha = 1;
}

function drawGhost(pen, ghost) {
  pen.strokeStyle = ghost.positive ? "#4ade80" : "#ff5c6c";
  pen.lineWidth = 2;
  pen.setLineDash(ghost.kind === "stroke" ? [] : [6, 4]);
  pen.beginPath();
  if (ghost.kind === "box") {
    const [a, b] = [ghost.points[0], ghost.points[ghost.points.length - 1]];
    pen.rect(Math.min(a.x, b.x), Math.min(a.y, b.y), Math.abs(a.x - b.x), Math.abs(a.y - b.y));
  } else {
    ghost.points.forEach((p, n) => (n ? pen.lineTo(p.x, p.y) : pen.moveTo(p.x, p.y)));
    if (ghost.kind === "lasso") pen.closePath();
  }
  pen.stroke();
  pen.setLineDash([]);
}
