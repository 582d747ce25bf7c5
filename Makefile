# make demo   environment, install, a training in the toy world (50 s on two cores), pictures in runs/toy/samples
# make test   the test suite, without the tests marked slow
# make demo-eval  is AIG on the Pareto front? five trainings, 15 columns, one report: 27 minutes on two busy cores
# make browser    the report and the rating page in a headless Chromium (apt-get install chromium)
# make extras     the tests of the optional packages: Weights & Biases, datasets, bitsandbytes
# make faults     a training killed 200 times: nothing may be lost
# make oldest     a part of the tests with the oldest releases that pyproject.toml allows, in .venv-oldest
# make estimators every gradient mode against the exact gradient and the truth, docs/estimators.md: an hour on two cores
# make stops    does the monitor end hacked runs in time, and no others? twenty trainings in the toy world, runs/stops/stops.md
# make held      what holds a training back from reward hacking, in the toy world: runs/held/held.md
# make real-size  SDXL at its true shapes with random weights on a CPU: 24 GiB of memory, 25 GB of disk, an hour
# make check  ruff, basedpyright (also of what needs an extra)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-eval test browser extras slow faults oldest estimators stops held real-size check docs clean

demo: .venv/.installed
	$(BIN)/draftp train --preset toy

demo-eval: .venv/.installed
	$(BIN)/python benchmarks/aig_front.py train runs/front
	$(BIN)/python benchmarks/aig_front.py eval runs/front

browser: .venv/.installed-browser
	$(BIN)/python -m pytest -m browser

extras: .venv/.installed-extras
	$(BIN)/python -m pytest tests/test_prompts.py tests/test_prompt_tables.py tests/training/test_ema_and_best.py -k "dataset or wandb"
	$(BIN)/python -m pytest -n 2 tests/core/test_eight_bit.py tests/training/test_optimizer.py
	$(BIN)/python -m pytest tests/planning/test_memory.py -k 8-bit
	$(BIN)/python -m pytest tests/sampling/test_identity.py -k quantize

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 -m "not slow and not browser"

slow: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 -m slow

faults: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.kill --kills 200

# What touches diffusers, transformers, peft, typer, Pillow and NumPy: loading, LoRA files, rewards, exports, the toy's
# figures, help and metadata. `make oldest OLDEST=tests` takes everything.
OLDEST ?= $(addprefix tests/core/test_,diffusers.py fields.py golden.py loading.py lora_contents.py lora_files.py \
	lora_reading.py tokenizers.py weight_files.py) tests/export tests/rewards tests/toy tests/cli/test_cli.py \
	tests/cli/test_printing.py tests/sampling/test_embedded.py tests/sampling/test_pipeline.py \
	tests/evaluation/test_features.py tests/training/test_final.py tests/test_pictures.py tests/test_umask.py

# Old releases warn of what newer ones of others have changed: warnings are no errors here.
oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2 -W default --disable-warnings -m "not slow and not browser" $(OLDEST)

estimators: .venv/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[plots]"
	PYTHONPATH=. $(BIN)/python benchmarks/estimators.py runs/estimators
	PYTHONPATH=. $(BIN)/python benchmarks/estimators_page.py runs/estimators/estimators.json docs/estimators.md

stops: .venv/.installed
	PYTHONPATH=. $(BIN)/python benchmarks/stops.py runs/stops

held: .venv/.installed-test
	PYTHONPATH=. $(BIN)/python benchmarks/held.py runs/held

real-size: .venv/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps open_clip_torch
	PYTHONPATH=. $(BIN)/python benchmarks/real_size.py all runs/real-size

check: .venv/.installed-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

docs: .venv/.installed
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_settings.py

.venv/.installed: pyproject.toml constraints.txt
	@echo "installing into .venv, a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[test]"
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

.venv/.installed-browser: .venv/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"
	touch $@

.venv/.installed-extras: .venv/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[wandb,datasets,bitsandbytes]"
	touch $@

.venv/.installed-lint: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lint,plots,rate]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
