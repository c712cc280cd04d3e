// The values of a chart under the pointer or the keyboard focus.

// As many digits as in the page's text.
function formatNumber(x) {
  const size = Math.abs(x);
  if (size < 1e-7) return '0';
  const text = size < 1e-3 || size >= 1e7 ? x.toExponential(2) :
    x.toLocaleString('en', digits(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 3));
  return text.replace('-', '\u2212');
}
const digits = (n) => ({ minimumFractionDigits: n, maximumFractionDigits: n });
const shortNumber = (x) => x.toLocaleString('en', { maximumFractionDigits: 3 });

// The index of the point of a series that is nearest to x.
function nearest(xs, x) {
  let best = -1;
  xs.forEach((value, i) => { if (best < 0 || Math.abs(value - x) < Math.abs(xs[best] - x)) best = i; });
  return best;
}

class Chart {
  constructor(plot, data) {
    this.plot = plot;
    this.data = data;
    // The keyboard goes over the points of the longest series.
    this.xs = data.series.reduce((xs, s) => (s[2].length > xs.length ? s[2] : xs), []);
    this.index = this.xs.length - 1;
    if (this.index < 0) return;
    this.cursor = make('div', 'cursor');
    this.cursor.hidden = true;
    plot.append(this.cursor);
    plot.tabIndex = 0;
    for (const name of ['pointermove', 'pointerdown']) plot.addEventListener(name, (event) => this.point(event));
    // A finger that is lifted leaves too: its values stay until another place is tapped.
    plot.addEventListener('pointerleave', (event) => { if (event.pointerType === 'mouse') hideTip(); });
    plot.addEventListener('blur', hideTip);
    plot.addEventListener('focus', () => { if (plot.matches(':focus-visible')) this.show(this.index); });
    plot.addEventListener('keydown', (event) => this.key(event));
  }

  point(event) {
    const area = this.plot.getBoundingClientRect();
    const { box, range } = this.data;
    const share = ((event.clientX - area.left) / area.width - box[0]) / (box[1] - box[0]);
    this.show(nearest(this.xs, range[0] + share * (range[1] - range[0])));
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === 'Escape') hideTip();
    if (move === undefined) return;
    event.preventDefault();
    this.show(Math.max(0, Math.min(this.xs.length - 1, this.index + move)));
  }

  show(index) {
    this.index = index;
    const { box, range, series, x: name } = this.data;
    const x = this.xs[index];
    hideTip();
    this.cursor.style.left = `${100 * (box[0] + ((x - range[0]) / (range[1] - range[0])) * (box[1] - box[0]))}%`;
    this.cursor.hidden = false;
    const list = make('dl');
    for (const [label, unit, xs, ys] of series) {
      const at = nearest(xs, x);
      if (at < 0 || ys[at] === null) continue;
      const where = xs[at] === x ? '' : ` (${name} ${shortNumber(xs[at])})`;
      list.append(make('dt', '', label + where), make('dd', '', formatNumber(ys[at]) + (unit && ` ${unit}`)));
    }
    const tip = $('tip');
    tip.replaceChildren(make('div', 'what', `${name} ${shortNumber(x)}`), list);
    if (this.plot.dataset.about) tip.append(make('p', 'note', this.plot.dataset.about));
    tip.hidden = false;
    const at = this.cursor.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const right = at.left + 12 + size.width + 8 < innerWidth;
    tip.style.left = `${Math.max(8, right ? at.left + 12 : at.left - size.width - 12)}px`;
    tip.style.top = `${Math.max(4, at.top - 4)}px`;
  }
}

function listenToCharts(points) {
  addEventListener('scroll', hideTip, { passive: true });
  for (const plot of document.querySelectorAll('.plot')) new Chart(plot, points[plot.dataset.chart]);
}
