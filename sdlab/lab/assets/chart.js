// Lines, points and bars on two axes; hover tells a value, click and arrow keys choose a point, points move smoothly.
function render({ model, el }) {
  const get = k => model.get(k)
  const root = node('div', 'sdlab-chart', el)
  const stage = node('div', 'sdlab-stage', root, { tabindex: '0', role: 'application', 'aria-roledescription': 'chart' })
  const canvas = node('canvas', 'sdlab-back', stage, { 'aria-hidden': 'true' })
  const legend = node('div', 'sdlab-legend', root), say = node('div', 'sdlab-say', root, { 'aria-live': 'polite', role: 'status' })
  const spare = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9']
  let box = null, shown = [], hover = null, motion = 0

  const color = (s, i, pen) => s.color === 'text' || s.color === '#1b1b1b' ? pen.text : s.color || spare[i % spare.length]
  const real = v => v !== null && Number.isFinite(v)

  function step(s) { const xs = s.x.filter(real); return xs.length > 1 ? Math.min(...xs.slice(1).map((v, k) => v - xs[k])) : 1 } // width of a bar

  function span(key, given) {
    if (given.length === 2) return given
    const all = shown.flatMap(s => s[key].filter(real))
    if (key === 'y' && shown.some(s => s.kind === 'bars')) all.push(0)
    if (!all.length) return [0, 1]
    const lo = all.reduce((a, b) => Math.min(a, b)), hi = all.reduce((a, b) => Math.max(a, b)), wide = shown.some(s => s.kind === 'bars') && key === 'x'
    const pad = Math.max((hi - lo || Math.abs(hi) || 1) * .05, wide ? Math.max(...shown.filter(s => s.kind === 'bars').map(step)) / 2 : 0)
    return [lo - (key === 'y' && lo === 0 ? 0 : pad), hi + pad]
  }

  function layout() {
    const w = Math.max(220, Math.min(get('width'), el.clientWidth || get('width'))), h = get('height')
    const [x0, x1] = span('x', get('xlim')), [y0, y1] = span('y', get('ylim'))
    const right = 12, top = 8, bottom = 38, marks = ticks(y0, y1, (h - bottom - top) / 40), g = canvas.getContext('2d')
    g.font = `11px ${ink(el).font}`
    const left = 30 + Math.max(20, ...marks.map(t => g.measureText(fixed(t, marks[1] - marks[0] || 1)).width)) // room for the longest number
    box = { w, h, left, top, right: w - right, bottom: h - bottom, x0, x1, y0, y1,
      X: v => left + (v - x0) / (x1 - x0) * (w - left - right), Y: v => h - bottom - (v - y0) / (y1 - y0) * (h - top - bottom) }
  }

  function mark(g, i, x, y, r) { // another shape for every series, so that colour is not all
    g.beginPath()
    if (i % 4 === 0) g.arc(x, y, r, 0, 7)
    else if (i % 4 === 1) g.rect(x - r, y - r, 2 * r, 2 * r)
    else if (i % 4 === 2) { g.moveTo(x, y - 1.3 * r); g.lineTo(x + 1.2 * r, y + r); g.lineTo(x - 1.2 * r, y + r); g.closePath() }
    else { g.moveTo(x, y - 1.4 * r); g.lineTo(x + 1.4 * r, y); g.lineTo(x, y + 1.4 * r); g.lineTo(x - 1.4 * r, y); g.closePath() }
    g.fill()
  }

  function axes(g, pen) {
    g.strokeStyle = pen.line; g.lineWidth = 1; g.fillStyle = pen.text; g.font = `11px ${pen.font}`
    g.strokeRect(box.left + .5, box.top + .5, box.right - box.left, box.bottom - box.top)
    g.textAlign = 'center'; g.textBaseline = 'top'
    const xt = ticks(box.x0, box.x1, (box.right - box.left) / 70), yt = ticks(box.y0, box.y1, (box.bottom - box.top) / 40)
    for (const t of xt) { g.fillText(fixed(t, xt[1] - xt[0] || 1), box.X(t), box.bottom + 5); g.beginPath(); g.moveTo(box.X(t), box.bottom); g.lineTo(box.X(t), box.bottom + 3); g.stroke() }
    g.fillText(get('xlabel'), (box.left + box.right) / 2, box.bottom + 21)
    g.textAlign = 'right'; g.textBaseline = 'middle'
    for (const t of yt) { g.fillText(fixed(t, yt[1] - yt[0] || 1), box.left - 6, box.Y(t)); g.beginPath(); g.moveTo(box.left - 3, box.Y(t)); g.lineTo(box.left, box.Y(t)); g.stroke() }
    g.save(); g.translate(10, (box.top + box.bottom) / 2); g.rotate(-Math.PI / 2); g.textAlign = 'center'; g.fillText(get('ylabel'), 0, 0); g.restore()
  }

  function series(g, s, i, pen) {
    g.save(); g.beginPath(); g.rect(box.left - 4, box.top - 4, box.right - box.left + 8, box.bottom - box.top + 8); g.clip()
    g.fillStyle = g.strokeStyle = color(s, i, pen); g.lineWidth = 1.8; g.setLineDash(s.dash ? [5, 4] : [])
    if (s.kind === 'bars') {
      const dx = step(s)
      g.globalAlpha = .45
      s.x.forEach((v, k) => { if (real(v) && real(s.y[k])) { const a = box.X(v - dx / 2), b = box.X(v + dx / 2); g.fillRect(a + .5, box.Y(s.y[k]), b - a - 1, box.Y(Math.max(0, box.y0)) - box.Y(s.y[k])); g.strokeRect(a + .5, box.Y(s.y[k]), b - a - 1, box.Y(Math.max(0, box.y0)) - box.Y(s.y[k])) } })
    } else if (s.kind === 'points') s.x.forEach((v, k) => { if (real(v) && real(s.y[k])) mark(g, i, box.X(v), box.Y(s.y[k]), s.size || 4) })
    else {
      g.beginPath(); let pen_down = false
      s.x.forEach((v, k) => { if (!real(v) || !real(s.y[k])) { pen_down = false; return } g[pen_down ? 'lineTo' : 'moveTo'](box.X(v), box.Y(s.y[k])); pen_down = true })
      g.stroke(); g.setLineDash([])
      if (s.x.length <= 40) s.x.forEach((v, k) => { if (real(v) && real(s.y[k])) mark(g, i, box.X(v), box.Y(s.y[k]), 2.5) })
    }
    g.restore()
  }

  function ring(g, at, col, r) { const s = shown[at[0]]; if (!s || !real(s.x[at[1]]) || !real(s.y[at[1]])) return; g.strokeStyle = col; g.lineWidth = 2.5; g.beginPath(); g.arc(box.X(s.x[at[1]]), box.Y(s.y[at[1]]), r, 0, 7); g.stroke() }

  function draw() {
    layout()
    const pen = ink(el), g = sharp(canvas, box.w, box.h)
    stage.style.width = `${box.w}px`
    axes(g, pen)
    shown.forEach((s, i) => series(g, s, i, pen))
    if (hover) ring(g, hover, pen.soft, 7)
    if (get('selected').length === 2) ring(g, get('selected'), '#e69f00', 8)
    say.textContent = sentence(hover || get('selected')) || ' '
  }

  function sentence(at) {
    const s = at && at.length === 2 ? get('series')[at[0]] : null
    if (!s || at[1] >= s.x.length || !real(s.y[at[1]])) return ''
    const own = s.labels && s.labels[at[1]]
    return own ? `${s.name ? s.name + ': ' : ''}${own}` : `${s.name ? s.name + ', ' : ''}${get('xlabel')} ${short(s.x[at[1]])}: ${get('ylabel')} ${short(s.y[at[1]])}`
  }

  function names() {
    legend.replaceChildren()
    if (get('legend')) get('series').forEach((s, i) => {
      if (!s.name) return
      const o = node('span', 'sdlab-key', legend), dot = node('span', 'sdlab-dot', o, { 'aria-hidden': 'true' })
      dot.textContent = '●■▲◆'[i % 4]; dot.style.color = color(s, i, ink(el)); node('span', '', o).textContent = s.name
    })
    stage.setAttribute('aria-label', `${get('label') || get('ylabel')}: ${get('series').map(s => s.name).filter(Boolean).join(', ')}. Arrow keys move from point to point.`)
  }

  function update() { // points glide to their new places if they are the same points
    const next = get('series').map(s => ({ ...s, x: [...s.x], y: [...s.y] })), was = shown
    const same = was.length === next.length && next.some(s => s.kind === 'points') && next.every((s, i) => s.kind === was[i].kind && s.x.length === was[i].x.length)
    names(); cancelAnimationFrame(motion)
    if (!same || window.matchMedia('(prefers-reduced-motion: reduce)').matches) { shown = next; return draw() }
    const start = performance.now(), mix = (a, b, t) => real(a) && real(b) ? a + (b - a) * t : b
    const frame = now => {
      const t = Math.min(1, (now - start) / get('glide')), e = t * t * (3 - 2 * t)
      shown = next.map((s, i) => s.kind === 'points' ? { ...s, x: s.x.map((v, k) => mix(was[i].x[k], v, e)), y: s.y.map((v, k) => mix(was[i].y[k], v, e)) } : s)
      draw(); if (t < 1) motion = requestAnimationFrame(frame)
    }
    motion = requestAnimationFrame(frame)
  }

  function near(e) {
    const p = canvas.getBoundingClientRect(), px = e.clientX - p.left, py = e.clientY - p.top
    let best = null, d2 = 24 ** 2
    shown.forEach((s, i) => s.x.forEach((v, k) => { if (!real(v) || !real(s.y[k])) return; const d = (box.X(v) - px) ** 2 + (box.Y(s.y[k]) - py) ** 2; if (d < d2) { d2 = d; best = [i, k] } }))
    return best
  }

  function select(at) { if (at && get('active') && String(at) !== String(get('selected'))) { model.set('selected', at); model.save_changes(); draw() } }

  function key(e) {
    const go = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key], all = get('series')
    if (!go || !all.length || e.ctrlKey || e.metaKey || e.altKey) return
    e.preventDefault(); e.stopPropagation()
    const at = get('selected'), i = at.length === 2 ? Math.max(0, Math.min(all.length - 1, at[0] + go[0])) : 0
    select([i, Math.max(0, Math.min(all[i].x.length - 1, at.length === 2 ? at[1] + go[1] : 0))])
  }

  stage.addEventListener('pointermove', e => { const at = near(e); if (String(at) !== String(hover)) { hover = at; draw() } })
  stage.addEventListener('pointerleave', () => { hover = null; draw() })
  stage.addEventListener('pointerdown', e => { stage.focus({ preventScroll: true }); select(near(e)) })
  stage.addEventListener('keydown', key)
  const again = soon(draw), fresh = soon(update)
  model.on('change:series', fresh)
  for (const k of ['xlabel', 'ylabel', 'xlim', 'ylim', 'selected', 'width', 'height']) model.on(`change:${k}`, again)
  for (const k of ['legend', 'label']) model.on(`change:${k}`, names)
  const ends = [onTheme(() => { names(); again() }), onWidth(el, again), named(el)]
  update()
  return () => { ends.forEach(f => f()); cancelAnimationFrame(motion) }
}
export default { render }
