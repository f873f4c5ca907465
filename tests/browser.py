"""A real browser on what a user sees: Debian's Chromium, driven by playwright, on JupyterLab or voila; nothing gets out of this machine.

    with House() as house, Chrome() as chrome:
        screen = chrome.lab(house.lab(), house.copy('nbs/tutorials/choose_a_cut.ipynb'))
        screen.run_all()
        screen.page.get_by_label('blocks to drop').press('ArrowRight')
        screen.kernel.ask('pk.plan.drop'), screen.outside, screen.errors, house.outside()

A house is a temporary folder with the settings, the runtime files and *copies* of notebooks: the checkout is never written to.
Every process that it starts carries its mark and is ended with it, whatever happens. Times are waits for something, never sleeps."""
import ast, atexit, json, os, re, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SENTINEL = 'every cell has run'
SLOW = float(os.environ.get('SDLAB_BROWSER_PATIENCE', 1)) # Times every wait is stretched by, on a busy machine
SIZE = dict(width=1440, height=1000)
_names, _mark = ('chromium', 'chromium-browser', 'google-chrome'), 'SDLAB_HOUSE'
_flags = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage --force-color-profile=srgb'.split()
_alone = '--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1'

class Missing(Exception):
    "There is no browser here, and why"

def wait_for(f, seconds=60, what='', every=.05): # Whatever `f` gives, once it is true
    "Ask `f` again and again until it gives something"
    end = time.monotonic()+seconds*SLOW
    while not (got := f()):
        if time.monotonic()>end: raise TimeoutError(f'waited {seconds*SLOW:.0f} s for {what or f}')
        time.sleep(every)
    return got

# -- the browser itself

def _apt(*args, seconds):
    p = subprocess.Popen(['apt-get', '-qq', *args], env={**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: out, _ = p.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGTERM)
        p.communicate()
        raise Missing(f"Chromium is not installed, and `apt-get {' '.join(args)}` did not end within {seconds} s")
    if p.returncode: raise Missing(f"Chromium is not installed, and `apt-get {' '.join(args)}` failed: {(out.strip().splitlines() or ['no message'])[-1]}")

def _install():
    "Chromium from Debian's archive: only what is fetched is timed out, so that no package is left half unpacked"
    if not shutil.which('apt-get'): raise Missing('Chromium is not installed, and there is no apt-get to install it with')
    if os.geteuid(): raise Missing('Chromium is not installed, and only root may install it: `sudo apt-get install chromium`')
    _apt('update', seconds=90)
    _apt('install', '-y', '--no-install-recommends', '--download-only', 'chromium', seconds=300)
    _apt('install', '-y', '--no-install-recommends', 'chromium', seconds=900)

def chromium(install=True): # Path of the program
    "Where Chromium is; installs it where that is possible, else raises `Missing` with the reason"
    try: import playwright.sync_api
    except ImportError: raise Missing('playwright is not installed: `pip install playwright` (its own browsers are not needed)')
    found = lambda: next(filter(None, map(shutil.which, _names)), None)
    if not found():
        if not install: raise Missing('Chromium is not installed')
        _install()
    if not (p := found()): raise Missing('Chromium was installed and cannot be found')
    return p

# -- a place of its own for servers and kernels

_guard = '''
import os, sys, threading, time
def _watch(event, args, _local=('127.', '::1', 'localhost', '0.0.0.0')):
    if event not in ('socket.connect', 'socket.getaddrinfo'): return
    host = args[1] if event=='socket.connect' else args[0]
    host = host[0] if isinstance(host, tuple) else host
    if host is None or isinstance(host, bytes) and host[:4]==b'127.' or isinstance(host, str) and (host.startswith(_local) or not host or host[0]=='/'): return
    if isinstance(host, str) and host==__import__('socket').gethostname(): return
    with open(os.environ['SDLAB_HOUSE']+'/outside', 'a') as f: f.write(f'{os.path.basename(sys.argv[0])} {host}\\n')
    raise OSError(f'nothing leaves this machine: {host}')
sys.addaudithook(_watch)
def _follow(parent=os.environ.get('SDLAB_HOUSE_PARENT')):
    while os.path.exists(f'/proc/{parent}'): time.sleep(1)
    os.kill(os.getpid(), 9)
if os.path.isdir('/proc/self'): threading.Thread(target=_follow, daemon=True, name='follow').start()
'''

def _settings(home, dark):
    "No news, no pop-ups; a theme"
    def put(name, **kw):
        p = home/'config'/'lab'/'user-settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(json.dumps(kw))
    put('apputils-extension/notification', fetchNews='false', checkForUpdates=False)
    put('apputils-extension/themes', theme='JupyterLab Dark' if dark else 'JupyterLab Light')
    put('docmanager-extension/plugin', autosave=False)

class House:
    "A folder for servers, kernels and copies of notebooks; leaving it ends everything that was started in it"
    def __init__(self, dark=False):
        self.home, self.patience = Path(tempfile.mkdtemp(prefix='sdlab-house-')).resolve(), 8
        self.work, self.servers = self.home/'work'/'nbs'/'tutorials', []
        for d in ('config', 'data', 'runtime', 'ipython', 'tmp', 'python', 'workspaces', 'work/images'): (self.home/d).mkdir(parents=True)
        self.work.mkdir(parents=True)
        (self.home/'python'/'sitecustomize.py').write_text(_guard)
        _settings(self.home, dark)
        atexit.register(self.close)

    @property
    def env(self):
        h = {k: str(self.home/v) for k,v in dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime', JUPYTERLAB_WORKSPACES_DIR='workspaces',
             JUPYTERLAB_SETTINGS_DIR='config/lab/user-settings', IPYTHONDIR='ipython', TMPDIR='tmp').items()}
        path = os.pathsep.join(filter(None, [str(self.home/'python'), str(ROOT), os.environ.get('PYTHONPATH')]))
        return {**os.environ, **h, _mark: str(self.home), _mark+'_PARENT': str(os.getpid()), 'PYTHONPATH': path, 'JUPYTER_PLATFORM_DIRS': '0', 'PYTHONDONTWRITEBYTECODE': '1',
                'HF_HUB_OFFLINE': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', 'TOKENIZERS_PARALLELISM': 'false', 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1'), 'MPLBACKEND': 'module://matplotlib_inline.backend_inline'}

    def copy(self, nb, name=None, leave='', swap={}): # Path of the copy
        "A notebook to run: a path in the checkout, or a list of sources of code cells; without outputs, cells marked slow and lines that match `leave`, with words swapped by `swap`, and with a last line that says that all have run"
        if isinstance(nb, list): cells, name = [dict(cell_type='code', source=s) for s in nb], name or 'made.ipynb'
        else:
            p = ROOT/nb
            cells, name = json.loads(p.read_text(encoding='utf-8'))['cells'], name or p.name
        cells = [c for c in cells if not re.match(r'#\|\s*(slow|gpu)\b', ''.join(c['source']))]
        if leave: cells = [{**c, 'source': '\n'.join(l for l in ''.join(c['source']).split('\n') if c['cell_type']!='code' or not re.search(leave, l))} for c in cells]
        for a,b in swap.items():
            assert any(a in ''.join(c['source']) for c in cells), f'{a} is not in {name}'
            cells = [{**c, 'source': ''.join(c['source']).replace(a, b)} for c in cells]
        cells.append(dict(cell_type='code', source=f"print('every cell', {SENTINEL.split(' ', 2)[2]!r})"))
        clean = lambda i, c: dict(cell_type=c['cell_type'], id=f'c{i:03d}', metadata={}, source=c['source'], **(dict(execution_count=None, outputs=[]) if c['cell_type']=='code' else {}))
        kernel = dict(display_name='python3', language='python', name='python3')
        (to := self.work/name).write_text(json.dumps(dict(cells=[clean(i, c) for i,c in enumerate(cells)], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)), encoding='utf-8')
        return to

    def start(self, *cmd, log, env={}): # (process, log file)
        "A process of this house, in a group of its own"
        f = self.home/log
        with open(f, 'ab') as out: p = subprocess.Popen([str(c) for c in cmd], cwd=self.work, env={**self.env, **env}, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        self.servers.append(p)
        return p, f

    def lab(self): # Server
        "JupyterLab on a free port, with a token"
        return Server(self, 'lab', [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', '--ServerApp.port={port}', '--ServerApp.port_retries=0', f'--ServerApp.root_dir={self.work}',
            '--IdentityProvider.token={token}', '--LabApp.expose_app_in_browser=True', '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.extension_manager=readonly',
            '--ServerApp.terminals_enabled=False', '--ServerApp.log_level=WARN'])

    def workflow(self, **settings): # Server
        "The page of `sdlab lab`, served as that command serves it"
        from sdlab.lab.workflow import lab_command
        command, env, _ = lab_command(0, token='{token}', **settings)
        mine = {k:v for k,v in env.items() if os.environ.get(k)!=v}
        return Server(self, 'voila', [c.replace('--port=0', '--port={port}') for c in command], mine)

    def outside(self): # Lines 'program host'
        "What servers and kernels tried to reach, each attempt refused"
        p = self.home/'outside'
        return p.read_text().splitlines() if p.exists() else []

    def pids(self): # Ids of the processes that carry this house's mark
        "Every process of this house that is alive, however it came to be"
        mark, out = f'{_mark}={self.home}'.encode(), []
        for p in Path('/proc').glob('[0-9]*'):
            try:
                if mark in (p/'environ').read_bytes() and (p/'stat').read_text().rsplit(')', 1)[1].split()[0]!='Z': out.append(int(p.name))
            except OSError: pass                        # it has ended meanwhile, or is somebody else's
        return [i for i in out if i!=os.getpid()]

    def close(self):
        "End all, politely first; may be called twice"
        atexit.unregister(self.close)
        for p in self.servers:
            if p.poll() is None: os.killpg(p.pid, signal.SIGTERM)
        try: wait_for(lambda: not self.pids(), self.patience)
        except TimeoutError: pass                       # what did not go is ended below
        for i in self.pids():
            try: os.kill(i, signal.SIGKILL)
            except ProcessLookupError: pass
        for p in self.servers: p.wait()
        shutil.rmtree(self.home, ignore_errors=True)
    def __enter__(self): return self
    def __exit__(self, *_): self.close()

class Server:
    "JupyterLab or voila, answering at `url`"
    def __init__(self, house, kind, cmd, env={}, seconds=90):
        self.house, self.kind, self.token = house, kind, os.urandom(12).hex()
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        self.url = f'http://127.0.0.1:{port}/'
        put = lambda o: str(o).replace('{port}', str(port)).replace('{token}', self.token)
        self.process, self.log = house.start(*map(put, cmd), env={k:put(v) for k,v in env.items()}, log=f'{kind}-{port}.log')
        wait_for(lambda: self._answers(port), seconds, f'{kind} to answer')

    def _answers(self, port):
        if self.process.poll() is not None: raise RuntimeError(f'{self.kind} ended:\n{self.log.read_text(errors="replace")[-3000:]}')
        with socket.socket() as s: return s.connect_ex(('127.0.0.1', port))==0

    def get(self, path, method='GET', data=None): # What the server's REST interface says
        "Ask the server"
        q = urllib.request.Request(self.url+path, method=method, headers=dict(Authorization=f'token {self.token}'), data=None if data is None else json.dumps(data).encode())
        with urllib.request.urlopen(q, timeout=60) as r: return json.loads(r.read() or 'null')

    def connection(self, nb=''): # Connection file of a kernel
        "Where the kernel of a notebook (in voila: the newest) is to be reached"
        h = self.house.home
        if self.kind=='lab':
            at = next((s['kernel']['id'] for s in self.get('api/sessions') if s['path']==Path(nb).name), None)
            return at and next(iter((h/'runtime').glob(f'kernel-{at}.json')), None)
        return max((h/'tmp').glob('voila_*/*.json'), key=lambda p: p.stat().st_mtime, default=None)

    def end_kernels(self):
        "No kernel is left"
        if self.kind=='lab':
            for s in self.get('api/sessions'): self.get(f"api/sessions/{s['id']}", 'DELETE')
    def stop(self):
        "End the server and its kernels"
        if self.process.poll() is None: os.killpg(self.process.pid, signal.SIGTERM)

class Kernel:
    "The kernel behind a page, asked directly"
    def __init__(self, connection):
        from jupyter_client import BlockingKernelClient
        self.client = BlockingKernelClient(connection_file=str(connection))
        self.client.load_connection_file()
        self.client.start_channels(iopub=False, stdin=False, hb=False)

    def ask(self, expression='None', do='', seconds=60): # A JSON value
        "Run `do`, then say what `expression` is"
        i = self.client.execute(do, user_expressions=dict(x=f"__import__('json').dumps({expression}, default=str)"), store_history=False)
        end = time.monotonic()+seconds*SLOW
        while True:
            m = self.client.get_shell_msg(timeout=max(.1, end-time.monotonic()))
            if m['parent_header'].get('msg_id')==i: break
        c = m['content']
        bad = c if c['status']!='ok' else c['user_expressions']['x']
        if bad['status']!='ok': raise RuntimeError(f"{bad.get('ename')}: {bad.get('evalue')}\n"+'\n'.join(bad.get('traceback', [])))
        return json.loads(ast.literal_eval(bad['data']['text/plain']))
    def close(self): self.client.stop_channels()

# -- what is on the screen

class Chrome:
    "Chromium with a fresh profile; every page counts what it asks of the outside, and its errors"
    def __init__(self):
        path = chromium()
        from playwright.sync_api import sync_playwright
        self.playwright = sync_playwright().start()
        try: self.browser = self.playwright.chromium.launch(executable_path=path, headless=True, args=[*_flags, _alone], timeout=60_000*SLOW)
        except BaseException: self.playwright.stop(); raise

    def page(self, **kwargs): # Screen
        "An empty page in a profile of its own"
        return Screen(self.browser.new_context(viewport=SIZE, service_workers='block', **kwargs))

    def lab(self, server, nb, **kwargs): # Screen
        "JupyterLab with one notebook open and its kernel idle"
        s = self.page(**kwargs)
        s.server, s.nb = server, nb
        s.page.goto(f'{server.url}lab/tree/{Path(nb).name}?token={server.token}&reset', timeout=90_000*SLOW)
        s.page.locator('.jp-Notebook .jp-Cell').first.wait_for(timeout=90_000*SLOW)
        s.idle()
        return s

    def voila(self, server, **kwargs): # Screen
        "The page that voila makes, once every cell has run and every widget is there"
        s = self.page(**kwargs)
        s.server = server
        s.page.goto(f'{server.url}?token={server.token}', timeout=240_000*SLOW, wait_until='domcontentloaded')
        s.page.locator('#rendered_cells').wait_for(state='visible', timeout=240_000*SLOW)
        return s

    def close(self):
        try: self.browser.close()
        finally: self.playwright.stop()
    def __enter__(self): return self
    def __exit__(self, *_): self.close()

_local = re.compile(r'^(?:(?:https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:|chrome)')
_elsewhere = re.compile(r'^(?!(?:https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:|chrome)')

class Screen:
    "A page: `outside` holds what it asked of other machines (refused), `errors` what its console said"
    def __init__(self, context):
        self.context, self.outside, self.errors, self.server, self.nb, self._kernel = context, [], [], None, None, None
        context.set_default_timeout(30_000*SLOW)
        context.route(_elsewhere, lambda route: route.abort())
        self.page = p = context.new_page()
        p.on('request', lambda r: _local.match(r.url) or self.outside.append(r.url))
        p.on('websocket', lambda w: _local.match(w.url) or self.outside.append(w.url))
        p.on('console', lambda m: m.type=='error' and self.errors.append(m.text))
        p.on('pageerror', lambda e: self.errors.append(str(e)))

    def idle(self, seconds=120):
        "The status bar says that the kernel waits"
        self.page.get_by_text('| Idle').first.wait_for(timeout=seconds*1000*SLOW)

    def command(self, name, **args):
        "One of JupyterLab's commands, as its menus and keys give it; not waited for"
        self.page.evaluate('([n, a]) => { window.jupyterapp.commands.execute(n, a) }', [name, args])

    def menu(self, *path):
        "Choose from the menu bar: 'Run', 'Run All Cells'"
        self.page.get_by_role('menubar').get_by_role('menuitem', name=path[0], exact=True).first.click()
        for name in path[1:]: self.page.locator('.lm-Menu-item', has=self.page.locator('.lm-Menu-itemLabel', has_text=re.compile(f'^{re.escape(name)}'))).last.click()

    def run_all(self, seconds=180):
        "Run > Run All Cells, until the last line is there; a cell that fails is told at once"
        self.menu('Run', 'Run All Cells')
        self.ran(seconds)

    def restart_and_run_all(self, seconds=180):
        "Kernel > Restart Kernel and Run All Cells, and yes to its question"
        self._forget()
        self.menu('Kernel', 'Restart Kernel and Run All Cells')
        self.page.locator('.jp-Dialog button.jp-mod-accept').click()
        self.page.locator('.jp-Notebook').get_by_text(SENTINEL).wait_for(state='detached', timeout=seconds*1000*SLOW)
        self.ran(seconds)

    def ran(self, seconds=180):
        "Until the last line is there; raises what a cell raised"
        said = self.page.locator('.jp-OutputArea-output').get_by_text(SENTINEL)
        wait_for(lambda: self.faults or said.count(), seconds, 'the last cell', .2)
        if self.faults: raise AssertionError('a cell failed:\n'+re.sub(r'\x1b\[[\d;]*m', '', self.faults[0])[-3000:])
        self.idle()

    @property
    def faults(self): # Tracebacks
        "What cells have raised"
        return self.page.evaluate('''() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap(c => c.model.type === 'code' ? c.model.outputs.toJSON() : [])
            .filter(o => o.output_type === 'error').map(o => o.traceback.join('\\n') || o.ename + ': ' + o.evalue)''')

    @property
    def kernel(self): # Kernel
        "The kernel of this page"
        if self._kernel is None: self._kernel = Kernel(wait_for(lambda: self.server.connection(self.nb), 60, "the kernel's connection file"))
        return self._kernel

    def until(self, expression, seconds=30): # What the kernel says
        "Ask the kernel until `expression` is true"
        return wait_for(lambda: self.kernel.ask(expression), seconds, f'the kernel to say {expression}', .1)

    def picture(self, path, of=None, limit=300_000): # Path
        "A screenshot of the page or of one element, whole however long it is, at most `limit` bytes"
        to = Path(path)
        to.parent.mkdir(parents=True, exist_ok=True)
        if of is not None:
            self.page.set_viewport_size({**SIZE, 'height': max(SIZE['height'], int(of.bounding_box()['height'])+200)})
            of.scroll_into_view_if_needed()
            self.page.wait_for_timeout(500)                 # what follows the width of the page is drawn anew
        (of or self.page).screenshot(path=str(to), animations='disabled')
        self.page.set_viewport_size(SIZE)
        if to.stat().st_size>limit: _smaller(to, limit)
        return to

    def _forget(self):
        if self._kernel is not None: self._kernel.close()
        self._kernel = None
    def close(self):
        "Leave the page; its kernel goes too"
        self._forget()
        self.context.close()
        if self.server is not None: self.server.end_kernels()
    def __enter__(self): return self
    def __exit__(self, *_): self.close()

def _smaller(path, limit):
    "Fewer colours, then fewer pixels"
    from PIL import Image
    im = Image.open(path).convert('RGB')
    while True:
        im.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size<=limit: return
        im = im.resize((im.width*4//5, im.height*4//5), Image.LANCZOS)
