# `make demo` and `make test` set up by themselves; a second set-up takes no time.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
BESIDE = rm -rf $@ && $(PIP) --target $@
TORCH := torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TEACHER := models/SmolLM2-135M-Instruct
export HF_HUB_OFFLINE := 1

.PHONY: setup demo task-demo docs test test-fast chaos test-deepspeed test-gptq check gpu-check clean

setup: .venv/.ready

# PyTorch's CPU build comes from its own index; where that cannot be reached, the default index may have one.
.venv/.ready: requirements-cpu.txt pyproject.toml
	@case "$$(uname -sm)" in "Linux x86_64" | "Linux aarch64") ;; *) \
		echo "make setup: vLLM's CPU build is there for Linux on x86-64 and Arm only, not for $$(uname -sm); see docs/install.md"; exit 1;; esac
	@command -v $(PYTHON) >/dev/null || { echo "make setup: $(PYTHON) is not installed; set PYTHON to a Python 3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --retries 0 --timeout 10 --index-url $(TORCH_CPU_INDEX) $(TORCH) || $(PIP) $(TORCH)
	$(PIP) -r requirements-cpu.txt
	$(PIP) --editable .
	$(BIN)/python -c "import torch, sys; sys.exit(torch.version.cuda and 'make setup needs the CPU build of torch; this one is for CUDA')"
	touch $@

$(TEACHER): .venv/.ready
	TQDM_DISABLE=1 $(BIN)/python -m llmdistill.models.demo_teacher $(TEACHER)

demo: $(TEACHER)
	$(BIN)/llmdistill run configs/demo.yaml

# One task: a teacher that a grammar makes good at it, and a student of half its layers.
TASK_DEMO := runs/task-demo
task-demo: $(TASK_DEMO)/examples/dataset.json
	$(BIN)/llmdistill train configs/task-demo/teacher.yaml
	$(BIN)/llmdistill run configs/task-demo/student.yaml

$(TASK_DEMO)/examples/dataset.json: $(wildcard configs/task-demo/make.py configs/task-demo/payments.*) | $(TEACHER)
	rm -rf $(@D)
	$(BIN)/python configs/task-demo/make.py --out $(TASK_DEMO)
	$(BIN)/llmdistill convert $(TASK_DEMO)/examples.jsonl $(@D) --from jsonl --teacher $(TEACHER)

# Two files of tests at a time, each with one thread: a vLLM and a training fit into 16 GB beside each other. Threads of vLLM
# servers are not bound to cores, of which they would all take the same.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind PYTHONPATH=.torchao:.s3:.anthropic:.readers:.notebook $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: check $(TEACHER) .torchao .s3 .anthropic .llamacpp .schemas .mkdocs .readers .notebook .triton
	TRITON_INTERPRET=1 PYTHONPATH=.triton $(BIN)/python -m pytest tests/losses/test_fused_triton.py
	$(PYTEST) --durations 15

test-fast: $(TEACHER) .torchao .s3 .anthropic .schemas .readers .notebook
	$(PYTEST) --ignore=tests/integration -m "not slow"

# Kills, doubles and full disks at more moments than `make test` takes; the table of docs/reliability.md.
CHAOS_SEEDS ?= 1-20
CHAOS_TABLE ?= runs/chaos.md
chaos: $(TEACHER) .torchao
	mkdir -p $(dir $(CHAOS_TABLE))
	CHAOS_SEEDS=$(CHAOS_SEEDS) CHAOS_TABLE="$(abspath $(CHAOS_TABLE))" OMP_NUM_THREADS=1 PYTHONPATH=.torchao \
		$(BIN)/python -m pytest tests/integration/test_chaos.py

# Beside the environment, not in it: transformers imports it wherever it finds it, and on a CPU it complains of its GPU parts.
.torchao: .venv/.ready
	$(BESIDE) torchao==0.18.0

# Beside the environment, being large: s3fs, and moto, whose S3 server the tests talk to.
.s3: .venv/.ready
	$(BESIDE) s3fs==2026.9.0 aiobotocore==3.10.0 aioitertools==0.13.0 boto3==1.43.117 botocore==1.43.117 s3transfer==0.19.3 \
		moto==5.2.5 blinker==1.9.0 flask==3.1.3 flask-cors==6.0.5 itsdangerous==2.2.0 py-partiql-parser==0.6.3 responses==0.26.3 \
		werkzeug==3.1.9 xmltodict==1.0.4

# Beside the environment, which is for a CPU: its interpreter runs the GPU kernels there.
.triton: .venv/.ready
	$(BESIDE) triton==3.7.0

# Beside the environment, being for one engine alone.
.anthropic: .venv/.ready
	$(BESIDE) anthropic==2.14.0

# Beside the environment, being for tests alone: llama.cpp with its server.
.llamacpp: .venv/.ready
	$(BESIDE) xllamacpp==2026.10.11549

# Beside the environment, not in it: accelerate imports DeepSpeed wherever it finds it. Needs a C++ compiler.
.deepspeed: .venv/.ready
	$(BESIDE) deepspeed==0.19.8 hjson==3.1.0

test-deepspeed: .deepspeed $(TEACHER)
	$(BIN)/python -m pytest tests/integration/test_deepspeed.py

# Beside the environment, too: it needs another version of compressed-tensors than vLLM does.
.llmcompressor: .venv/.ready
	$(BESIDE) llmcompressor==0.14.0.1 compressed-tensors==0.19.0

test-gptq: .llmcompressor $(TEACHER)
	$(BIN)/python -m pytest tests/integration/test_export.py

# What else reads the shards: the tests hold that Polars and DuckDB do.
.readers: .venv/.ready
	$(BESIDE) duckdb==2.0.1 polars==2.1.0 polars-runtime-32==2.1.0

# What runs the notebook of examples/.
.notebook: .venv/.ready
	$(BESIDE) nbclient==0.11.0 nbformat==5.11.1 ipykernel==7.4.0 ipython==9.18.1 ipython_pygments_lexers==1.1.1 \
		asttokens==3.0.2 comm==0.2.3 debugpy==1.8.22 executing==2.3.0 fastjsonschema==2.22.3 jedi==0.20.1 jupyter_client==8.10.0 \
		jupyter_core==5.9.1 matplotlib-inline==0.2.2 nest-asyncio2==1.7.4 parso==0.8.7 pexpect==4.9.0 prompt_toolkit==3.0.53 \
		ptyprocess==0.7.0 pure_eval==0.2.4 stack-data==0.6.3 tornado==6.6.1 traitlets==5.16.1 wcwidth==0.9.4

# The schemas of SkyPilot and Kubernetes, which jobs are checked against.
.schemas: .venv/.ready
	$(BESIDE) skypilot==0.14.1 kubernetes-validate==1.37.0 importlib_resources==7.1.0

# What the documentation site is built with.
.mkdocs: .venv/.ready
	$(BESIDE) mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 babel==2.19.0 \
		backrefs==8.3.1 ghp-import==2.1.0 griffelib==2.4.1 markdown==3.11.3 mergedeep==1.3.4 mkdocs-autorefs==1.4.5 \
		mkdocs-get-deps==0.2.2 mkdocs-material-extensions==1.3.1 paginate==0.5.7 pymdown-extensions==13.1.2 \
		pyyaml-env-tag==1.1 watchdog==7.1.0

# The site, in site/: it needs no network, and every broken link is an error.
MKDOCS := NO_MKDOCS_2_WARNING=1 PYTHONPATH=.mkdocs $(BIN)/python -m mkdocs
docs: .mkdocs
	PYTHONPATH=. $(BIN)/python docs/build.py
	$(MKDOCS) build --strict

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls benchmarks examples

# In the environment of GPU_PYTHON, which needs a build of torch for the GPU: `make setup` installs that for the CPU.
GPU_PYTHON ?= python3
GPU_JSON ?= benchmarks/gpu.json
gpu-check:
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(GPU_PYTHON) benchmarks/gpu.py --json $(GPU_JSON)

clean:
	rm -rf .venv .anthropic .deepspeed .llamacpp .llmcompressor .mkdocs .notebook .readers .schemas .torchao .s3 .triton site models runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
