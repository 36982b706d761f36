// Asks the lists every two seconds and draws them. Everything from the cluster goes into the page as text, never as HTML.
"use strict";

const token = location.hash.slice(1);
const $ = (id) => document.getElementById(id);

async function call(method, path, body) {
  const headers = { Authorization: "Bearer " + token };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch("/api/" + path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  const text = await response.text();
  let answer = null;
  try { answer = JSON.parse(text); } catch { /* not ours: shown as it is */ }
  if (!response.ok) throw new Error(answer?.error ?? (text || "HTTP " + response.status));
  return answer;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return (unit === 0 || count >= 100 ? count.toFixed(0) : count.toFixed(1)) + " " + units[unit];
}
const seconds = (ms) => ms === null || ms === undefined ? "" : (ms / 1000).toFixed(1) + " s";
const percent = (share) => (share * 100).toFixed(0) + " %";

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
const word = (text) => element("span", text, text);
const number = (text) => ({ number: true, content: text });
function bar(value, max, text) {
  const cell = element("span");
  const progress = element("progress");
  progress.max = Math.max(max, 1);
  progress.value = value;
  progress.title = text;
  cell.append(progress, " " + text);
  return cell;
}
function note(...lines) {
  const cell = element("span");
  lines.forEach((line, at) => cell.append(at ? element("br") : "", at ? element("span", line, "note") : line));
  return cell;
}

function draw(table, heads, rows, empty) {
  const head = element("tr");
  const headRow = heads.map((text) => element("th", text.replace(/^#/, ""), text.startsWith("#") ? "number" : ""));
  head.append(...headRow);
  const body = rows.map((cells) => {
    const row = element("tr");
    for (const cell of cells) {
      const inner = cell && cell.number ? cell.content : cell;
      const td = element("td", undefined, cell && cell.number ? "number" : "");
      td.append(inner ?? "");
      row.append(td);
    }
    return row;
  });
  if (body.length === 0) {
    const row = element("tr");
    const td = element("td", empty, "empty");
    td.colSpan = heads.length;
    row.append(td);
    body.push(row);
  }
  table.replaceChildren(head, ...body);
}

function drawTasks(tasks) {
  const rows = tasks.map((task) => {
    const total = Object.values(task.instances).reduce((sum, count) => sum + count, 0);
    const up = task.instances.running ?? 0;
    const states = Object.entries(task.instances).map(([state, count]) => count + " " + state).join(", ");
    const stop = element("button", "End");
    stop.disabled = task.status === "ending";
    stop.onclick = async () => {
      if (!confirm(`End ${task.name} (task ${task.task})? Its ${total} instances and their disks go.`)) return;
      try { await call("DELETE", "tasks/" + task.task); } catch (error) { alert(error.message); }
      refresh();
    };
    return [number(String(task.task)), task.name, word(task.status), bar(up, total, `${up} of ${total} up`), states,
      number(seconds(task.up_ms)), new Date(task.created_ms).toLocaleTimeString(), stop];
  });
  draw($("tasks"), ["#task", "plan", "state", "up", "instances", "#all up after", "ordered", ""], rows, "nothing is deployed");
}

function drawNodes(nodes) {
  const items = ["processor", "memory", "disk", "network"];
  const rows = nodes.map((node) => {
    const load = items.map((name, item) => name + " " + percent(node.load[item] ?? 0)).join(", ");
    const coming = node.images.filter((image) => !image.complete)
      .map((image) => `${image.name}: ${bytes(image.present)} here${image.boot_complete ? ", boots" : ""}`);
    return [node.name, word(node.online ? "online" : "offline"), note(bar(node.score, 1, percent(node.score)), load),
      number(`${bytes(node.memory_free)} of ${bytes(node.memory_bytes)}`), number(String(node.cpus)), number(String(node.instances)),
      note(`${node.images.filter((image) => image.complete).length} whole`, ...coming), node.troubles.join("; ")];
  });
  draw($("nodes"), ["node", "state", "load", "#memory free", "#processors", "#instances", "images", "troubles"], rows,
    "no node is registered: start `bootcache agent` on one");
}

function drawImages(images) {
  const rows = images.map((image) => [image.name, image.kind, number(bytes(image.size)),
    number(image.boot_bytes ? bytes(image.boot_bytes) : "not recorded"), image.complete.join(", "), image.partial.join(", ")]);
  draw($("images"), ["image", "kind", "#size", "#boot cache", "whole on", "in part on"], rows, "no node has an image");
}

function drawInstances(instances) {
  const chosen = $("status").value;
  const states = [...new Set(instances.map((instance) => instance.status))].sort();
  const known = [...$("status").options].map((option) => option.value);
  for (const state of states) if (!known.includes(state)) $("status").append(new Option(state, state));
  const rows = instances.filter((instance) => !chosen || instance.status === chosen).map((instance) => [
    instance.name, instance.kind, instance.image, instance.node, note(word(instance.status), ...(instance.reason ? [instance.reason] : [])),
    number(seconds(instance.up_ms)), instance.addresses.join(", "), number(percent(instance.cpu)), number(bytes(instance.memory_bytes)),
    number(`${bytes(instance.network_bytes[0])} / ${bytes(instance.network_bytes[1])}`)]);
  draw($("instances"), ["instance", "kind", "image", "node", "state", "#up after", "address", "#processor", "#memory", "#in / out"], rows, "none");
}

let running = false;
async function refresh() {
  if (running) return;
  running = true;
  try {
    const [tasks, nodes, images, instances] =
      await Promise.all(["tasks", "nodes", "images", "instances"].map((what) => call("GET", what)));
    drawTasks(tasks); drawNodes(nodes); drawImages(images); drawInstances(instances);
    const online = nodes.filter((node) => node.online).length;
    const up = instances.filter((instance) => instance.status === "running").length;
    $("summary").textContent = `${online} of ${nodes.length} nodes online, ${up} of ${instances.length} instances up, ${images.length} images`;
    $("trouble").hidden = true;
  } catch (error) {
    $("trouble").textContent = error.message;
    $("trouble").hidden = false;
  }
  running = false;
}

// One deployment however often the button is pressed for the same text.
let order = null;
$("deploy").onclick = async () => {
  const plan = $("plan").value;
  if (order?.plan !== plan) order = { plan, request: [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("") };
  $("answer").hidden = false;
  try {
    const { task } = await call("POST", "tasks", order);
    $("answer").textContent = `task ${task} is under way`;
  } catch (error) {
    $("answer").textContent = error.message;
  }
  refresh();
};
$("file").onchange = async () => {
  const [file] = $("file").files;
  if (file) $("plan").value = await file.text();
};
$("status").onchange = refresh;
refresh();
setInterval(() => { if (!document.hidden) refresh(); }, 2000);
