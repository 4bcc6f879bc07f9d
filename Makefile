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
	@tools/format.sh

wheel: setup
	@.venv/bin/pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir dist
