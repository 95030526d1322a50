# make demo   run the whole workflow on a dataset that needs no download
# make test   install the requirements of the tests, and run the tests
# make lint   check formatting, lint and types

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/requirements
	@rm -rf demo
	$(BIN)/python main.py -sr --s 0.005 --dataset digits --arch vgg --depth 11 --epochs 12 \
	    --no-cuda --save demo/sparse
	$(BIN)/python sweep.py demo/sparse --points 10 --no-cuda --save demo/sweep
	$(BIN)/python vggprune.py --percent 0.6 --model demo/sparse --no-cuda --save demo/pruned
	$(BIN)/python main.py --refine demo/pruned/pruned.pth.tar --epochs 8 --no-cuda \
	    --save demo/refined

test: $(VENV)/requirements-dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%: %.txt requirements.txt $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:
	rm -rf $(VENV) demo
