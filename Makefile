.PHONY: setup demo test bench lint format wheel

setup:
	@tools/setup.sh

demo: setup
	@.venv/bin/sla2 demo --out out/demo

test: setup
	@tools/run_tests.sh

bench: setup
	@mkdir -p out
	@.venv/bin/sla2 bench op --json out/bench.json
	@.venv/bin/python bench/plot.py out/bench.json --out out

lint: setup
	@tools/lint.sh

format: setup
	@git ls-files -z '*.cpp' '*.h' '*.inc' | xargs -0 clang-format -i
	@.venv/bin/ruff check --fix --quiet python tests
	@.venv/bin/ruff format --quiet python tests

wheel: setup
	@.venv/bin/pip wheel . --no-deps --wheel-dir dist
