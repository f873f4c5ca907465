# make demo    set up once, then run the main job on the embedded teacher: runs/demo/report.html
# make test    set up once, then everything that must hold: in step and clean, notebooks, pytest, the wheel
# make quick   in step and clean, then what changed and what imports it, until 150 s are spent; make pytest: pytest alone
# make lab     set up once, then JupyterLab on the tutorials
# make docs    the documentation site in _docs/: every notebook, the API, the tables; built offline
# make bench   measure what must be fast; writes nbs/bench.csv and its page
# make sync    what an author runs: modules, clean notebooks and README from the notebooks
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := .venv/bin
READY  := .venv/.ready
TIMEOUT ?= 900

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM   := false

.PHONY: demo lab docs test quick bench sync setup check notebooks pytest clean
demo: $(READY)
	$(BIN)/sdlab demo

# no news, no look for updates: nothing is asked of the network
lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=nbs/tutorials --LabApp.default_url=/lab/tree/choose_a_cut.ipynb --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(if $(filter 0,$(shell id -u)),--allow-root)

docs: $(READY)
	$(BIN)/python docs/build.py

# one after the other even under -j: they share the machine
test: $(READY)
	$(MAKE) check
	$(MAKE) notebooks
	$(MAKE) pytest

quick: $(READY)
	$(BIN)/python tests/quick.py
check: $(READY)
	$(BIN)/python tests/sync.py --check
notebooks: $(READY)
	$(BIN)/python tests/run_notebooks.py --workers 2 --timeout $(TIMEOUT)
pytest: $(READY)
	$(BIN)/python -m pytest tests -n 2

bench: $(READY)
	$(BIN)/python tests/bench/run.py $(BENCH)

sync: $(READY)
	$(BIN)/python tests/sync.py

setup: $(READY)
$(READY): settings.ini constraints.txt setup.py
	@echo 'setting up .venv, once: a few minutes, 2 GB'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf build dist *.egg-info _docs _proc runs .bench
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
