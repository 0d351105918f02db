# Each target sets up what it needs; all that must be there is Python 3.11 or newer, make and a package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test fast nightly coverage fuzz lint docs zoo zoo-sample study results bench soak clean

quickstart: .venv/package ## train a small family on embedded data, a few minutes on two cores
	rm -rf runs/quickstart
	$(BIN)/detachnet train quickstart

test: .venv/dev ## everything that must pass
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0

fast: .venv/dev ## the tests that are not marked slow, about a minute on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --max-worker-restart 0

nightly: .venv/dev ## the tests that `make test` leaves out: more networks and settings, some half an hour on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly -n auto --dist loadfile --max-worker-restart 0

fuzz: .venv/dev ## random recipes, headers, manifests, cuts, sizes and run folders; FUZZ=10000 of them
	FUZZ=$(or $(FUZZ),10000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz --timeout 0

# From Python 3.14 on this costs little (sys.monitoring): CI measures there.
coverage: .venv/dev ## the same tests, and which lines of detachnet/ and cli/ they run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --max-worker-restart 0 \
		--cov=detachnet --cov=cli --cov-report=term:skip-covered

lint: .venv/dev ## format, rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy detachnet cli

docs: .venv/docs ## build the pages into site/, strictly
	$(BIN)/mkdocs build --strict --quiet

zoo: .venv/dev ## every model of torchvision and timm against tests/zoo/table.csv, up to 20 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.check

zoo-sample: .venv/dev ## twenty-five of them, chosen at random; it prints the seed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.check --sample 25

study: .venv/dev ## docs/study.md's runs, some hours on two cores; DATA=folder of CIFAR-10
	OMP_NUM_THREADS=1 $(BIN)/python scripts/study.py --data-root $(DATA)

results: .venv/dev ## figures and tables of README and docs anew, from benchmarks/results
	$(BIN)/python scripts/figures.py
	$(BIN)/python scripts/tables.py

bench: .venv/dev .venv/peers/ready ## the quick benchmarks
	$(BIN)/python benchmarks/surgery.py --quick
	$(BIN)/python benchmarks/training_step.py --quick
	$(BIN)/python benchmarks/kernels.py --quick
	$(BIN)/python benchmarks/detached_inference.py --quick
	$(BIN)/python benchmarks/switching.py --quick
	$(BIN)/python benchmarks/widths.py --quick
	$(BIN)/python benchmarks/data_pipeline.py --quick
	$(BIN)/python benchmarks/image_files.py --quick
	$(BIN)/python benchmarks/memory.py --quick
	$(BIN)/python benchmarks/deadline.py --quick
	$(BIN)/python benchmarks/soak.py --quick
	.venv/peers/bin/python benchmarks/peers.py --quick

soak: .venv/dev ## a DeadlineRunner at 0.5 to 4 times the base-model's load, some minutes
	$(BIN)/python benchmarks/soak.py --json benchmarks/results/soak.json

clean:
	rm -rf .venv site build *.egg-info

.venv/package: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/dev: .venv/package
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/docs: .venv/package
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# The peers have an environment of their own, which finds torch and the rest in ours.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv/peers/ready: .venv/dev
	$(BIN)/python -m venv .venv/peers
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$(.venv/peers/bin/python $(PURELIB))/ours.pth"
	.venv/peers/bin/python -m pip install --quiet earlyon torch-pruning
	touch $@
