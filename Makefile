# Two targets do everything: `make course` and `make test`. Each is complete on a fresh machine and does nothing twice.
PYTHON ?= python3
BIN := .venv/bin
# one thread each for two parallel workers: two threads each on two busy cores are many times slower
JOBS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Packages are compiled when they are first imported. Where Python may not keep that, every process does it again: 7 s
# each time for PyTorch and transformers.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help course test lab classroom data tour book plain-book slides notebooks export wheel dist bundle clean

help:
	@echo "make course     environment, models and data, and the tour: a real model made smaller, with a report"
	@echo "make lab        open the course in JupyterLab"
	@echo "make classroom  environment with nbgrader, and the five commands that a teacher needs"
	@echo "make test       environment and all tests"
	@echo "make book       the course as a book in _book: by Quarto where it is installed, else the plain edition and an EPUB"
	@echo "make bundle     one archive that installs the course where there is no network"
	@echo "make slides     the slides of four lectures, from the notebooks: build/slides"
	@echo "make notebooks  run every notebook and save its outputs (for maintainers)"
	@echo "make export     write the package from the notebooks, and its reference (for maintainers)"

course: .venv/.lab.stamp
	@$(BIN)/llmcourse data --fetch all
	@$(BIN)/llmcourse tour
	@echo "Next: make lab"

lab: .venv/.lab.stamp
	$(BIN)/jupyter lab nbs/index.ipynb

classroom: .venv/.lab.stamp .venv/.classroom.stamp
	@$(BIN)/llmcourse classroom

test: .venv/.dev.stamp
	@$(BIN)/llmcourse data --fetch all
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

data: .venv/.lab.stamp
	@$(BIN)/llmcourse data --fetch all

tour: .venv/.lab.stamp
	@$(BIN)/llmcourse tour

# With Quarto 1.7 or newer its edition; everywhere else the plain one, by pandoc from the Python registry.
book:
	@if command -v quarto >/dev/null; then \
	  quarto render && echo "The book is in _book: python -m http.server -d _book --bind 127.0.0.1, then http://127.0.0.1:8000"; \
	else \
	  $(MAKE) --no-print-directory plain-book; \
	fi

plain-book: .venv/.book.stamp
	@$(BIN)/python tools/book.py --epub

slides: .venv/.dev.stamp
	$(BIN)/python tools/slides.py

notebooks: .venv/.dev.stamp
	$(BIN)/python tools/notebooks.py $(NB)
	$(BIN)/python tools/translate.py

export: .venv/.dev.stamp
	$(BIN)/python tools/export.py
	$(BIN)/python tools/reference.py

wheel: .venv/.dev.stamp
	$(BIN)/python -m build --wheel

dist: .venv/.dev.stamp
	$(BIN)/python -m build

bundle: .venv/.dev.stamp
	@$(BIN)/llmcourse data --fetch all
	$(BIN)/python tools/bundle.py

# The stamp is written last, so an interrupted installation is taken up again.
.venv/.%.stamp: pyproject.toml constraints.txt tools/setup_env.py
	@$(PYTHON) tools/setup_env.py --extra $*

clean:
	rm -rf .venv build dist _book .quarto
