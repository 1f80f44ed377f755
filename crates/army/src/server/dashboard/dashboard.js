// The dashboard: asks the API once a second, and shows what it says.

import { openTerminal } from "/terminal.js";

const element = (id) => document.getElementById(id);
let key = sessionStorage.getItem("army-key") || "";
let timer = 0;

function say(text, bad) {
  element("status").textContent = text;
  element("status").classList.toggle("bad", Boolean(bad));
}

async function api(method, path, body) {
  const headers = { Authorization: `Bearer ${key}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  const value = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw Object.assign(new Error(value.detail), { status: answer.status });
  return value;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes.toFixed(unit && bytes < 100 ? 1 : 0)} ${units[unit]}`;
}

// Rows stay the same elements while what they are about is there, so that a click finds its button.
function rows(table, list) {
  const body = element(table).tBodies[0];
  const old = new Map([...body.rows].map((row) => [row.dataset.id, row]));
  list.forEach(({ id, cells, actions }, index) => {
    let row = old.get(id);
    old.delete(id);
    if (!row) {
      row = document.createElement("tr");
      row.dataset.id = id;
      for (const _ of cells) row.insertCell();
      if (actions) row.insertCell().append(...actions());
    }
    cells.forEach((text, column) => {
      const cell = row.cells[column];
      if (cell.textContent !== text) cell.textContent = text;
    });
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] || null);
  });
  for (const row of old.values()) row.remove();
}

function button(text, label, action) {
  const made = document.createElement("button");
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => action().catch((error) => say(error.message, true)));
  return made;
}

async function fork(template) {
  const start = performance.now();
  const { vms } = await api("POST", "/v1/vms", { template });
  const whole = (performance.now() - start).toFixed(1);
  const times = vms[0].fork;
  const running = (times.running_us / 1000).toFixed(1);
  say(`${vms[0].name}: running after ${running} ms, here after ${whole} ms`);
  await look();
}

async function act(method, path, done) {
  await api(method, path, method === "POST" ? {} : undefined);
  say(done);
  await look();
}

async function look() {
  const [hosts, templates, page] = await Promise.all([
    api("GET", "/v1/hosts"), api("GET", "/v1/templates"), api("GET", "/v1/vms?limit=500"),
  ]);
  rows("hosts", hosts.map((host) => ({
    id: host.name,
    cells: [
      host.name, host.state, host.vms === undefined ? '' : String(host.vms), size(host.capacity?.memory_bytes),
      size(host.capacity?.private_bytes), size(host.capacity?.promised_bytes),
      size(host.capacity?.available_bytes),
    ],
  })));
  rows("templates", templates.map((it) => ({ ...it, shown: it.tenant ? `${it.tenant}/${it.name}` : it.name })).map((it) => ({
    id: it.shown,
    cells: [
      it.shown, it.visibility, it.tags.join(", "), it.hosts.join(", "), size(it.memory_bytes),
      size(it.data_bytes), String(it.vms), `${it.ready} of ${it.standbys}`,
    ],
    // A bare name would mean a template of the own tenant first.
    actions: () => [button("Fork", `Fork ${it.shown}`, () => fork(it.tenant ? it.shown : `/${it.name}`))],
  })));
  rows("vms", page.vms.map((vm) => ({
    id: vm.id,
    cells: [
      vm.name, vm.template, vm.host, vm.state,
      vm.fork ? `${(vm.fork.running_us / 1000).toFixed(1)} ms` : "",
      vm.memory ? size(vm.memory.private_bytes) : "",
      vm.memory ? size(vm.memory.shared_bytes) : "",
    ],
    actions: () => [
      button("Terminal", `Terminal in ${vm.name}`, async () => show(vm)),
      button("Fork", `Fork ${vm.name}`, () => act("POST", `/v1/vms/${vm.id}/fork`, `${vm.name} was forked`)),
      button("Destroy", `Destroy ${vm.name}`, () => act("DELETE", `/v1/vms/${vm.id}`, `${vm.name} is gone`)),
    ],
  })));
}

let terminal = null;

function show(vm) {
  hangUp();
  element("terminal-vm").textContent = vm.name;
  element("terminal").hidden = false;
  terminal = openTerminal(vm, key, element("screen"));
}

function hangUp() {
  if (terminal) terminal.close();
  terminal = null;
  element("terminal").hidden = true;
}

element("hang-up").addEventListener("click", hangUp);

function open(known) {
  element("login").hidden = known;
  element("main").hidden = !known;
  element("leave").hidden = !known;
  clearInterval(timer);
  if (known) timer = setInterval(refresh, 1000);
}

async function refresh() {
  try {
    await look();
  } catch (error) {
    say(error.message || "the server does not answer", true);
    if (error.status === 401) { forget(); }
  }
}

function forget() {
  hangUp();
  key = "";
  sessionStorage.removeItem("army-key");
  open(false);
}

element("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = element("key").value.trim();
  try {
    await look();
    sessionStorage.setItem("army-key", key);
    say("");
    open(true);
  } catch (error) {
    say(error.message || "the server does not answer", true);
  }
});
element("leave").addEventListener("click", forget);
open(Boolean(key));
if (key) refresh();
