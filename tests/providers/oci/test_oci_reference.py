"""Names of images."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmette.providers import InvalidSpec
from vmette.providers.oci.reference import Reference

A = f"sha256:{'a' * 64}"
B = f"sha512:{'b' * 128}"


@pytest.mark.parametrize(
    ("text", "canonical", "selector"),
    [
        ("alpine", "docker.io/library/alpine:latest", "latest"),
        ("oci://alpine", "docker.io/library/alpine:latest", "latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20", "3.20"),
        ("org/app", "docker.io/org/app:latest", "latest"),
        ("a/b/c:1", "docker.io/a/b/c:1", "1"),
        ("docker.io/alpine", "docker.io/library/alpine:latest", "latest"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest", "latest"),
        ("Index.Docker.IO/org/app", "docker.io/org/app:latest", "latest"),
        ("registry-1.docker.io/org/app", "docker.io/org/app:latest", "latest"),
        ("ghcr.io/org/app:v1", "ghcr.io/org/app:v1", "v1"),
        ("ghcr.io/app", "ghcr.io/app:latest", "latest"),
        ("localhost/app", "localhost/app:latest", "latest"),
        ("localhost:5000/app:_x", "localhost:5000/app:_x", "_x"),
        ("host:1/app", "host:1/app:latest", "latest"),
        ("LocalHost/app", "localhost/app:latest", "latest"),
        ("127.0.0.1:65535/a", "127.0.0.1:65535/a:latest", "latest"),
        ("[::1]:5000/a", "[::1]:5000/a:latest", "latest"),
        ("[2001:DB8::1]/a", "[2001:db8::1]/a:latest", "latest"),
        ("example.com", "docker.io/library/example.com:latest", "latest"),
        ("host:5000", "docker.io/library/host:5000", "5000"),
        (f"alpine@{A}", f"docker.io/library/alpine@{A}", A),
        (f"alpine@{B}", f"docker.io/library/alpine@{B}", B),
        (f"h.io:1/a/b:t@{A}", f"h.io:1/a/b:t@{A}", A),
        ("a_b/c__d/e.f/g---h:T.-_", "docker.io/a_b/c__d/e.f/g---h:T.-_", "T.-_"),
        (f"x:{'t' * 128}", f"docker.io/library/x:{'t' * 128}", "t" * 128),
        (f"q.io/{'r' * 255}", f"q.io/{'r' * 255}:latest", "latest"),
    ],
)
def test_what_a_name_means(text: str, canonical: str, selector: str) -> None:
    reference = Reference.parse(text)
    assert str(reference) == canonical
    assert reference.selector == selector
    assert Reference.parse(canonical) == reference
    assert Reference.parse(f"oci://{canonical}") == reference


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no repository"),
        ("oci://", "names no repository"),
        ("ghcr.io/", "names no repository"),
        (":tag", "names no repository"),
        (f"@{A}", "names no repository"),
        ("Alpine", "'library/Alpine' is not in lower case"),
        ("HOST/app", "'HOST/app' is not in lower case"),
        ("ghcr.io/Org/App", "'Org/App' is not in lower case"),
        *((text, "is not made of") for text in ("a//b", "/a", "a/", "-a", "a-", "a..b", "a___b", "a._b", "a b", "ä")),
        *((text, "is not made of") for text in ("a\n", "ghcr.io/../x", "ghcr.io/a/..", "a%2f", "\0", "a\udcff")),
        *((f"a:{tag}", "tag") for tag in ("", ".x", "-x", "x y", "1:2", "ü", "x\n", "t" * 129)),
        *(
            (f"a@{digest}", "digest")
            for digest in ("", "sha256:", A[:-1], A + "a", A.upper(), B[:-1], "md5:" + "a" * 32)
        ),
        *((f"a@{digest}", "digest") for digest in (f"{A}@{A}", A + "\n", A.replace("a", "g"), f"sha512:{'a' * 64}")),
        *(
            (f"{host}/a", "registry")
            for host in ("-h.io", "h-.io", ".io", "h..io", "h:", "h:0", "h:65536", "h:x", "h:1:2")
        ),
        *((f"{host}/a", "registry") for host in ("[::1", "[:::]", "::1", "[::1]x:1", "h.io\n", "docker:")),
        (f"{'h' * 253}.io/a", "registry"),
        (f"q.io/{'r' * 256}", "longer than 255"),
        ("0" * 64, "an image's ID"),
        ("docker://alpine", "registry 'docker:'"),
    ],
)
def test_what_is_no_name(text: str, problem: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        Reference.parse(text)
    message = str(caught.value)
    assert problem in message
    assert message.isprintable()
    assert len(message) < 400


def test_a_library_is_of_docker_hub_only() -> None:
    assert Reference.parse("quay.io/app").repository == "app"
    assert Reference.parse("docker.io/app").repository == "library/app"


def test_docker_hub_answers_elsewhere() -> None:
    assert Reference.parse("alpine").api_host == "registry-1.docker.io"
    assert Reference.parse("ghcr.io/a").api_host == "ghcr.io"
    assert Reference.parse("localhost:5000/a").api_host == "localhost:5000"


HOSTS = st.sampled_from(
    ["", "docker.io/", "index.docker.io/", "h.io/", "h.io:5/", "localhost/", "LOCALHOST/", "[::1]:5/"]
)
NAMES = st.sampled_from(["a", "library/a", "a/b", "h.io", "localhost", "b-c__d"])
REFERENCES = st.builds(
    "".join,
    st.tuples(HOSTS, NAMES, st.sampled_from(["", ":latest", ":5", ":x"]), st.sampled_from(["", f"@{A}", f"@{B}"])),
)


@given(REFERENCES, REFERENCES)
def test_two_names_are_the_same_text_only_if_they_are_the_same(one: str, other: str) -> None:
    first, second = Reference.parse(one), Reference.parse(other)
    assert (str(first) == str(second)) == (first == second)
    assert Reference.parse(str(first)) == first


@given(st.text(alphabet="aB0.:/@-_[]\n \\%", max_size=30) | st.text(max_size=300))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidSpec:
        return
    assert Reference.parse(str(reference)) == reference
    assert all(character not in str(reference) for character in "\n \\%?#")
