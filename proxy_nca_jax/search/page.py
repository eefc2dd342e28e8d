"""The page of the search server: HTML, style and script."""

HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Image search</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/page.css">
<script src="/page.js" defer></script>
</head>
<body>
<main>
<h1>Image search</h1>
<p id="about"></p>
<form>
<label id="drop">Drop an image here, paste one, or choose a file:
<input type="file" accept="image/*" id="file"></label>
<label>Folder <select id="folder"><option value="">all</option></select></label>
<label>Largest distance <output id="limit">2.00</output>
<input type="range" id="distance" min="0" max="2" step="0.01" value="2"></label>
</form>
<p id="status" role="status"></p>
<div id="query" hidden>
<h2>Query</h2>
<img id="shown" alt="the query image">
</div>
<h2 id="title" hidden>Nearest images</h2>
<ol id="results"></ol>
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto;
  padding: 0 1rem; max-width: 80rem; }
form { display: flex; flex-wrap: wrap; gap: 1rem; align-items: end; }
#drop { flex: 1 1 22rem; border: 2px dashed; border-radius: 8px;
  padding: 1.5rem 1rem; }
#drop.over { background: color-mix(in srgb, currentColor 12%, transparent); }
label { display: block; } input[type=range], select { display: block; }
select { max-width: 16rem; }
#shown { max-width: 16rem; max-height: 16rem; border-radius: 4px; }
#results { display: grid; gap: 1rem; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
#results img { width: 100%; aspect-ratio: 1; object-fit: contain;
  border-radius: 4px; }
#results button { all: unset; cursor: pointer; display: block; width: 100%; }
#results button:focus-visible { outline: 2px solid; }
.name { font-size: .8rem; overflow-wrap: anywhere; }
.error { color: #c62828; }
"""

SCRIPT = """
const get = (id) => document.getElementById(id);
let neighbors = [], latest = 0;

function show() {
  const limit = Number(get('distance').value);
  get('limit').value = limit.toFixed(2);
  const shown = neighbors.filter((row) => row.distance <= limit);
  get('results').replaceChildren(...shown.map((row) => {
    const item = document.createElement('li');
    const button = document.createElement('button');
    button.title = 'Search with this image';
    const image = document.createElement('img');
    image.src = row.image;
    image.alt = `${row.folder}, distance ${row.distance.toFixed(3)}`;
    image.loading = 'lazy';
    button.append(image, `${row.folder || 'no folder'} `,
      Object.assign(document.createElement('strong'),
        {textContent: row.distance.toFixed(3)}));
    button.addEventListener('click', () => searchSimilar(row));
    const link = document.createElement('a');
    link.className = 'name';
    link.href = `${row.image}&side=2048`;
    link.target = '_blank';
    link.textContent = row.name;
    item.append(button, link);
    return item;
  }));
  get('title').hidden = !neighbors.length;
  if (neighbors.length)
    get('status').textContent = `${shown.length} of ${neighbors.length} ` +
      'nearest images; the distance is from 0 (equal) to 2.';
}

// Searches again with the same image when the folder changes.
let again = () => {};

async function search(request, source) {
  const number = ++latest;
  get('status').className = '';
  get('status').textContent = 'Searching\\u2026';
  get('query').hidden = false;
  get('shown').src = source;
  const folder = get('folder').value;
  const suffix = folder ? `&folder=${encodeURIComponent(folder)}` : '';
  let answer;
  try {
    const response = await request(suffix);
    answer = await response.json();
  } catch (error) {
    answer = {error: `The server does not answer: ${error.message}`};
  }
  // The answer to an earlier search must not replace a later one.
  if (number !== latest) return;
  neighbors = answer.error ? [] : answer;
  show();
  if (answer.error) {
    get('status').className = 'error';
    get('status').textContent = answer.error;
  } else if (!neighbors.length) {
    get('status').textContent = 'No image was found.';
  }
}

function searchFile(file) {
  if (!file) return;
  const source = URL.createObjectURL(file);
  again = () => search((suffix) => fetch(`/api/search?k=60${suffix}`,
    {method: 'POST', body: file}), source);
  again();
}

function searchSimilar(row) {
  const name = encodeURIComponent(row.name);
  again = () => search((suffix) =>
    fetch(`/api/similar?k=60&name=${name}${suffix}`), row.image);
  again();
  scrollTo(0, 0);
}

get('file').addEventListener('change', (event) =>
  searchFile(event.target.files[0]));
get('distance').addEventListener('input', show);
get('folder').addEventListener('change', () => again());
document.querySelector('form').addEventListener('submit', (event) =>
  event.preventDefault());
document.addEventListener('paste', (event) =>
  searchFile(event.clipboardData.files[0]));
for (const kind of ['dragover', 'dragleave', 'drop'])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    get('drop').classList.toggle('over', kind === 'dragover');
    if (kind === 'drop') searchFile(event.dataTransfer.files[0]);
  });

fetch('/api/index').then((response) => response.json()).then((index) => {
  get('about').textContent =
    `${index.images.toLocaleString()} images of ${index.root}`;
  for (const folder of index.folders) {
    const option = document.createElement('option');
    option.value = option.textContent = folder;
    get('folder').append(option);
  }
});
"""
