# make demo   run the whole workflow on a dataset that needs no download
# make check  run the quick tests, in about a minute
# make test   install the requirements of the tests, and run all of them
# make recipes  run examples/slim_*.py with the newest releases of the libraries that they need
# make lint   check formatting, lint, types and which package imports which
# make web    fetch ONNX Runtime for examples/classify.html from the npm registry

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# where the page looks for ONNX Runtime, the package, and what the page needs of it
VENDOR  = examples/vendor
ORT     = onnxruntime-web@1.30.0
ORT_FILES = ort.wasm.bundle.min.mjs ort-wasm-simd-threaded.wasm

.PHONY: demo check test recipes lint web clean

demo: $(VENV)/requirements $(VENV)/requirements-export
	@rm -rf demo
	$(BIN)/python main.py -sr --s 0.005 --dataset digits --arch vgg --depth 11 --epochs 12 \
	    --no-cuda --save demo/sparse
	$(BIN)/python sweep.py demo/sparse --points 10 --no-cuda --save demo/sweep
	$(BIN)/python vggprune.py --percent 0.6 --model demo/sparse --no-cuda --save demo/pruned
	$(BIN)/python main.py --refine demo/pruned/pruned.pth.tar --epochs 8 --no-cuda \
	    --save demo/refined
	$(BIN)/python export.py demo/refined --no-cuda --save demo/exported

check: $(VENV)/requirements-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test: $(VENV)/requirements-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

recipes: $(VENV)/requirements-dev
	$(BIN)/python -m pip install --quiet --upgrade -r examples/requirements.txt
	$(BIN)/python -m pytest tests/test_recipes.py -rP

lint: $(VENV)/requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

web: $(VENDOR)/$(ORT)

# unpacked aside and moved into place: whoever finds a file there finds all of it
$(VENDOR)/$(ORT):
	@command -v npm >/dev/null || { echo "make web needs npm, which comes with Node.js"; exit 1; }
	@mkdir -p $(VENDOR)
	set -e; aside=$$(mktemp -d $(VENDOR)/aside.XXXXXX); trap 'rm -rf "$$aside"' EXIT; \
	    npm pack --silent --prefer-offline --pack-destination "$$aside" $(ORT) >/dev/null; \
	    tar -xzf "$$aside"/*.tgz -C "$$aside"; \
	    for name in $(ORT_FILES); do mv "$$aside/package/dist/$$name" $(VENDOR)/; done
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%: %.txt requirements.txt requirements-export.txt $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:
	rm -rf $(VENV) demo $(VENDOR)
