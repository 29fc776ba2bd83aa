// The server's REST API as functions; masks are returned unpacked. The routes are described at /docs.
import { fromBase64, inflate } from "./geometry.js";

const TOKEN = "samed3d-token";

export class Api {
  constructor(base = "../api") {
    this.base = base;
    this.id = null;
    this.revision = null;
  }

  about() {
    return this.ask("GET", "/about");
  }

  sessions() {
    return this.ask("GET", "/sessions");
  }

  /** `how`: {file} or {path} or {example: true}, and {model}. */
  async open({ file, model, ...how }) {
    const named = model ? { model } : {};
    const session = file
      ? await this.ask("POST", `/sessions/upload?${new URLSearchParams({ name: file.name, ...named })}`, file)
      : await this.ask("POST", "/sessions", { ...how, ...named });
    return this.keep(session);
  }

  async resume(id) {
    return this.keep(await this.ask("GET", `/sessions/${encodeURIComponent(id)}`));
  }

  keep(session) {
    this.id = session.id;
    this.revision = session.revision;
    return session;
  }

  /** The image as bytes of a NIfTI file. */
  image() {
    return this.bytes(`${this.here}/image.nii.gz`);
  }

  async masks() {
    return unpacked((await this.ask("GET", `${this.here}/masks`)).updates);
  }

  add(prompt, objectId) {
    return this.edit("POST", "/prompts", { prompt, object_id: objectId ?? 1 });
  }

  /** Replace a prompt as the server listed it by another. */
  change(promptId, { id, ...prompt }) {
    return this.edit("PUT", `/prompts/${promptId}`, { prompt });
  }

  remove(promptId) {
    return this.edit("DELETE", `/prompts/${promptId}`);
  }

  undo() {
    return this.edit("POST", "/undo", {});
  }

  redo() {
    return this.edit("POST", "/redo", {});
  }

  newObject() {
    return this.edit("POST", "/objects", {});
  }

  editObject(id, changes) {
    return this.edit("PATCH", `/objects/${id}`, changes);
  }

  /** `how`: keys of the server's `Cleaning`. */
  clean(id, how) {
    return this.edit("POST", `/objects/${id}/clean`, how);
  }

  removeObject(id) {
    return this.edit("DELETE", `/objects/${id}`);
  }

  async suggest(objectId) {
    return (await this.ask("GET", `${this.here}/suggest?object_id=${objectId}`)).at;
  }

  /** The probability of an object as bytes of a NIfTI file. */
  heat(objectId) {
    return this.bytes(`${this.here}/objects/${objectId}/probability.nii.gz`);
  }

  /** Save an export to the user's disk. */
  async download(format) {
    const answer = await this.fetch("GET", `${this.here}/export?format=${encodeURIComponent(format)}`);
    const name = /filename="?([^";]+)/.exec(answer.headers.get("content-disposition") ?? "")?.[1] ?? "segmentation";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    return name;
  }

  get here() {
    return `/sessions/${encodeURIComponent(this.id)}`;
  }

  /** A change, refused by the server where another tab changed the session since. */
  async edit(method, path, body) {
    const known = method === "DELETE" ? `?revision=${this.revision}` : "";
    const reply = await this.ask(method, this.here + path + known, body && { ...body, revision: this.revision });
    this.revision = reply.session.revision;
    return { ...reply, updates: await unpacked(reply.updates) };
  }

  async bytes(path) {
    return (await this.fetch("GET", path)).arrayBuffer();
  }

  async ask(method, path, body) {
    return (await this.fetch(method, path, body)).json();
  }

  async fetch(method, path, body) {
    const isFile = body instanceof Blob;
    const headers = {};
    if (body) headers["Content-Type"] = isFile ? "application/octet-stream" : "application/json";
    const token = sessionStorage.getItem(TOKEN);
    if (token) headers.Authorization = `Bearer ${token}`;
    let answer;
    try {
      answer = await fetch(this.base + path, { method, headers, body: isFile ? body : body && JSON.stringify(body) });
    } catch {
      throw new Error("the server does not answer; is samed3d still running?");
    }
    if (answer.ok) return answer;
    if (answer.status === 401) {
      const given = window.prompt("This server asks for its token:");
      if (given) {
        sessionStorage.setItem(TOKEN, given.trim());
        return this.fetch(method, path, body);
      }
    }
    const said = await answer.json().catch(() => ({}));
    const error = new Error(said.detail ?? `the server answered ${answer.status}`);
    error.status = answer.status;
    throw error;
  }
}

/** Updates with their bits as bytes and their boxes in (k, j, i). */
function unpacked(updates) {
  return Promise.all(
    updates.map(async (u) => ({ object_id: u.object_id, start: u.start.toReversed(), stop: u.stop.toReversed(), bits: await inflate(fromBase64(u.bits)) })),
  );
}
