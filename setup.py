from setuptools import setup

# Everything else is in pyproject.toml; setuptools takes cffi's modules from here only.
setup(
    cffi_modules=["csrc/native_build.py:ffi"],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
