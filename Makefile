# `make quickstart` and `make test` do all their own set-up. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv quickstart test test-lmms test-clients fuzz bench bench-index bench-serving another-hand gpu docs browser clean

venv: .venv/installed

quickstart: .venv/installed
	$(BIN)/cafe quickstart

test: .venv/installed-dev browser
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 30

test-lmms: .venv-lmms/installed
	.venv-lmms/bin/pytest tests/evaluation/harnesses/test_lmms_eval.py tests/serving/test_lmms_eval_client.py

test-clients: .venv-clients/installed
	.venv-clients/bin/pytest tests/serving/test_serving_docs.py -k other_libraries

# Ten minutes: the property tests with many examples, then damaged files of every kind.
fuzz: .venv/installed-dev
	$(BIN)/pytest -m hypothesis --hypothesis-profile=fuzz
	$(BIN)/python tests/fuzzing.py --minutes 7

bench: .venv/installed-dev
	$(BIN)/python benchmarks/one_pass.py
	$(BIN)/python benchmarks/info_nce.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/one_prefill.py
	$(BIN)/python benchmarks/shared_inference.py
	$(BIN)/python benchmarks/loading.py

# Collections: about half an hour and 16 GB of disk. scenes_search.py needs the model of `make quickstart`.
bench-index: .venv/installed-dev
	$(BIN)/python benchmarks/indexing.py
	$(BIN)/python benchmarks/searching.py
	$(BIN)/python benchmarks/index_kills.py
	$(BIN)/python benchmarks/scenes_search.py
	$(BIN)/python benchmarks/rclip_rival.py

# The server: about half an hour, of which five minutes are load and ten are fuzzing.
bench-serving: .venv/installed-dev
	$(BIN)/python benchmarks/serving_speed.py
	$(BIN)/python benchmarks/serving_memory.py
	$(BIN)/python benchmarks/serving_faults.py
	$(BIN)/python benchmarks/serving_load.py
	$(BIN)/python benchmarks/serving_fuzz.py

# Real images: drawings and words of people, from the npm registry (examples/another_hand). Resumes where it stopped.
another-hand: .venv/installed-another-hand
	PYTHONPATH=examples $(BIN)/python -m another_hand

# On a machine with a GPU, twelve minutes at most. The table is written whatever became of the steps.
gpu: .venv/installed-dev
	$(BIN)/python benchmarks/gpu.py; status=$$?; $(BIN)/python benchmarks/gpu.py --table && exit $$status

docs: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

# The test of the web page needs chromium.
browser:
	@command -v chromium >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "chromium is not installed and could not be: the test of the web page will fail."

# PyTorch goes first and by exact version: the constraints file pins one, pyproject.toml keeps a range.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[index,serve]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/installed-another-hand: .venv/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[another-hand]'
	touch $@

# lmms-eval wants torchvision, which this package does without, and versions of its own: it has an environment of its own.
# These are what its version 0.7 imports besides; newer filelocks lack what it looks into.
LMMS := black isort evaluate jsonlines numexpr sacrebleu pytablewriter tqdm-multiprocess loguru tenacity tiktoken \
	python-dotenv zss openpyxl ftfy einops nltk pycocoevalcap sentencepiece 'av<16' opencv-python-headless latex2sympy2 \
	math-verify openai peft wandb 'filelock<4'

.venv-lmms/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lmms
	.venv-lmms/bin/pip install -q --disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt)
	.venv-lmms/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[serve]' beartype datasets hypothesis pytest $(LMMS)
	.venv-lmms/bin/pip install -q --disable-pip-version-check --no-deps lmms-eval
	touch $@

# LangChain wants an older client of OpenAI's than the tests, so both libraries have an environment of their own.
.venv-clients/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q --disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt)
	.venv-clients/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[serve,index]' \
		pytest beartype hypothesis
	.venv-clients/bin/pip install -q --disable-pip-version-check langchain-openai llama-index-llms-openai-like \
		llama-index-embeddings-openai-like
	touch $@

clean:
	rm -rf .venv .venv-lmms .venv-clients runs
