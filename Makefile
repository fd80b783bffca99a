# make run    sets up and runs a command in a microVM
# make test   sets up and runs the tests
# Both work in .venv, and do again only what has changed.

PYTHON ?= python3
BIN := .venv/bin

# To build: the native module, the guest's kernel, the built-in root filesystem. To run: QEMU.
PACKAGES := gcc libc6-dev make python3-dev python3-venv \
            bc bison flex libelf-dev linux-source-6.12 xz-utils \
            busybox-static squashfs-tools qemu-system-x86
# The tests boot a real Debian tree, pull from a real registry, fuzz, and check what we write with other people's programs.
TEST_PACKAGES := $(PACKAGES) bzip2 clang cpio docker-registry e2fsprogs erofs-utils libclang-rt-dev mmdebstrap openssl passt \
                 skopeo umoci zstd
AARCH64_PACKAGES := gcc-aarch64-linux-gnu libc6-dev-arm64-cross mmdebstrap qemu-system-arm

NATIVE := setup.py pyproject.toml $(wildcard csrc/*.c csrc/*.h csrc/*.py)
PIP := $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: run test lint bench docs payload payload-aarch64 test-aarch64 test-vz test-macos wheel-macos wheel-linux \
        wheel-linux-aarch64 system clean

run: payload
	$(BIN)/vmette run builtin://base -- uname -a
	@echo
	@echo "That was Linux in a microVM. Next, try:"
	@echo "  $(BIN)/vmette run alpine:3.20 cat /etc/os-release"
	@echo "  $(BIN)/vmette run --share here=.:ro builtin://base -- ls -l /mnt/here"
	@echo "  $(BIN)/vmette run --help"

test: payload .venv/test
	@tools/system-packages.sh $(TEST_PACKAGES)
	$(BIN)/pytest $(ARGS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Start-up, many machines at once, a thousand runs: half an hour.
bench: payload .venv/test
	@tools/system-packages.sh $(TEST_PACKAGES) bubblewrap runc kmod
	$(PIP) --group bench
	$(BIN)/python -m bench $(ARGS)

docs: .venv/test
	$(BIN)/pdoc --docformat google --no-show-source -o build/docs vmette vmette.machine vmette.errors vmette.providers

# What runs in the guest: kernel, initramfs, base image. It knows itself what is up to date.
payload: .venv/native
	$(BIN)/python -m tools.payload

payload-aarch64: .venv/native
	@tools/system-packages.sh $(PACKAGES) $(AARCH64_PACKAGES)
	$(BIN)/python -m tools.payload aarch64

test-aarch64: payload payload-aarch64 .venv/test
	$(BIN)/pytest --arch aarch64 tests/vm/test_aarch64.py

# The tests that boot VMs once more, with what runs them on a Mac over a stand-in for Apple's framework.
test-vz: payload .venv/test
	@tools/system-packages.sh $(TEST_PACKAGES)
	$(BIN)/pytest --backend vz $(or $(ARGS),tests/vm)

# What the wheel for Macs carries, run in an emulated machine like a Mac's.
test-macos: payload wheel-macos .venv/test
	$(BIN)/pytest --arch aarch64 tests/vm/test_aarch64.py tests/vm/test_wheel_aarch64.py

# Wheels, in dist/: for Macs, and for Linux. All are cross-compiled here.
wheel-macos wheel-linux-aarch64: .venv/native
	@tools/system-packages.sh $(PACKAGES) $(AARCH64_PACKAGES)
	$(BIN)/python -m tools.wheel $(if $(filter wheel-macos,$@),macos,linux aarch64)

wheel-linux: .venv/native
	$(BIN)/python -m tools.wheel linux x86_64

system:
	@tools/system-packages.sh $(PACKAGES)

.venv/bin/python: | system
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade 'pip>=25.1'

.venv/build: pyproject.toml | .venv/bin/python
	@echo "installing the build tools into .venv" >&2
	$(PIP) --group build
	@touch $@

.venv/native: $(NATIVE) .venv/build
	@echo "building vmette's native module" >&2
	$(PIP) --no-build-isolation --editable .
	@touch $@

.venv/test: pyproject.toml | .venv/bin/python
	$(PIP) --group dev
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info vmette/_native*.so vmette/_payload
