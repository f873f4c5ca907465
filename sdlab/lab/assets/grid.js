// A heat map to click and to walk through: rows from the bottom up, columns from left to right.
function render({ model, el }) {
  const get = k => model.get(k)
  const root = node('div', 'sdlab-grid', el)
  const stage = node('div', 'sdlab-stage', root, { tabindex: '0', role: 'application', 'aria-roledescription': 'heat map' })
  const back = node('canvas', 'sdlab-back', stage, { 'aria-hidden': 'true' }), front = node('canvas', 'sdlab-front', stage, { 'aria-hidden': 'true' })
  const say = node('div', 'sdlab-say', root, { 'aria-live': 'polite', role: 'status' })
  let box = null, hover = null

  const value = (r, c) => { // a number; null: no cell; '': a cell without a number, if there is a word for that
    const row = get('values')[r], v = row ? row[c] : null
    return v === undefined || (v === '' && !get('blank')) ? null : v
  }
  const name = (k, i) => { const l = get(k); return l.length > i ? l[i] : String(i) }
  const there = at => at && at.length === 2 && value(at[0], at[1]) !== null
  const sentence = at => there(at) ? `${get('col_title')} ${name('cols', at[1])}, ${get('row_title')} ${name('rows', at[0])}: ${value(...at) === '' ? get('blank') : short(value(...at), get('digits'))}` : ''

  function range() {
    const all = get('values').flat().filter(v => v !== null && v !== '')
    const lo = get('vmin') ?? (all.length ? Math.min(...all) : 0), hi = get('vmax') ?? (all.length ? Math.max(...all) : 1)
    return [lo, hi > lo ? hi : lo + 1]
  }

  function layout() {
    const R = get('values').length, C = Math.max(0, ...get('values').map(r => r.length))
    const left = 46, right = 88, top = 8, bottom = 40, room = Math.max(200, (el.clientWidth || 520) - left - right)
    const cell = Math.max(4, Math.min(get('max_cell'), Math.floor(room / Math.max(C, 1)), Math.floor(520 / Math.max(R, 1))))
    box = { R, C, left, top, cell, w: left + C * cell + right, h: top + R * cell + bottom }
  }

  const x = c => box.left + c * box.cell, y = r => box.top + (box.R - 1 - r) * box.cell

  function hatch(g, x0, y0, w, h, color) {
    g.save(); g.beginPath(); g.rect(x0, y0, w, h); g.clip(); g.strokeStyle = color; g.lineWidth = 1; g.beginPath()
    for (let k = -h; k < w; k += 5) { g.moveTo(x0 + k, y0 + h); g.lineTo(x0 + k + h, y0) }
    g.stroke(); g.restore()
  }

  function drawBack() {
    layout()
    const pen = ink(el), { R, C, cell } = box, g = sharp(back, box.w, box.h), [lo, hi] = range(), colors = get('palette'), under = get('under')
    stage.style.width = `${box.w}px`; stage.style.height = `${box.h}px`
    stage.setAttribute('aria-label', `${get('label')}. ${R} rows (${get('row_title')}) by ${C} columns (${get('col_title')}). Arrow keys move, the value is said below.`)
    const color = v => v < lo && under ? under : colors[Math.max(0, Math.min(colors.length - 1, Math.floor((v - lo) / (hi - lo) * colors.length)))]
    for (let r = 0; r < R; r++) for (let c = 0; c < C; c++) {
      const v = value(r, c)
      if (v === null) continue
      g.fillStyle = v === '' ? pen.empty : color(v)
      g.fillRect(x(c), y(r), cell - (cell > 7), cell - (cell > 7))
      if (cell > 7) { g.strokeStyle = pen.line; g.lineWidth = .5; g.strokeRect(x(c) + .25, y(r) + .25, cell - 1.5, cell - 1.5) } // a dark cell on a dark page is still a cell
    }
    for (const r of get('hatched_rows')) hatch(g, x(0), y(r), C * cell, cell, pen.soft)
    for (const c of get('hatched_cols')) hatch(g, x(c), y(R - 1), cell, R * cell, pen.soft)
    g.fillStyle = pen.text; g.font = `11px ${pen.font}`
    const step = Math.ceil(22 / cell)
    g.textAlign = 'center'; g.textBaseline = 'top'
    for (let c = 0; c < C; c += step) g.fillText(name('cols', c), x(c) + cell / 2, y(0) + cell + 4)
    g.fillText(get('col_title'), box.left + C * cell / 2, y(0) + cell + 20)
    g.textAlign = 'right'; g.textBaseline = 'middle'
    for (let r = 0; r < R; r += step) g.fillText(name('rows', r), box.left - 5, y(r) + cell / 2)
    g.save(); g.translate(11, box.top + R * cell / 2); g.rotate(-Math.PI / 2); g.textAlign = 'center'; g.fillText(get('row_title'), 0, 0); g.restore()
    bar(g, pen, lo, hi, colors, under)
    drawFront()
  }

  function bar(g, pen, lo, hi, colors, under) {
    const x0 = box.left + box.C * box.cell + 12, h = box.R * box.cell, k = h / colors.length
    colors.forEach((c, i) => { g.fillStyle = c; g.fillRect(x0, box.top + h - (i + 1) * k, 10, k + 1) })
    if (under) { g.fillStyle = under; g.fillRect(x0, box.top + h + 2, 10, 6) }
    g.fillStyle = pen.text; g.textAlign = 'left'; g.textBaseline = 'middle'
    g.save(); g.translate(x0 + 62, box.top + h / 2); g.rotate(-Math.PI / 2); g.textAlign = 'center'; g.fillText(get('label'), 0, 0, h + 20); g.restore()
    for (const t of ticks(lo, hi, Math.max(2, h / 60))) g.fillText(short(t, 2), x0 + 14, Math.max(box.top + 5, box.top + h - (t - lo) / (hi - lo) * h))
  }

  function drawFront() {
    const g = sharp(front, box.w, box.h), pen = ink(el), { cell } = box
    g.lineWidth = 1.5
    for (const [r, c] of get('marks')) { g.beginPath(); g.arc(x(c) + cell / 2, y(r) + cell / 2, Math.max(2, cell / 4), 0, 7); g.strokeStyle = '#fff'; g.lineWidth = 3; g.stroke(); g.strokeStyle = '#0072b2'; g.lineWidth = 1.5; g.stroke() }
    const frame = (at, color, w) => { g.lineWidth = w + 2; g.strokeStyle = pen.page; g.strokeRect(x(at[1]) - 1, y(at[0]) - 1, cell + 1, cell + 1); g.lineWidth = w; g.strokeStyle = color; g.strokeRect(x(at[1]) - 1, y(at[0]) - 1, cell + 1, cell + 1) }
    if (hover) frame(hover, pen.soft, 1)
    const at = get('selected')
    if (there(at)) frame(at, '#e69f00', 3)
    say.textContent = sentence(hover || at) || ' '
  }

  function under(e) { // the cell under the pointer
    const p = front.getBoundingClientRect(), c = Math.floor((e.clientX - p.left - box.left) / box.cell), r = box.R - 1 - Math.floor((e.clientY - p.top - box.top) / box.cell)
    return there([r, c]) ? [r, c] : null
  }

  function select(at) {
    const was = get('selected')
    if (!there(at) || !get('active') || (was[0] === at[0] && was[1] === at[1])) return
    model.set('selected', at); model.save_changes(); drawFront()
  }

  const keys = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }
  function key(e) {
    const step = keys[e.key]
    if (!step || e.ctrlKey || e.metaKey || e.altKey) return
    e.preventDefault(); e.stopPropagation()
    let [r, c] = there(get('selected')) ? get('selected') : [0, -1]
    for (let i = 0; i < Math.max(box.R, box.C); i++) {
      r += step[0]; c += step[1]
      if (r < 0 || c < 0 || r >= box.R || c >= box.C) return
      if (there([r, c])) return select([r, c])
    }
  }

  let down = false
  const move = e => { const at = under(e); if (String(at) !== String(hover)) { hover = at; drawFront() } if (down && at) select(at) }
  stage.addEventListener('pointerdown', e => { down = true; stage.focus({ preventScroll: true }); const at = under(e); if (at) select(at) })
  stage.addEventListener('pointermove', move)
  stage.addEventListener('pointerleave', () => { down = false; hover = null; drawFront() })
  window.addEventListener('pointerup', up)
  function up() { down = false }
  stage.addEventListener('keydown', key)

  const again = soon(drawBack), light = soon(drawFront)
  for (const k of ['values', 'rows', 'cols', 'row_title', 'col_title', 'label', 'blank', 'vmin', 'vmax', 'palette', 'under', 'hatched_rows', 'hatched_cols']) model.on(`change:${k}`, again)
  for (const k of ['selected', 'marks']) model.on(`change:${k}`, light)
  const ends = [onTheme(again), onWidth(el, again), named(el)]
  drawBack()
  return () => { ends.forEach(f => f()); window.removeEventListener('pointerup', up) }
}
export default { render }
