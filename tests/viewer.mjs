// Opens series of a study in OHIF as a user does, with a double click on its entry in the list.
// node viewer.mjs '{"playwright", "chromium", "page", "folder", "looks": [{"name", "series",
// "words", "coloured"}]}': each look on a page of its own, until its words are on the image and so
// many pixels of it are coloured, or until it was loaded TIMES times. Prints as JSON what was seen,
// and writes a picture, NAME.png.
import { createRequire } from "node:module";
import { join } from "node:path";

const WAIT_MS = 20_000;
const TIMES = 4; // OHIF sometimes draws an image before its annotations are there; a user reloads.
const ENTRY = "[data-cy^=study-browser-thumbnail]";
const task = JSON.parse(process.argv[2]);
const playwright = createRequire(import.meta.url)(task.playwright);

const browser = await playwright.chromium.launch({
  executablePath: task.chromium,
  args: [
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
  ],
});
try {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 } });
  const elsewhere = [];
  context.on("request", (request) => {
    const { protocol, origin } = new URL(request.url());
    const own = protocol === "data:" || origin === new URL(task.page).origin; // blob: has an origin
    if (!own) elsewhere.push(request.url());
  });
  const looks = {};
  for (const look of task.looks) looks[look.name] = await open(context, look);
  console.log(JSON.stringify({ elsewhere, looks }));
} finally {
  await browser.close();
}

async function open(context, { name, series, coloured, words }) {
  const page = await context.newPage();
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  const there = (seen) =>
    seen.bright && seen.coloured >= coloured && words.every((word) => seen.labels.includes(word));
  let seen;
  for (let time = 0; time < TIMES; time += 1) {
    await page.goto(task.page);
    seen = await openOnce(page, series, there, errors);
    if (there(seen)) break;
  }
  await page.screenshot({ path: join(task.folder, `${name}.png`) });
  await page.close();
  return { ...seen, errors };
}

async function openOnce(page, series, there, errors) {
  const end = Date.now() + WAIT_MS;
  const entry = page.locator(ENTRY).filter({ hasText: series }).first();
  try {
    await entry.waitFor({ timeout: WAIT_MS });
    await page.waitForFunction(drawn, null, { timeout: WAIT_MS });
    await entry.dblclick();
  } catch (error) {
    errors.push(String(error)); // What there is says more: the assertions are in Python.
  }
  let seen;
  do {
    await page.waitForTimeout(200);
    seen = await page.evaluate(look, ENTRY);
  } while (Date.now() < end && !there(seen));
  return seen;
}

// In the page: whether an image is on the canvas.
function drawn() {
  const canvas = document.querySelector("canvas.cornerstone-canvas");
  if (!canvas?.width || !canvas.height) return false;
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.some((value, index) => index % 4 < 3 && value > 60);
}

// In the page: its text, the entries of the list, and of the canvas, where there is one, its pixels
// and those annotations that lie within it.
function look(entry) {
  const seen = {
    text: document.body.innerText,
    series: [...document.querySelectorAll(entry)].map((item) => item.innerText),
    labels: "",
    pixels: 0,
    bright: 0,
    coloured: 0,
  };
  const canvas = document.querySelector("canvas.cornerstone-canvas");
  if (!canvas?.width || !canvas.height) return seen;
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  seen.pixels = data.length / 4;
  const inside = canvas.getBoundingClientRect();
  for (const label of document.querySelectorAll("svg.svg-layer text")) {
    const place = label.getBoundingClientRect();
    const across = place.left >= inside.left && place.right <= inside.right;
    const down = place.top >= inside.top && place.bottom <= inside.bottom;
    if (across && down) seen.labels += `${label.textContent}\n`;
  }
  for (let i = 0; i < data.length; i += 4) {
    const [red, green, blue] = [data[i], data[i + 1], data[i + 2]];
    seen.bright += Math.max(red, green, blue) > 60;
    seen.coloured += Math.max(red, green, blue) - Math.min(red, green, blue) > 40;
  }
  return seen;
}
