# Two commands do everything: `make demo` and `make test`. Nothing needs an activated environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# With a sourced ROS 2 its own rclpy is used, which lives outside the environment and is compiled against numpy 1.
SITE := $(if $(ROS_DISTRO),--system-site-packages)
NUMPY := $(if $(ROS_DISTRO),'numpy<2')
COMMA := ,
ROS := $(if $(ROS_DISTRO),,$(COMMA)ros)
export OMP_WAIT_POLICY := PASSIVE
# Packages come uncompiled (below): of what is imported, the first process keeps what each would have to make anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test setup lint train-drive clean

demo: $(VENV)/.demo
	$(BIN)/mm-edge demo $(ARGS)

# Files beside each other, one a core; then alone what waits for real processes. 5, pytest's "nothing chosen",
# is well in one half, where ARGS choose from the other only.
test: $(VENV)/.setup
	$(BIN)/python -m pytest -m "not real_time" --dist loadfile -n logical --maxprocesses 4 $(ARGS); first=$$?; \
	[ $$first = 0 ] || [ $$first = 5 ] || exit $$first; \
	$(BIN)/python -m pytest -m real_time $(ARGS); second=$$?; \
	if [ $$second = 5 ]; then exit $$first; fi; exit $$second

setup: $(VENV)/.setup

lint: $(VENV)/.setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# By the shipped model's recipe and seeds: episodes, training and DAgger; stopped, it goes on where it was.
# The allocator keeps what it has: giving large tensors back to the system every step costs a fifth of the time.
train-drive: export MALLOC_MMAP_MAX_ = 0
train-drive: export MALLOC_TRIM_THRESHOLD_ = 17179869184
train-drive: $(VENV)/.setup
	$(BIN)/python -m training.train drive --out runs/drive $(ARGS)

$(VENV)/.python:
	$(PYTHON) -m venv $(SITE) $(VENV)
	touch $@

# --no-compile: what is imported is compiled then, once; of the rest, which is most, nothing need be.
$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/pip install -q --no-compile -c constraints.txt -e ".[ort,camera,sim,record$(ROS)]" $(NUMPY)
	touch $@

# Holds all that .demo does: one resolution, not two.
$(VENV)/.setup: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/pip install -q --no-compile -c constraints.txt -e ".[ort,camera,sim,record,train,export,compare,lerobot,pretrained,search,viewer,audio,trt-rtx,test$(ROS)]" $(NUMPY)
	touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) runs
