// What grid.js and chart.js share; it is put in front of each of them.
const css = (el, name, fallback) => getComputedStyle(el).getPropertyValue(name).trim() || fallback

function ink(el) { // colours of the page, whatever its theme
  return {
    text: css(el, '--jp-ui-font-color1', '#222'), soft: css(el, '--jp-ui-font-color2', '#666'),
    line: css(el, '--jp-border-color1', '#bbb'), page: css(el, '--jp-layout-color0', '#fff'),
    empty: css(el, '--jp-layout-color2', '#eee'), focus: css(el, '--jp-brand-color1', '#1976d2'),
    font: css(el, '--jp-ui-font-family', 'system-ui, sans-serif'),
  }
}

function node(tag, cls, parent, attrs = {}) {
  const o = document.createElement(tag)
  o.className = cls
  for (const [k, v] of Object.entries(attrs)) o.setAttribute(k, v)
  parent.appendChild(o)
  return o
}

function sharp(canvas, w, h) { // a canvas of w x h CSS pixels at the resolution of the screen
  const k = window.devicePixelRatio || 1
  canvas.width = Math.round(w * k); canvas.height = Math.round(h * k)
  canvas.style.width = `${w}px`; canvas.style.height = `${h}px`
  const g = canvas.getContext('2d')
  g.setTransform(k, 0, 0, k, 0, 0)
  g.clearRect(0, 0, w, h)
  return g
}

function onTheme(redraw) { // JupyterLab and the system may change their theme at any time
  const seen = new MutationObserver(redraw)
  seen.observe(document.body, { attributes: true, attributeFilter: ['data-jp-theme-name', 'data-jp-theme-light', 'class', 'data-theme'] })
  const dark = window.matchMedia('(prefers-color-scheme: dark)')
  dark.addEventListener('change', redraw)
  return () => { seen.disconnect(); dark.removeEventListener('change', redraw) }
}

function onWidth(el, redraw) {
  let was = 0
  const seen = new ResizeObserver(() => { if (Math.abs(el.clientWidth - was) > 4) { was = el.clientWidth; redraw() } })
  seen.observe(el)
  return () => seen.disconnect()
}

function soon(f) { // at most once per frame
  let asked = 0
  return () => { if (!asked) asked = requestAnimationFrame(() => { asked = 0; f() }) }
}

const fixed = (v, step) => Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-4) ? v.toExponential(2) : v.toFixed(Math.max(0, Math.min(8, -Math.floor(Math.log10(step) + 1e-9)))) // as many digits as tell a tick from the next

const short = (v, digits = 3) => v === 0 ? '0' : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-4 ? v.toExponential(digits - 1) : String(Number(v.toPrecision(Math.max(digits, Math.ceil(Math.log10(Math.abs(v) + 1))))))

function ticks(lo, hi, n) { // round numbers from lo to hi, about n of them
  const raw = (hi - lo) / Math.max(1, n), mag = 10 ** Math.floor(Math.log10(raw))
  const step = [1, 2, 5, 10].map(k => k * mag).find(s => s >= raw) || raw
  const out = []
  for (let v = Math.ceil(lo / step - 1e-9) * step; v <= hi + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v)
  return out
}

function named(el) { // ipywidgets gives sliders, players and rows of toggles no name for screen readers: they get the one that stands beside them
  const words = { play: 'Play', pause: 'Pause', stop: 'Stop', retweet: 'Repeat' }
  const label = o => o.querySelector(':scope > .widget-label')?.textContent || ''
  const put = (o, k, v) => { if (v && o.getAttribute(k) !== v) o.setAttribute(k, v) }
  let top = null, asked = 0
  const name = () => {
    for (const o of top.querySelectorAll('.widget-slider')) o.querySelectorAll('.noUi-handle').forEach(h => put(h, 'aria-label', label(o)))
    for (const o of top.querySelectorAll('.widget-play button')) put(o, 'aria-label', words[(o.querySelector('i')?.className.match(/fa-(\w+)/) || [])[1]] || o.title)
    for (const o of top.querySelectorAll('.widget-toggle-buttons')) { put(o, 'role', 'group'); put(o, 'aria-label', label(o)); o.querySelectorAll('button').forEach(b => put(b, 'aria-pressed', String(b.classList.contains('mod-active')))) }
  }
  const later = soon(name), seen = new MutationObserver(later)
  const begin = () => { // it is put on the page only after it was rendered
    if (!el.isConnected) { asked = requestAnimationFrame(begin); return }
    top = el.closest('.jp-OutputArea-output') || document.body
    seen.observe(top, { childList: true, subtree: true, attributes: true, attributeFilter: ['class'] })
    later()
  }
  begin()
  return () => { cancelAnimationFrame(asked); seen.disconnect() }
}
