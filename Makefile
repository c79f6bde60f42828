# make demo · test · lint · bench need nothing installed: they make .venv from requirements.txt first.
# gpu-check runs in $(PYTHON) as it is and installs nothing.

PYTHON ?= python3
VENV = .venv/bin/python
STAMP = .venv/.installed
# processes that share the tests of make test
WORKERS ?= 2

.PHONY: demo test test-slow test-ray lint bench gpu-check clean

demo: $(STAMP)
	./demo.sh

test: $(STAMP)
	$(VENV) -m pytest -n $(WORKERS) --dist loadfile --durations=10

# what starts several processes, or takes long
test-slow: $(STAMP)
	$(VENV) -m pytest -m "slow or dist" --durations=10

# --engine ray, on a local cluster; installs requirements-ray.txt
test-ray: $(STAMP)
	$(VENV) -m pip install -q --upgrade-strategy only-if-needed -r requirements-ray.txt
	$(VENV) -m pytest -m ray --durations=10

lint: $(STAMP)
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

bench: $(STAMP)
	$(VENV) -m kernels.budget
	$(VENV) -m kernels.bench
	$(VENV) -m pipeline.bench --sample

gpu-check:
	$(PYTHON) -m pipeline.gpu_check

clean:
	rm -rf .venv runs

$(STAMP): requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -q --upgrade-strategy only-if-needed -r requirements.txt
	touch $@
