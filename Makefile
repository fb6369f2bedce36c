# make demo: the whole benchmark on synthetic scenes. For developers: make test, make lint,
# make gpu-check (what only a machine with NVIDIA GPUs can show, in about ten minutes) and
# make torture (runs killed at 60 random moments, and 36 faults of two ranks, about an hour).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = demo

.PHONY: demo test gpu-check torture lint clean

# A stamp is newer than the requirements that the environment was made from.
$(VENV)/.run: requirements.txt
	@target/install.bash $(PYTHON) $(VENV) $<
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-tools.txt requirements.txt
	@target/install.bash $(PYTHON) $(VENV) $<
	@touch $@

# The first run is DEMO/outputs/demo, which the documentation uses as its example; others get a name.
demo: $(VENV)/.run
	$(BIN)/python tools/make_scenes.py --output $(DEMO)/data --train 96 --inference 12 --size 240 300 --seed 1 --jobs 2
	$(BIN)/python slstr_cloud.py --config target/demo.yaml \
		$(if $(wildcard $(DEMO)/outputs/demo),,--set run_name=demo)
	@echo
	@echo "Next:"
	@echo "  source $(BIN)/activate    # python is now the one that has TensorFlow"
	@echo "  python slstr_cloud.py --config target/demo.yaml --set augment=flips    # another run"
	@echo "  python tools/compare.py $(DEMO)/outputs/*    # runs side by side"
	@echo "and open $(DEMO)/outputs/demo/report.html in a browser."

# Two at once: most tests wait for a process, or use one core. In the order of the files: otherwise
# those with few but long tests would come last, one after the other.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

# TensorFlow finds the CUDA libraries in packages of their own; a cluster may have them elsewhere.
gpu-check: $(VENV)/.dev
	-@if ls /dev/nvidia[0-9]* > /dev/null 2>&1; then \
		$(BIN)/python -m pip install --quiet "tensorflow[and-cuda]"; fi
	$(BIN)/python -m pytest $(if $(wildcard /dev/nvidia[0-9]*),-v) -m gpu tests/gpu

torture: $(VENV)/.dev
	$(BIN)/python -m pytest -s tests/test_kill.py --torture 7
	$(BIN)/python -m pytest -s tests/parallel/test_faults.py --torture 3

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x target/*.sh target/*.job target/*.bash .ci/run

clean:
	rm -rf $(VENV) $(DEMO)
