"use strict";
// The tree, the choice and its figures. The choice is a set of paths of real modules; a row represents one or many.

const $ = (id) => document.getElementById(id);
const chosen = new Set();
const past = []; // earlier choices, for undo
const opened = new Set(); // keys of expanded rows
const unfolded = new Set(); // keys of folded rows that are shown as their members
let root, total, refused = new Map(), focused, query = "", typed = "", typedAt = 0, counting, timer;

const tokenAt = (path, depth) => path.split(".")[depth];
const depthOf = (node) => node.paths[0].split(".").length - 1;
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en");

async function send(action, data) {
  const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(data) };
  if (action === "count") request.signal = counting.signal;
  const response = await fetch(action, request).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("Python is no longer listening to this page.");
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// ---- the tree: rows are made from the folded nodes that the server sent ------------------------------------------

// The part of a folded node whose path has `token` at `depth`: one of its members, folded inside as before.
function part(node, depth, token) {
  const paths = node.paths.filter((path) => tokenAt(path, depth) === token);
  return {
    ...node,
    name: depthOf(node) === depth ? token : node.name,
    paths,
    size: (node.size * paths.length) / node.paths.length,
    children: node.children.map((child) => part(child, depth, token)),
  };
}

// The rows below a row, each with a key that stays the same while it is folded, unfolded and filtered.
function below(row) {
  row.rows ??= row.children.flatMap((child) => {
    const key = `${row.key}/${child.name}`;
    const depth = depthOf(child);
    const tokens = [...new Set(child.paths.map((path) => tokenAt(path, depth)))];
    const folded = { ...child, key, parent: row, foldable: tokens.length > 1 };
    if (!unfolded.has(key) || tokens.length < 2) return [folded];
    return tokens.map((token) => ({ ...part(child, depth, token), key: `${key}:${token}`, parent: row, group: key }));
  });
  return row.rows.filter((other) => $("bare").checked || !other.bare);
}

function refold() { // forget the rows below every row, because what is unfolded has changed
  root.rows = undefined;
}

const nameHit = (path) => {
  const at = path.toLowerCase().lastIndexOf(query);
  return at >= 0 && at + query.length > path.lastIndexOf(".") + 1; // in the last token, not only in one above
};
const ownHit = (row) => row.class.toLowerCase().includes(query) || row.name.toLowerCase().includes(query) || row.paths.some(nameHit);
const hit = (row) => !query || ownHit(row) || below(row).some(hit);
const shown = (row) => below(row).filter(hit);
const isOpen = (row) => below(row).length > 0 && (query ? shown(row).some((r) => hit(r)) : opened.has(row.key));

function* visible(row = root) {
  for (const child of shown(row)) {
    yield child;
    if (isOpen(child)) yield* visible(child);
  }
}
function* every(row = root) {
  for (const child of below(row)) {
    yield child;
    yield* every(child);
  }
}

const count = (row) => row.paths.reduce((n, path) => n + chosen.has(path), 0);
const inside = (row) => {
  let n = 0;
  for (const child of every(row)) n += count(child);
  return n;
};

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function item(row, level, position, size) {
  const li = element("li");
  const own = count(row), all = own === row.paths.length;
  const expandable = shown(row).length > 0, expanded = expandable && isOpen(row);
  const within = expanded ? 0 : inside(row);
  li.setAttribute("role", "treeitem");
  li.setAttribute("aria-level", level);
  li.setAttribute("aria-posinset", position);
  li.setAttribute("aria-setsize", size);
  li.setAttribute("aria-selected", all);
  if (expandable) li.setAttribute("aria-expanded", expanded);
  const many = row.paths.length > 1;
  const said = [row.name, row.class, many ? `${row.paths.length} modules` : "", `${short.format(row.size)} parameters`];
  if (own && !all) said.push(`${own} selected`);
  if (within) said.push(`${within} selected inside`);
  if (row.foldable) said.push("folded");
  li.setAttribute("aria-label", said.filter(Boolean).join(", "));
  li.tabIndex = row.key === focused ? 0 : -1;
  li.dataset.key = row.key;
  li.row = row;
  if (row.paths.some((path) => refused.has(path))) {
    li.classList.add("refused");
    li.title = refused.get(row.paths.find((path) => refused.has(path)));
  }
  const line = element("div", "node");
  line.append(element("span", "twist"), element("span", `box ${all ? "all" : own ? "some" : ""}`), marked(row.name));
  if (many) line.append(element("span", "times", own && !all ? `${own} of ${row.paths.length}` : `× ${row.paths.length}`));
  line.append(element("span", "class", row.class));
  if (within) line.append(element("span", "inside", `${within} inside`));
  const leaves = element("span", "leaves", row.leaves);
  leaves.title = row.leaves;
  line.append(leaves);
  if (row.foldable || row.group) {
    const button = element("button", "fold", row.foldable ? "unfold" : "fold");
    button.type = "button";
    button.tabIndex = -1; // + and − do it from the keyboard
    line.append(button);
  }
  line.append(element("span", "numel", row.size ? short.format(row.size) : ""));
  line.setAttribute("aria-hidden", "true"); // aria-label says all of it
  li.append(line);
  if (expanded) {
    const group = element("ul");
    group.setAttribute("role", "group");
    fill(group, row, level + 1);
    li.append(group);
  }
  return li;
}

function marked(name) {
  const span = element("span", "name");
  const at = query ? name.toLowerCase().indexOf(query) : -1;
  if (at < 0) span.textContent = name;
  else span.append(name.slice(0, at), element("mark", "", name.slice(at, at + query.length)), name.slice(at + query.length));
  return span;
}

function fill(list, row, level) {
  const rows = shown(row);
  list.replaceChildren(...rows.map((child, i) => item(child, level, i + 1, rows.length)));
}

function draw(refocus = false) {
  const rows = [...visible()];
  if (!rows.some((row) => row.key === focused)) focused = rows[0]?.key;
  fill($("tree"), root, 1);
  $("nothing").hidden = rows.length > 0;
  $("matches").hidden = !query || rows.length === 0;
  if (refocus) current()?.focus();
}
const current = () => document.querySelector(`#tree [data-key="${CSS.escape(focused ?? "")}"]`);

function focusRow(row) {
  if (!row || row === root) return;
  const before = current();
  if (before) before.tabIndex = -1;
  focused = row.key;
  const now = current();
  if (!now) return;
  now.tabIndex = 0;
  now.focus();
  now.firstChild.scrollIntoView({ block: "nearest" });
}

// ---- what a person does -------------------------------------------------------------------------------------------

function choose(change) {
  past.push([...chosen]);
  change();
  changed();
}

function changed() {
  $("undo").disabled = past.length === 0;
  $("clear").disabled = chosen.size === 0;
  refused = new Map();
  busy(true); // from now on, and not from the request on: what is shown belongs to an older choice
  counting?.abort();
  counting = undefined;
  draw($("tree").contains(document.activeElement));
  clearTimeout(timer);
  timer = setTimeout(figures, 60);
}

const toggle = (row) => choose(() => {
  const off = count(row) === row.paths.length;
  for (const path of row.paths) off ? chosen.delete(path) : chosen.add(path);
});

function expand(row, on) {
  on ? opened.add(row.key) : opened.delete(row.key);
  draw(true);
}

function unfold(row) {
  if (!row.foldable) return;
  unfolded.add(row.key);
  refold();
  focused = `${row.key}:${tokenAt(row.paths[0], depthOf(row))}`;
  draw(true);
}

function fold(row) {
  while (row && !row.group) row = row.parent;
  if (!row) return;
  unfolded.delete(row.group);
  focused = row.group;
  refold();
  draw(true);
}

function undo() {
  if (!past.length) return;
  const before = past.pop();
  chosen.clear();
  before.forEach((path) => chosen.add(path));
  changed();
}

const busy = (on) => document.querySelector(".figures").classList.toggle("busy", on);

// Counted by the server, which builds the delta; an answer to an older choice is dropped.
async function figures() {
  counting?.abort();
  counting = new AbortController();
  const mine = counting;
  busy(true);
  try {
    const answer = await send("count", { method: $("method").value, paths: [...chosen] });
    if (mine === counting) show(answer);
  } catch (error) {
    if (mine === counting) failed(error);
  }
  if (mine === counting) busy(false);
}
const failed = (error) => show({ text: $("text").textContent, error: error.message, refused: [] });

function show(answer) {
  $("sites").textContent = answer.error ? "–" : whole.format(answer.sites);
  $("parameters").textContent = answer.error ? "–" : answer.parameters < 1e7 ? whole.format(answer.parameters) : short.format(answer.parameters);
  $("share").textContent = answer.error ? "–" : `${((100 * answer.parameters) / (total || 1)).toPrecision(2) * 1} %`;
  $("text").textContent = answer.text;
  $("error").hidden = !answer.error;
  $("reason").textContent = answer.error;
  $("remove").hidden = !answer.refused.length;
  $("remove").textContent = answer.refused.length === 1 ? "Take it out" : `Take these ${answer.refused.length} out`;
  $("done").disabled = chosen.size === 0;
  $("copy").disabled = chosen.size === 0;
  const before = refused.size;
  refused = new Map(answer.refused);
  if (before || refused.size) draw($("tree").contains(document.activeElement));
  $("status").textContent = answer.error ? "" : `${answer.sites} sites, ${whole.format(answer.parameters)} parameters`;
}

let finishing = false;
async function finish(action, data) {
  if (finishing) return; // a double click is one answer
  finishing = true;
  try {
    const { count: n } = await send(action, data);
    $("ended").textContent = action === "done" ? `${n} module${n === 1 ? "" : "s"} handed back` : "Cancelled";
  } catch (error) {
    failed(error);
    finishing = false;
    return;
  }
  $("end").hidden = false;
  for (const part of document.querySelectorAll("header, main")) part.inert = true;
  $("end").focus();
}

$("tree").addEventListener("click", (event) => {
  // A screen reader clicks on the row itself; the lines beside a group belong to no row.
  if (event.target.matches("ul")) return;
  const { row } = event.target.closest("li");
  focusRow(row);
  if (event.target.closest(".twist")) expand(row, !isOpen(row));
  else if (event.target.closest(".fold")) row.foldable ? unfold(row) : fold(row);
  else toggle(row);
});
$("tree").addEventListener("dblclick", (event) => event.preventDefault());

$("tree").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const rows = [...visible()];
  const at = rows.findIndex((row) => row.key === focused);
  const row = rows[at];
  if (!row) return;
  const keys = {
    ArrowDown: () => focusRow(rows[at + 1]),
    ArrowUp: () => focusRow(rows[at - 1]),
    ArrowRight: () => (!shown(row).length ? undefined : isOpen(row) ? focusRow(shown(row)[0]) : expand(row, true)),
    ArrowLeft: () => (isOpen(row) && !query ? expand(row, false) : focusRow(row.parent)),
    Home: () => focusRow(rows[0]),
    End: () => focusRow(rows.at(-1)),
    Enter: () => toggle(row),
    " ": () => toggle(row),
    "+": () => unfold(row),
    "-": () => fold(row),
    "*": () => { shown(row.parent).forEach((other) => opened.add(other.key)); draw(true); },
  };
  if (keys[event.key]) keys[event.key]();
  else if (event.key.length === 1 && event.key !== "/") jump(event.key.toLowerCase(), rows, at, event.timeStamp);
  else return;
  event.preventDefault();
  event.stopPropagation();
});

// Type-ahead: to the next row whose name starts with what was typed in quick succession.
function jump(key, rows, at, now) {
  typed = now - typedAt > 700 ? key : typed + key;
  typedAt = now;
  const from = typed.length === 1 ? at + 1 : at;
  focusRow([...rows.slice(from), ...rows.slice(0, from)].find((row) => row.name.toLowerCase().startsWith(typed)));
}

document.addEventListener("keydown", (event) => {
  const writing = event.target.matches("input[type=search], select");
  if (event.key === "/" && !writing) { $("filter").focus(); event.preventDefault(); }
  if (event.key === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !writing) { undo(); event.preventDefault(); }
});
$("filter").addEventListener("input", () => { query = $("filter").value.trim().toLowerCase(); draw(); });
$("filter").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" && current()) { current().focus(); event.preventDefault(); }
});
$("matches").addEventListener("click", () => choose(() => {
  for (const row of visible()) {
    if (ownHit(row)) row.paths.filter((path) => row.class.toLowerCase().includes(query) || nameHit(path)).forEach((path) => chosen.add(path));
  }
}));
$("expand").addEventListener("click", () => { for (const row of every()) opened.add(row.key); draw(); });
$("collapse").addEventListener("click", () => { opened.clear(); draw(); });
$("bare").addEventListener("change", () => draw());
$("method").addEventListener("change", figures);
$("undo").addEventListener("click", undo);
$("clear").addEventListener("click", () => choose(() => chosen.clear()));
$("remove").addEventListener("click", () => choose(() => [...refused.keys()].forEach((path) => chosen.delete(path))));
$("usual").addEventListener("click", async () => {
  busy(true);
  try {
    const answer = await send("usual", { method: $("method").value });
    if (answer.error) throw new Error(answer.error);
    choose(() => { chosen.clear(); answer.paths.forEach((path) => chosen.add(path)); });
  } catch (error) {
    failed(error);
    busy(false);
  }
});
$("copy").addEventListener("click", async () => {
  let said = "Copied";
  try {
    await navigator.clipboard.writeText($("text").textContent);
  } catch { // no permission: select it, so that Ctrl-C copies
    getSelection().selectAllChildren($("text"));
    said = "Press Ctrl C";
  }
  $("copy").textContent = $("status").textContent = said;
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
});
$("done").addEventListener("click", () => finish("done", { paths: [...chosen] }));
$("cancel").addEventListener("click", () => finish("cancel", { cancel: true }));

async function start() {
  const data = await (await fetch("tree")).json();
  root = { ...data.root, key: "", parent: null };
  total = root.size;
  $("model").textContent = data.model;
  $("size").textContent = `${whole.format(total)} parameters`;
  document.title = `Pick modules of ${data.model} · funcdelta`;
  $("method").replaceChildren(...data.methods.map(({ value, label }) => new Option(label, value)));
  // Opened level by level while all of it can be seen at once.
  for (let rows = [...visible()]; ; rows = [...visible()]) {
    const closed = rows.filter((row) => !isOpen(row) && below(row).length);
    const more = closed.reduce((n, row) => n + below(row).length, 0);
    if (!closed.length || rows.length + more > 26) break;
    closed.forEach((row) => opened.add(row.key));
  }
  draw();
  changed();
}
start();
