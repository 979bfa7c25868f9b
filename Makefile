# The first use of any target makes .venv; it needs Python 3.11 or newer, make and a network, and nothing else.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: bench demo label-curve test test-slow lint types format docs
.DELETE_ON_ERROR:

demo: $(READY)
	$(PY) tools/demo.py

# Hours; goes on where it stopped. The curve comes into runs/label-digits/sweep.
label-curve: $(READY)
	$(PY) benchmarks/label_efficiency.py digits

# Five minutes on two quiet cores; PHOTOS=FILE is a parquet file of photographs for the loader.
bench: $(READY)
	$(PY) benchmarks/speed.py $(if $(PHOTOS),--photos $(PHOTOS))

# Two workers, a file of tests each: most tests use one core. More would want memory, 1.5 GiB each.
test: $(READY)
	$(PY) -m pytest -q -n 2 --dist loadfile

test-slow: $(READY)
	$(PY) -m pytest -q -m slow

lint: $(READY)
	$(PY) -m ruff check -q
	$(PY) -m ruff format -q --check

types: $(READY)
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check -q --fix
	$(PY) -m ruff format -q

# Pages and an API reference, without a network: build/docs/index.html.
docs: $(READY)
	$(PY) docs/build.py

# The stamp is written last, so an interrupted set-up is taken up again by the next make.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; '$(PYTHON)' is not one. Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up .venv: minutes the first time, most of them torch's download." >&2
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[demo,vit,test,dev,bench,docs]"
	@touch $@
