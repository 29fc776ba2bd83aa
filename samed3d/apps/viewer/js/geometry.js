// Voxel arithmetic of the page: the file's own order (i fastest, as NIfTI stores it) beside the viewer's (right, anterior, superior).
// It uses neither the page nor the network.

/** Base64 text as bytes. */
export function fromBase64(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let n = 0; n < raw.length; n++) bytes[n] = raw.charCodeAt(n);
  return bytes;
}

/** Bytes of a zlib stream. */
export async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** How the axes of a file lie in the viewer: for each viewer axis, which file axis it is and whether it runs backwards. */
export class AxisMap {
  constructor(sizeIjk, rasSteps) {
    this.size = sizeIjk;
    const strides = [1, sizeIjk[0], sizeIjk[0] * sizeIjk[1]];
    this.axes = rasSteps.map((step) => strides.map((s, n) => (s === Math.abs(step) ? n : -1)).filter((n) => n >= 0));
    // An axis of one voxel shares its stride with the next: take each file axis once.
    const taken = new Set();
    this.fileAxis = [0, 1, 2].map((a) => {
      const free = this.axes[a].find((n) => !taken.has(n) && (sizeIjk[n] > 1 || this.axes[a].length === 1));
      const axis = free ?? this.axes[a].find((n) => !taken.has(n)) ?? [0, 1, 2].find((n) => !taken.has(n));
      taken.add(axis);
      return axis;
    });
    this.backwards = rasSteps.map((step) => step < 0);
    this.rasSize = this.fileAxis.map((n) => sizeIjk[n]);
    const rasStride = [1, this.rasSize[0], this.rasSize[0] * this.rasSize[1]];
    this.base = 0;
    this.stride = [0, 0, 0]; // of the viewer's array per step along i, j, k
    this.fileAxis.forEach((n, a) => {
      this.stride[n] = this.backwards[a] ? -rasStride[a] : rasStride[a];
      if (this.backwards[a]) this.base += rasStride[a] * (this.rasSize[a] - 1);
    });
  }

  /** A viewer voxel of a file voxel. */
  toRas(ijk) {
    return this.fileAxis.map((n, a) => (this.backwards[a] ? this.rasSize[a] - 1 - ijk[n] : ijk[n]));
  }

  /** A file voxel of a viewer voxel. */
  toIjk(ras) {
    const ijk = [0, 0, 0];
    this.fileAxis.forEach((n, a) => (ijk[n] = this.backwards[a] ? this.rasSize[a] - 1 - ras[a] : ras[a]));
    return ijk;
  }
}

/** The masks of all objects, one bit per voxel of the file each, so that showing and hiding needs no server. */
export class MaskStore {
  constructor(sizeIjk) {
    this.size = sizeIjk;
    this.count = sizeIjk[0] * sizeIjk[1] * sizeIjk[2];
    this.masks = new Map();
  }

  /** Write the mask of an object inside a box: start and stop in (k, j, i), `bits` packed in that order, highest bit first. */
  write(objectId, startKji, stopKji, bits) {
    if (!this.masks.has(objectId)) this.masks.set(objectId, new Uint8Array(Math.ceil(this.count / 8)));
    const mask = this.masks.get(objectId);
    const [nx, ny] = this.size;
    let n = 0;
    for (let k = startKji[0]; k < stopKji[0]; k++)
      for (let j = startKji[1]; j < stopKji[1]; j++) {
        let at = (k * ny + j) * nx + startKji[2];
        for (let i = startKji[2]; i < stopKji[2]; i++, n++, at++) {
          const on = (bits[n >> 3] >> (7 - (n & 7))) & 1;
          if (on) mask[at >> 3] |= 1 << (at & 7);
          else mask[at >> 3] &= ~(1 << (at & 7));
        }
      }
  }

  clear(objectId) {
    this.masks.delete(objectId);
  }

  /** Paint the visible objects (bottom first) into a viewer array inside a box; the value is the object's place in `order` plus one. */
  paint(bitmap, axisMap, order, startKji = [0, 0, 0], stopKji = [this.size[2], this.size[1], this.size[0]]) {
    const layers = order.map((o) => (o.visible ? this.masks.get(o.id) : undefined));
    const [nx, ny] = this.size;
    const [si, sj, sk] = axisMap.stride;
    for (let k = startKji[0]; k < stopKji[0]; k++)
      for (let j = startKji[1]; j < stopKji[1]; j++) {
        let at = (k * ny + j) * nx + startKji[2];
        let to = axisMap.base + startKji[2] * si + j * sj + k * sk;
        for (let i = startKji[2]; i < stopKji[2]; i++, at++, to += si) {
          let value = 0;
          for (let n = layers.length - 1; n >= 0 && !value; n--)
            if (layers[n] && (layers[n][at >> 3] >> (at & 7)) & 1) value = n + 1;
          bitmap[to] = value;
        }
      }
  }
}
